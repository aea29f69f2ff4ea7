//! Finds what CRIU 4.1 dumps without an error but cannot restore, or refuses without an explanation. The
//! kernel's information on the processes is examined while they are frozen, before CRIU looks at them.
//!
//! | what | why |
//! |---|---|
//! | another uts, ipc, time, net, user, cgroup or pid namespace than the first process has | CRIU keeps those of the first one only, and for a second network wants a program that is not in the image |
//! | a program that is executed from a memfd | CRIU finds no file to execute |
//! | a removed file that has other hard links, not on a tmpfs | CRIU's link to it is not in the new root file system |
//! | huge pages of hugetlb, unless the kernel command line asks for them | another VM has none |
//! | an overlay that is mounted inside | its layers are not there when it is mounted again |
//! | SCHED_DEADLINE and sched_ext | CRIU does not know their parameters |
//! | a record lock on a file that its holder has mapped | CRIU loses the lock (`locks.rs`) |
//! | a UNIX socket with several names, or with one that cannot be found or bound | CRIU binds it to one name (`sockets.rs`) |
//! | io_uring, as an open file | CRIU cannot save the rings, and its errors do not name them |
//! | a process that another one traces | there can be only one tracer, and CRIU is one |
//! | a secret that a process has open | no checkpoint has its content, so the file would be missing |
//! | a file of a volume that cannot be opened again by its name, or a watch on one | `volumes.rs` |

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::unistd::Pid;
use procfs::process::Process;
use rustix::fs::{AtFlags, CWD, linkat};

use super::{
    CriuError, locks, mounts,
    task::Task,
    volumes::{self, VolumeDevice},
};
use crate::{cgroup::Cgroup, console, sys};

/// Links in /proc/PID/ns, and the link of the first process to which each must be equal.
const NAMESPACES: [(&str, &str); 9] = [
    ("uts", "uts"),
    ("ipc", "ipc"),
    ("time", "time"),
    ("time_for_children", "time"),
    ("net", "net"),
    ("user", "user"),
    ("cgroup", "cgroup"),
    ("pid", "pid"),
    ("pid_for_children", "pid"),
];
/// The scheduling policies that CRIU restores.
const POLICIES: [i32; 5] =
    [libc::SCHED_OTHER, libc::SCHED_FIFO, libc::SCHED_RR, libc::SCHED_BATCH, libc::SCHED_IDLE];
/// The kernel marks a path that does not lead to the file any more with this.
const REMOVED: &str = " (deleted)";

/// The processes of a frozen container.
#[derive(Debug, Clone)]
pub(super) struct FrozenProcesses {
    pub(super) init: Pid,
    pub(super) cgroup: Cgroup,
    /// The file system with the container's volumes, if it has any.
    pub(super) volumes: Option<VolumeDevice>,
    /// Where the agent has mounted copies of the host's directories, which are overlays.
    pub(super) copies: Vec<PathBuf>,
    /// The file system with the container's secrets, if it has any.
    pub(super) secrets: Option<VolumeDevice>,
    /// The dump is restored on trial while the processes continue.
    pub(super) is_tried: bool,
}

/// Checks all processes, and writes back what they have changed in mapped files of volumes. The root file system must
/// be writable.
///
/// # Errors
/// Something cannot be restored; the error names the first. Or a file of a volume cannot be written.
pub(super) fn check(processes: &FrozenProcesses) -> Result<(), CriuError> {
    let FrozenProcesses { init, cgroup, volumes, copies, secrets, .. } = processes;
    let mut known = mounts::devices_at(copies)?;
    known.extend(root_device(*init));
    let (mut seen, mut written) = (HashSet::new(), HashSet::new());
    if volumes.is_some() {
        volumes::write_back_all()?;
    }
    for pid in cgroup.pids()? {
        let why = why_not(*init, pid)
            .or_else(|| volumes.as_ref().and_then(|volumes| volumes.why_not(*init, pid)))
            .or_else(|| secrets.as_ref().and_then(|secrets| secrets.secret_used_by(pid)))
            .or_else(|| overlay_of(pid, &known, &mut seen));
        if let Some(why) = why
            && let Some(task) = Task::find(pid)
        {
            return Err(CriuError::Unrestorable { task, why });
        }
        if let Some(volumes) = volumes {
            volumes.write_back(pid, &mut written)?;
        }
    }
    Ok(())
}

