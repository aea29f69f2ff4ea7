//! Restores the processes of a dumped container, up to the moment before they run.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::FileTypeExt as _,
    },
    path::{Component, Path, PathBuf},
};

use machinen_protocol::{
    api::{CheckpointFacts, CriuOptions, ExternalMount, NestedCgroup},
    copies,
    secrets::MOUNT_SOURCE,
};
use nix::{
    mount::{MntFlags, MsFlags, umount2},
    sys::socket::{ControlMessage, MsgFlags, sendmsg},
    unistd::Pid,
};
use procfs::process::Process;
use protobuf::MessageField;
use rust_criu::rust_criu_protobuf::rpc::{Criu_req, Criu_req_type, Inherit_fd};
use tokio::{sync::oneshot, task::AbortHandle};

use super::{
    CriuError, STDIN, bound, cpu, image_mount::ImageMount, lazy::LazyPages, oom, reason::quote, rpc::Criu,
    tmp_dirs, uts,
};
use crate::{
    cgroup::{Cgroup, CgroupError},
    console,
    disk::Disk,
    engine::FileMount,
    reaper::Reaper,
    stdio::{self, ProcessEnds},
    sys::WaitStatus,
};

const LOG: &str = "restore.log";
/// CRIU's own directory, in the agent's directory of a container.
const WORK: &str = "criu";

/// The container into which the processes are restored.
#[derive(Debug)]
pub(crate) struct RestoreTarget<'a> {
    /// The container's cgroup, which exists and has its limits.
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) rootfs: &'a Path,
    /// The agent's directory of the container.
    pub(crate) dir: &'a Path,
    pub(crate) files: &'a [FileMount],
    /// The volumes of the container's configuration, by their paths in the VM.
    pub(crate) volumes: &'a [PathBuf],
    /// Where the copies of the host's directories are mounted in the VM, in the order of the checkpoint's.
    pub(crate) copies: &'a [PathBuf],
    /// An empty tmpfs, if the container had secrets when it was dumped.
    pub(crate) secrets: &'a Path,
    /// The new hostname in the processes' UTS namespace; empty keeps the old one.
    pub(crate) hostname: &'a str,
}

/// Restored processes that have not run yet.
#[derive(Debug)]
pub(crate) struct Restored {
    pub(crate) pid: Pid,
    pub(crate) exit: oneshot::Receiver<WaitStatus>,
    pub(crate) held: HeldByCriu,
    /// The unread bytes of the first process's stdin.
    pub(crate) stdin: Vec<u8>,
}

/// CRIU holds the restored processes until this lets them run.
#[derive(Debug)]
pub(crate) struct HeldByCriu {
    guard: Guard,
    criu: Criu,
    nested: NestedCgroups,
    pages: Option<LazyPages>,
    images: ImageMount,
    work: PathBuf,
}

/// The cgroups below that of the dumped container.
#[derive(Debug)]
struct NestedCgroups {
    /// The cgroup of the restored container.
    cgroup: Cgroup,
    recorded: Vec<NestedCgroup>,
}

/// Memory of running processes that is still on the checkpoint's disk.
#[derive(Debug)]
pub(crate) struct Fetching {
    pages: LazyPages,
    images: ImageMount,
    work: PathBuf,
}

impl Fetching {
    /// Returns when the disk is not needed any more.
    ///
    /// # Errors
    /// Some pages are lost.
    pub(crate) async fn done(self) -> Result<(), CriuError> {
        self.pages.fetched(self.images, &self.work).await
    }
}

impl HeldByCriu {
    /// Lets the processes run, and returns when they do. If their memory is fetched later, returns what waits
    /// for that.
    ///
    /// # Errors
    /// CRIU fails at the last moment.
    pub(crate) async fn resume(self) -> Result<Option<Fetching>, CriuError> {
        let Self { guard, criu, nested, pages, images, work } = self;
        drop(guard);
        nested.cgroup.refreeze(&nested.recorded)?;
        criu.acknowledge().await?;
        criu.finish("restore", &work.join(LOG), quote).await?;
        criu.exit().await;
        Ok(pages.map(|pages| Fetching { pages, images, work }))
    }
}

