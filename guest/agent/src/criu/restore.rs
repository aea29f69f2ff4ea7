//! Making a dumped container's processes again, up to the moment before they run.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use machinen_protocol::api::{CheckpointFacts, CriuOptions, NestedCgroup};
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
    CriuError, STDIN, cpu, lazy::LazyPages, mounted::Mounted, oom, reason::quote, rpc::Criu, uts, yard,
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

/// Where the processes are to be.
#[derive(Debug)]
pub(crate) struct RestoreTarget<'a> {
    /// Exists, with its limits.
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) rootfs: &'a Path,
    /// The agent's directory of the container.
    pub(crate) dir: &'a Path,
    pub(crate) files: &'a [FileMount],
    /// Of their UTS namespace; empty: the one that they had.
    pub(crate) hostname: &'a str,
}

/// Processes that are there and have not run.
#[derive(Debug)]
pub(crate) struct Restored {
    pub(crate) pid: Pid,
    pub(crate) exit: oneshot::Receiver<WaitStatus>,
    pub(crate) held: HeldByCriu,
    /// What the first of them is to find in its stdin.
    pub(crate) stdin: Vec<u8>,
}

/// What keeps restored processes from running.
#[derive(Debug)]
pub(crate) struct HeldByCriu {
    guard: Guard,
    criu: Criu,
    nested: Nested,
    pages: Option<LazyPages>,
    images: Mounted,
    work: PathBuf,
}

/// What was below the cgroup of the container that was dumped.
#[derive(Debug)]
struct Nested {
    /// Of the restored one.
    cgroup: Cgroup,
    recorded: Vec<NestedCgroup>,
}

/// Memory of running processes that is still on the disk.
#[derive(Debug)]
pub(crate) struct Fetching {
    pages: LazyPages,
    images: Mounted,
    work: PathBuf,
}

impl Fetching {
    /// Returns when the disk is not needed any more.
    ///
    /// # Errors
    /// Pages are missing, and will be.
    pub(crate) async fn done(self) -> Result<(), CriuError> {
        self.pages.fetched(self.images, &self.work).await
    }
}

impl HeldByCriu {
    /// Lets the processes run, and returns when they do; with what is to be waited for, if their memory is fetched later.
    ///
    /// # Errors
    /// CRIU fails in the last moment.
    pub(crate) async fn resume(self) -> Result<Option<Fetching>, CriuError> {
        let Self { guard, criu, nested, pages, images, work } = self;
        drop(guard);
        nested.cgroup.refreeze(&nested.recorded)?;
        criu.go_on().await?;
        criu.finish("restore", &work.join(LOG), quote).await?;
        criu.exit().await;
        Ok(pages.map(|pages| Fetching { pages, images, work }))
    }
}

/// Removes what a restore has left in the agent's directory of a container; CRIU has ended.
///
/// # Errors
/// Those of the file system.
pub(crate) fn clear(dir: &Path) -> Result<(), CriuError> {
    let work = dir.join(WORK);
    if !work.exists() {
        return Ok(());
    }
    let failed = |source| CriuError::File { what: "remove", path: work.clone(), source };
    // Killed in the middle, it leaves cgroups mounted, which are no files of ours.
    let mounts = Process::myself().and_then(|process| process.mountinfo()).map_err(CriuError::Inspect)?;
    let mut below: Vec<_> =
        mounts.into_iter().map(|mount| mount.mount_point).filter(|at| at.starts_with(&work)).collect();
    below.reverse();
    below.iter().try_for_each(|at| umount2(at, MntFlags::MNT_DETACH)).map_err(|err| failed(err.into()))?;
    fs::remove_dir_all(&work).map_err(failed)?;
    // No reason to keep a container.
    yard::clear().unwrap_or_else(|err| console::report(&err));
    Ok(())
}