/// Whether all processes are in the mount namespace of the first one.
///
/// # Errors
/// The processes cannot be listed.
pub(super) fn in_one_mount_namespace(processes: &FrozenProcesses) -> Result<bool, CriuError> {
    let namespace = |pid: Pid| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let first = namespace(processes.init);
    // A process that has ended is in none.
    Ok(processes.cgroup.pids()?.into_iter().filter_map(namespace).all(|other| Some(other) == first))
}

/// Why a process cannot be restored. A process that has ended has no such reason.
fn why_not(init: Pid, pid: Pid) -> Option<String> {
    let at = |name: &str| PathBuf::from(format!("/proc/{pid}/{name}"));
    is_traced(pid)
        .or_else(|| in_other_namespace(init, pid))
        .or_else(|| runs_memfd(&at("exe")))
        .or_else(|| uses_io_uring(&at("fd")))
        .or_else(|| unsupported_policy(&at("task")))
        .or_else(|| locks::lost_by_a_restore(pid))
        .or_else(|| removed(pid, Path::new(&format!("/proc/{init}/root"))))
}

fn is_traced(pid: Pid) -> Option<String> {
    let status = Process::new(pid.as_raw()).and_then(|process| process.status()).ok()?;
    (status.tracerpid != 0).then(|| "is traced by another process".to_owned())
}

fn in_other_namespace(init: Pid, pid: Pid) -> Option<String> {
    let link = |pid: Pid, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).ok();
    let (kind, _) = NAMESPACES.iter().find(|(kind, of)| {
        let (theirs, ours) = (link(pid, kind), link(init, of));
        theirs.is_some() && ours.is_some() && theirs != ours
    })?;
    Some(match kind.split_once('_') {
        None => format!("is in another {kind} namespace than the container's first process"),
        Some((kind, _)) => {
            format!("has another {kind} namespace for its children than the container's first process is in")
        }
    })
}

fn runs_memfd(exe: &Path) -> Option<String> {
    let is_memfd = fs::read_link(exe)
        .is_ok_and(|exe| exe.starts_with("/memfd:") || exe.to_string_lossy().starts_with("/memfd:"));
    is_memfd.then(|| "executes a program from a memfd".to_owned())
}

/// A ring that only its descriptor's mappings keep is CRIU's to refuse: its error names the mapping.
fn uses_io_uring(open: &Path) -> Option<String> {
    let open = fs::read_dir(open).ok()?.flatten();
    let mut files = open.filter_map(|entry| fs::read_link(entry.path()).ok());
    files.any(|file| file == Path::new("anon_inode:[io_uring]")).then(|| {
        "uses io_uring (where vm.io_uring of the configuration is false, many programs do without)".to_owned()
    })
}

fn unsupported_policy(tasks: &Path) -> Option<String> {
    let threads = fs::read_dir(tasks).ok()?.flatten();
    let mut policies = threads.filter_map(|thread| {
        let tid = thread.file_name().to_string_lossy().parse().ok()?;
        sys::scheduling_policy(Pid::from_raw(tid)).ok()
    });
    let odd = policies.find(|policy| !POLICIES.contains(policy))?;
    let name = match odd {
        libc::SCHED_DEADLINE => "SCHED_DEADLINE".to_owned(),
        other => other.to_string(),
    };
    Some(format!("has a thread with the scheduling policy {name}"))
}

/// A file that was removed or renamed since it was opened, and is open, mapped or executed. `root` is the
/// container's root directory, where creating a link is tried.
fn removed(pid: Pid, root: &Path) -> Option<String> {
    let at = |name: &str| PathBuf::from(format!("/proc/{pid}/{name}"));
    let open = fs::read_dir(at("fd")).ok()?.flatten().map(|entry| entry.path());
    let open = open.chain([at("exe")]).filter_map(|link| Some((fs::read_link(&link).ok()?, link)));
    let open = open.map(|(path, link)| (path.to_string_lossy().into_owned(), link));
    let maps = fs::read_to_string(at("maps")).unwrap_or_default();
    let mapped = maps.lines().filter(|line| line.ends_with(REMOVED)).filter_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        Some((rest[rest.find('/')?..].to_owned(), at("map_files").join(file_of(range)?)))
    });
    let mut removed = open.chain(mapped).filter(|(path, _)| path.ends_with(REMOVED));
    removed.find_map(|(path, link)| {
        let path = path.trim_end_matches(REMOVED).escape_debug().to_string();
        match rustix::fs::statfs(&link).ok()?.f_type {
            // CRIU links such a file of a tmpfs into the archive of the tmpfs.
            libc::TMPFS_MAGIC => None,
            libc::HUGETLBFS_MAGIC => {
                (!has_huge_pages()).then(|| format!("uses huge pages ({path}), of which another VM has none"))
            }
            _ => has_other_links(&link, root)
                .then(|| format!("uses {path}, which was removed and has other hard links")),
        }
    })
}

