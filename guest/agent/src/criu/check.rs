//! What CRIU 4.1 dumps without a complaint and then cannot restore, or refuses in words that say nothing: found by what the
//! kernel says of the processes, while they are frozen and before CRIU looks at them.
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
//! | a process that another one traces | there can be only one tracer, and CRIU is one |

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::unistd::Pid;
use procfs::process::Process;
use rustix::fs::{AtFlags, CWD, linkat};

use super::{CriuError, locks, source::DumpSource, task::Task};
use crate::{console, sys};

/// Links in /proc/PID/ns, and that of the first process that each has to be.
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
/// The policies that CRIU restores.
const POLICIES: [i32; 5] =
    [libc::SCHED_OTHER, libc::SCHED_FIFO, libc::SCHED_RR, libc::SCHED_BATCH, libc::SCHED_IDLE];
/// How the kernel shows a path that does not lead to the file any more.
const REMOVED: &str = " (deleted)";

/// The root file system can be written.
///
/// # Errors
/// The first thing that could not be restored.
pub(super) fn check(source: &DumpSource<'_>) -> Result<(), CriuError> {
    let init = source.init.pid();
    let root = root_device(init);
    let mut seen = HashSet::new();
    for pid in source.cgroup.pids()? {
        let Some(why) = why_not(init, pid).or_else(|| overlay_of(pid, root.as_deref(), &mut seen)) else {
            continue;
        };
        if let Some(task) = Task::find(pid) {
            return Err(CriuError::Unrestorable { task, why });
        }
    }
    Ok(())
}

/// What of a process cannot be restored. One that has ended has nothing.
fn why_not(init: Pid, pid: Pid) -> Option<String> {
    let at = |name: &str| PathBuf::from(format!("/proc/{pid}/{name}"));
    is_traced(pid)
        .or_else(|| elsewhere(init, pid))
        .or_else(|| runs_memfd(&at("exe")))
        .or_else(|| odd_policy(&at("task")))
        .or_else(|| locks::lost_by_a_restore(pid))
        .or_else(|| removed(pid, Path::new(&format!("/proc/{init}/root"))))
}

fn is_traced(pid: Pid) -> Option<String> {
    let status = Process::new(pid.as_raw()).and_then(|process| process.status()).ok()?;
    (status.tracerpid != 0).then(|| "is traced by another process".to_owned())
}

fn elsewhere(init: Pid, pid: Pid) -> Option<String> {
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

fn odd_policy(tasks: &Path) -> Option<String> {
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

/// A file without a name, or with another one than it was opened by, that is open, mapped or executed.
/// `root` is the container's root directory, where a link is tried.
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
            // CRIU's own link to one of a tmpfs is in the archive of that.
            libc::TMPFS_MAGIC => None,
            libc::HUGETLBFS_MAGIC => {
                (!has_huge_pages()).then(|| format!("uses huge pages ({path}), of which another VM has none"))
            }
            _ => has_other_links(&link, root)
                .then(|| format!("uses {path}, which was removed and has other hard links")),
        }
    })
}

/// What /proc/PID/map_files calls a range of /proc/PID/maps, which fills addresses up with zeros.
fn file_of(range: &str) -> Option<String> {
    let (start, end) = range.split_once('-')?;
    let short = |address: &str| u64::from_str_radix(address, 16).ok();
    Some(format!("{:x}-{:x}", short(start)?, short(end)?))
}

/// Whether CRIU, which needs one more link to such a file, gets it. What stat(2) says of the links of an overlay's file is true of
/// the layer below. Where there is no link to be had CRIU takes the file's content, or says that it cannot.
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

/// Every VM with this one's kernel command line has them from its start.
fn has_huge_pages() -> bool {
    fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.contains("hugepages="))
}

/// Where a process has an overlay mounted that is not the container's root file system, in a mount namespace that is not
/// one of `seen`.
fn overlay_of(pid: Pid, root: Option<&str>, seen: &mut HashSet<PathBuf>) -> Option<String> {
    if !seen.insert(fs::read_link(format!("/proc/{pid}/ns/mnt")).ok()?) {
        return None;
    }
    let mounts = Process::new(pid.as_raw()).and_then(|process| process.mountinfo()).ok()?;
    let overlay =
        mounts.into_iter().find(|mount| mount.fs_type == "overlay" && Some(mount.majmin.as_str()) != root)?;
    Some(format!("has an overlay mounted at {}", overlay.mount_point.display().to_string().escape_debug()))
}

/// That of the container's root file system.
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
        // The test itself may be debugged.
        assert_eq!(elsewhere(pid, pid), None);
        assert_eq!(odd_policy(Path::new("/proc/self/task")), None);
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
        // Not a tmpfs, on which it would do no harm.
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