/// # Errors
/// This VM is not one for the checkpoint, or CRIU cannot restore it; its processes are gone then.
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
    let images = Mounted::mount(disk, target.dir, "erofs", MsFlags::MS_RDONLY | MsFlags::MS_NOATIME)?;
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
    let (work_dir, images_dir) = (open(&work)?, open(images.path())?);
    let log = work.join(LOG);
    let mut opts = super::options(&images_dir, target.rootfs, options);
    opts.set_work_dir_fd(work_dir.as_raw_fd());
    opts.set_log_file(LOG.to_owned());
    opts.set_rst_sibling(true);
    opts.set_lazy_pages(options.lazy_pages);
    opts.cg_root.push(super::cgroup_root(target.cgroup));
    for mount in &facts.mounts {
        opts.external.push(format!("mnt[{}]:{}", mount.destination, source(mount, target.files)?));
    }
    let (inherited, terminal) = match ends {
        ProcessEnds::Files(files) => {
            for (file, name) in
                files.iter().zip(&facts.descriptors).filter(|(_, name)| name.starts_with("pipe:"))
            {
                let mut inherit = Inherit_fd::new();
                inherit.set_key(name.clone());
                inherit.set_fd(file.as_raw_fd());
                opts.inherit_fd.push(inherit);
            }
            (Vec::from(files), None)
        }
        ProcessEnds::Terminal(socket) => (Vec::new(), Some(socket)),
    };
    let mut request = Criu_req::new();
    request.set_type(Criu_req_type::RESTORE);
    request.opts = MessageField::some(opts);
    let pages = match options.lazy_pages {
        true => Some(LazyPages::serve(reaper, images.path(), &work).await?),
        false => None,
    };
    let expectation = reaper.expect();
    let criu = Criu::start(reaper, &inherited)?;
    drop(inherited);
    oom::protect(criu.pid())?;
    // What it makes is in its own cgroup.
    match target.cgroup.add(criu.pid()) {
        // It has ended, of which is told below.
        Err(err) if err.raw_os_error() == Some(libc::ESRCH) => {}
        added => added.map_err(|source| CriuError::File {
            what: "move criu into",
            path: target.cgroup.path().to_owned(),
            source,
        })?,
    }
    criu.send(&request).await?;
    let nested = Nested { cgroup: target.cgroup.clone(), recorded: facts.cgroups.clone() };
    let pid = follow(&criu, terminal, &nested, &log).await?;
    let guard = Guard::over(&criu, target.cgroup.clone());
    let exit = expectation.watch(pid);
    oom::expose(target.cgroup, criu.pid())?;
    if !target.hostname.is_empty() {
        uts::rename(pid, target.hostname)?;
    }
    Ok(Restored { pid, exit, held: HeldByCriu { guard, criu, nested, pages, images, work }, stdin })
}

/// Sees to it that what CRIU holds does not run if it is killed, since nobody has started it.
#[derive(Debug)]
struct Guard(AbortHandle);

impl Guard {
    fn over(criu: &Criu, cgroup: Cgroup) -> Self {
        let ended = criu.exit();
        let guard = tokio::spawn(async move {
            ended.await;
            // Who starts it is told why that cannot be. Where it was killed with all that it held there is nothing to hold.
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

/// Until the processes are there and would run next.
async fn follow(
    criu: &Criu,
    terminal: Option<OwnedFd>,
    nested: &Nested,
    log: &Path,
) -> Result<Pid, CriuError> {
    let (mut pid, mut settled) = (None, false);
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
            // The first process is in its cgroup, and has no memory yet. Not said of one without namespaces.
            "post-setup-namespaces" => {
                nested.cgroup.settle(&nested.recorded)?;
                settled = true;
            }
            "post-restore" => {
                if !settled {
                    nested.cgroup.settle(&nested.recorded)?;
                }
                pid = Some(answer.notify.pid()).filter(|pid| *pid > 0);
            }
            // Without an answer to this one they wait.
            "pre-resume" => return pid.map(Pid::from_raw).ok_or(CriuError::NoPid),
            _ => {}
        }
        criu.go_on().await?;
    }
}

/// As the engine does for a new container.
fn pass_on(terminal: &OwnedFd, master: &OwnedFd) -> io::Result<()> {
    let fds = [master.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    let bytes = [io::IoSlice::new(b"master")];
    sendmsg::<()>(terminal.as_raw_fd(), &bytes, &control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

fn source(mount: &machinen_protocol::api::ExternalMount, files: &[FileMount]) -> Result<String, CriuError> {
    if !mount.source.is_empty() {
        return Ok(mount.source.clone());
    }
    let file = files.iter().find(|file| file.destination == Path::new(&mount.destination));
    let file = file.ok_or_else(|| CriuError::NoFile { destination: mount.destination.clone() })?;
    Ok(file.source.display().to_string())
}

fn failed(log: &Path) -> CriuError {
    CriuError::Failed { what: "restore", log: quote(log) }
}