/// The name in /proc/PID/map_files of a range of /proc/PID/maps, where addresses have leading zeros.
fn file_of(range: &str) -> Option<String> {
    let (start, end) = range.split_once('-')?;
    let short = |address: &str| u64::from_str_radix(address, 16).ok();
    Some(format!("{:x}-{:x}", short(start)?, short(end)?))
}

/// Whether CRIU, which needs one more link to such a file, can create it. stat(2) of a file of an overlay
/// reports the links of the layer below. If no link can be created, CRIU saves the file's content, or reports
/// that it cannot.
fn has_other_links(link: &Path, root: &Path) -> bool {
    if !fs::metadata(link).is_ok_and(|file| !file.is_dir() && file.nlink() > 0) {
        return false;
    }
    let tried = root.join(format!(".machinen-{}", std::process::id()));
    match linkat(CWD, link, CWD, &tried, AtFlags::SYMLINK_FOLLOW) {
        Err(_) => false,
        Ok(()) => {
            if let Err(source) = fs::remove_file(&tried) {
                console::report(&CriuError::File { what: "remove", path: tried, source });
            }
            true
        }
    }
}

/// Whether the VM has huge pages. Every VM with the same kernel command line has them from its start.
fn has_huge_pages() -> bool {
    fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.contains("hugepages="))
}

/// Describes an overlay that a process has mounted in addition to those of the agent, whose devices are `known`. `seen`
/// are the mount namespaces that were examined already.
fn overlay_of(pid: Pid, known: &[String], seen: &mut HashSet<PathBuf>) -> Option<String> {
    if !seen.insert(fs::read_link(format!("/proc/{pid}/ns/mnt")).ok()?) {
        return None;
    }
    let mounts = Process::new(pid.as_raw()).and_then(|process| process.mountinfo()).ok()?;
    let overlay =
        mounts.into_iter().find(|mount| mount.fs_type == "overlay" && !known.contains(&mount.majmin))?;
    Some(format!("has an overlay mounted at {}", overlay.mount_point.display().to_string().escape_debug()))
}

/// The device of the container's root file system.
fn root_device(init: Pid) -> Option<String> {
    let mounts = Process::new(init.as_raw()).and_then(|process| process.mountinfo()).ok()?;
    mounts
        .into_iter()
        .filter(|mount| mount.mount_point == Path::new("/"))
        .map(|mount| mount.majmin)
        .next_back()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn an_ordinary_process_can_be_restored() {
        let pid = nix::unistd::getpid();
        // The test does not check tracing, since it may be debugged itself.
        assert_eq!(in_other_namespace(pid, pid), None);
        assert_eq!(unsupported_policy(Path::new("/proc/self/task")), None);
        assert_eq!(runs_memfd(Path::new("/proc/self/exe")), None);
        assert_eq!(why_not(pid, Pid::from_raw(i32::MAX)), None);
    }

    #[test]
    fn a_range_is_a_file() {
        assert_eq!(file_of("00400000-0040b000").as_deref(), Some("400000-40b000"));
        assert_eq!(file_of("7ffe-x"), None);
    }

    #[test]
    fn a_removed_file_with_other_links_is_found() {
        let pid = nix::unistd::getpid();
        // Not on a tmpfs, where such files can be restored.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        let mut file = fs::File::create(&one).unwrap();
        file.write_all(b"x").unwrap();
        let found = || removed(pid, dir.path()).filter(|why| why.contains("/one,"));
        assert_eq!(found(), None);
        fs::hard_link(&one, &other).unwrap();
        fs::remove_file(&one).unwrap();
        assert!(found().is_some_and(|why| why.ends_with("which was removed and has other hard links")));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        fs::remove_file(&other).unwrap();
        assert_eq!(found(), None);
    }
}