/// Removes the files of a restore from the agent's directory of a container. CRIU must have ended.
///
/// # Errors
/// Those of the file system.
pub(crate) fn clear(dir: &Path) -> Result<(), CriuError> {
    let work = dir.join(WORK);
    if !work.exists() {
        return Ok(());
    }
    let failed = |source| CriuError::File { what: "remove", path: work.clone(), source };
    // A killed CRIU may leave cgroups mounted below this directory.
    let mounts = Process::myself().and_then(|process| process.mountinfo()).map_err(CriuError::Inspect)?;
    let mut below: Vec<_> =
        mounts.into_iter().map(|mount| mount.mount_point).filter(|at| at.starts_with(&work)).collect();
    below.reverse();
    below.iter().try_for_each(|at| umount2(at, MntFlags::MNT_DETACH)).map_err(|err| failed(err.into()))?;
    fs::remove_dir_all(&work).map_err(failed)?;
    // The container is removed anyway.
    tmp_dirs::clear().unwrap_or_else(|err| console::report(&err));
    Ok(())
}

/// Restores the processes of a checkpoint.
///
/// # Errors
/// This VM does not suit the checkpoint, or CRIU cannot restore it; then no process is left.
pub(crate) async fn restore(
    reaper: &Reaper,
    target: &RestoreTarget<'_>,
    disk: &Disk,
    options: &CriuOptions,
    facts: &CheckpointFacts,
    ends: ProcessEnds,
) -> Result<Restored, CriuError> {
    cpu::check_kernel(&facts.kernel_release)?;
    cpu::check(&facts.cpu_flags)?;
    let images = ImageMount::mount(disk, target.dir, "erofs", MsFlags::MS_RDONLY | MsFlags::MS_NOATIME)?;
    bound::check(images.path(), options.tcp_close)?;
    let stdin = stdio::read_unread(&images.path().join(STDIN)).map_err(CriuError::Stdin)?;
    let work = target.dir.join(WORK);
    fs::create_dir_all(&work).map_err(|source| CriuError::File {
        what: "create",
        path: work.clone(),
        source,
    })?;
    let open = |path: &Path| {
        File::open(path).map_err(|source| CriuError::File { what: "open", path: path.to_owned(), source })
    };
    // CRIU opens both through their numbers in this process.
    let dirs = [open(&work)?, open(images.path())?];
    let (inherited, terminal) = match ends {
        ProcessEnds::Files(files) => (Vec::from(files), None),
        ProcessEnds::Terminal(socket) => (Vec::new(), Some(socket)),
    };
    let request = request(target, &dirs, &inherited, options, facts)?;
    let pages = match options.lazy_pages {
        true => Some(LazyPages::serve(reaper, images.path(), &work).await?),
        false => None,
    };
    let expectation = reaper.expect();
    let criu = Criu::start(reaper, &inherited)?;
    drop(inherited);
    oom::protect(criu.pid())?;
    join_cgroup(&criu, target.cgroup)?;
    criu.send(&request).await?;
    let nested = NestedCgroups { cgroup: target.cgroup.clone(), recorded: facts.cgroups.clone() };
    let pid = follow(&criu, terminal, &nested, &work.join(LOG)).await?;
    let guard = Guard::over(&criu, target.cgroup.clone());
    let exit = expectation.watch(pid);
    oom::restore_scores(target.cgroup, criu.pid())?;
    if !target.hostname.is_empty() {
        uts::rename(pid, target.hostname)?;
    }
    Ok(Restored { pid, exit, held: HeldByCriu { guard, criu, nested, pages, images, work }, stdin })
}

/// The request to CRIU, which gets the first process's standard streams in `inherited`.
fn request(
    target: &RestoreTarget<'_>,
    [work, images]: &[File; 2],
    inherited: &[OwnedFd],
    options: &CriuOptions,
    facts: &CheckpointFacts,
) -> Result<Criu_req, CriuError> {
    let mut opts = super::options(images, target.rootfs, options);
    opts.set_work_dir_fd(work.as_raw_fd());
    opts.set_log_file(LOG.to_owned());
    opts.set_rst_sibling(true);
    opts.set_lazy_pages(options.lazy_pages);
    opts.cg_root.push(super::cgroup_root(target.cgroup));
    for mount in &facts.mounts {
        opts.external.push(format!("mnt[{}]:{}", mount.destination, source(mount, target)?));
    }
    let pipes = inherited.iter().zip(&facts.descriptors).filter(|(_, name)| name.starts_with("pipe:"));
    for (file, name) in pipes {
        let mut inherit = Inherit_fd::new();
        inherit.set_key(name.clone());
        inherit.set_fd(file.as_raw_fd());
        opts.inherit_fd.push(inherit);
    }
    let mut request = Criu_req::new();
    request.set_type(Criu_req_type::RESTORE);
    request.opts = MessageField::some(opts);
    Ok(request)
}

/// Moves CRIU to the container's cgroup, which the processes that CRIU restores inherit.
fn join_cgroup(criu: &Criu, cgroup: &Cgroup) -> Result<(), CriuError> {
    match cgroup.add(criu.pid()) {
        // CRIU has ended, which is reported when its answer is read.
        Err(err) if err.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        added => added.map_err(|source| CriuError::File {
            what: "move criu into",
            path: cgroup.path().to_owned(),
            source,
        }),
    }
}

/// Freezes the processes that CRIU holds if CRIU is killed: they must not run, since the container was not
/// started.
#[derive(Debug)]
struct Guard(AbortHandle);

impl Guard {
    fn over(criu: &Criu, cgroup: Cgroup) -> Self {
        let ended = criu.exit();
        let guard = tokio::spawn(async move {
            ended.await;
            // The start of the container then reports the failure. If the cgroup is gone, no process is left
            // to freeze.
            match cgroup.freeze().await {
                Ok(()) | Err(CgroupError::NoFile { .. }) => {}
                Err(err) => console::report(&err),
            }
        });
        Self(guard.abort_handle())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Follows CRIU's notifications until the processes exist and would run next.
async fn follow(
    criu: &Criu,
    terminal: Option<OwnedFd>,
    nested: &NestedCgroups,
    log: &Path,
) -> Result<Pid, CriuError> {
    let (mut pid, mut has_limits) = (None, false);
    loop {
        let Some((answer, fd)) = criu.receive().await? else { return Err(criu.died(log).await) };
        if answer.type_() != Criu_req_type::NOTIFY {
            return Err(failed(log));
        }
        match answer.notify.script() {
            "orphan-pts-master" => {
                let master = fd.ok_or(CriuError::NoMaster)?;
                if let Some(terminal) = &terminal {
                    pass_on(terminal, &master).map_err(CriuError::Talk)?;
                }
            }
            // The first process is in its cgroup and has no memory yet. CRIU does not send this for a process
            // without namespaces.
            "post-setup-namespaces" => {
                nested.cgroup.apply_limits(&nested.recorded)?;
                has_limits = true;
            }
            "post-restore" => {
                if !has_limits {
                    nested.cgroup.apply_limits(&nested.recorded)?;
                }
                pid = Some(answer.notify.pid()).filter(|pid| *pid > 0);
            }
            // The processes wait for the answer to this notification.
            "pre-resume" => return pid.map(Pid::from_raw).ok_or(CriuError::NoPid),
            _ => {}
        }
        criu.acknowledge().await?;
    }
}

/// Passes the terminal's master on, as the engine does for a new container.
fn pass_on(terminal: &OwnedFd, master: &OwnedFd) -> io::Result<()> {
    let fds = [master.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    let bytes = [io::IoSlice::new(b"master")];
    sendmsg::<()>(terminal.as_raw_fd(), &bytes, &control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// What is mounted there: a file, a volume, a copy or the secrets of the container itself, or a character device, to which
/// the container's cgroup controls the access. Anything else of this VM belongs to others, whatever the checkpoint says.
fn source(mount: &ExternalMount, target: &RestoreTarget<'_>) -> Result<String, CriuError> {
    if mount.source == MOUNT_SOURCE {
        return Ok(target.secrets.display().to_string());
    }
    if let Some(number) = copies::number(&mount.source) {
        let copy = target.copies.get(number).ok_or_else(|| CriuError::ForeignMount {
            destination: mount.destination.clone(),
            path: mount.source.clone(),
        })?;
        return Ok(copy.display().to_string());
    }
    if !mount.source.is_empty() {
        let path = Path::new(&mount.source);
        return match target.volumes.iter().any(|volume| volume == path) || is_device(path) {
            true => Ok(mount.source.clone()),
            false => Err(CriuError::ForeignMount {
                destination: mount.destination.clone(),
                path: mount.source.clone(),
            }),
        };
    }
    let file = target.files.iter().find(|file| file.destination == Path::new(&mount.destination));
    let file = file.ok_or_else(|| CriuError::NoFile { destination: mount.destination.clone() })?;
    Ok(file.source.display().to_string())
}

/// Whether this is the path of a character device below /dev. Links are not followed.
fn is_device(path: &Path) -> bool {
    let is_plain = path.components().skip(1).all(|component| matches!(component, Component::Normal(_)));
    let is_character = |meta: fs::Metadata| meta.file_type().is_char_device();
    is_plain && path.starts_with("/dev") && fs::symlink_metadata(path).is_ok_and(is_character)
}

fn failed(log: &Path) -> CriuError {
    CriuError::Failed { what: "restore", log: quote(log) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_files_volumes_and_character_devices_are_mounted() {
        let files = [FileMount { destination: "/etc/hosts".into(), source: "/run/c/files/0".into() }];
        let cgroup = Cgroup::new(Path::new("/c"));
        let target = RestoreTarget {
            cgroup: &cgroup,
            rootfs: Path::new("/run/c/rootfs"),
            dir: Path::new("/run/c"),
            files: &files,
            volumes: &["/run/machinen-shares/dir-3".into()],
            copies: &["/run/c/copies/0/rootfs".into()],
            secrets: Path::new("/run/c/secrets"),
            hostname: "",
        };
        let mount = |destination: &str, source: &str| {
            let mount = ExternalMount {
                destination: destination.to_owned(),
                source: source.to_owned(),
                ..Default::default()
            };
            super::source(&mount, &target)
        };
        assert_eq!(mount("/etc/hosts", "").unwrap(), "/run/c/files/0");
        assert_eq!(mount("/proc/kcore", "/dev/null").unwrap(), "/dev/null");
        assert_eq!(mount("/data", "/run/machinen-shares/dir-3").unwrap(), "/run/machinen-shares/dir-3");
        assert_eq!(mount("/copy", "machinen-copy:0").unwrap(), "/run/c/copies/0/rootfs");
        assert_eq!(mount("/run/secrets", MOUNT_SOURCE).unwrap(), "/run/c/secrets");
        assert!(matches!(mount("/etc/passwd", ""), Err(CriuError::NoFile { .. })));
        for foreign in [
            "/",
            "/run",
            "/etc/hostname",
            "/dev",
            "/dev/../etc/hostname",
            "/dev/fd/0",
            "dev/null",
            "/run/machinen-shares/dir-4",
            "/run/machinen-shares/dir-3/below",
            "machinen-copy:1",
        ] {
            assert!(matches!(mount("/x", foreign), Err(CriuError::ForeignMount { .. })), "{foreign}");
        }
    }
}
