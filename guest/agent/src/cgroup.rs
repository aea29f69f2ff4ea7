//! The cgroup of one container: its processes, what happened to them, and its removal (cgroup v2, kernel
//! document admin-guide/cgroup-v2.rst). The engine sets the limits.

mod device_filter;
mod freeze_and_limits;
mod nested;

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use machinen_protocol::error::{ErrorKind, HasKind};
use nix::{errno::Errno, unistd::Pid};
use tokio::io::Interest;

pub(crate) use self::device_filter::{DeviceFilters, Instruction};
use crate::sys;

/// Where the hierarchy is mounted.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";
/// Parent of all containers' cgroups, below [`ROOT`].
pub(crate) const PARENT: &str = "machinen";

/// Limits on what the agent reads: a container with a writable cgroup file system can make as many cgroups as
/// it likes.
const MAX_CGROUPS: usize = 4096;
const MAX_PIDS: usize = 1 << 16;
/// How long killed processes may take to disappear.
const EMPTY_DEADLINE: Duration = Duration::from_secs(5);

#[derive(Debug, Clone)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    #[error("cannot create cgroup {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("cannot restrict the devices of cgroup {path}")]
    Devices { path: PathBuf, source: Errno },
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot remove cgroup {path}")]
    Remove { path: PathBuf, source: io::Error },
    #[error("cgroup {path} still has processes {} s after they were killed", EMPTY_DEADLINE.as_secs())]
    NotEmpty { path: PathBuf },
    #[error("cgroup {path} has too many children or processes to read")]
    TooMany { path: PathBuf },
    #[error("cgroup {path} has more than {} cgroups below it, or too many settings, to be recorded in a checkpoint", nested::MAX_NESTED - 1)]
    TooManyNested { path: PathBuf },
    #[error("{path} has a name that a checkpoint cannot record")]
    Name { path: PathBuf },
    #[error("some processes were not frozen within {} s", freeze_and_limits::FREEZE_DEADLINE.as_secs())]
    NotFrozen,
    #[error("{name:?} is not the name of a cgroup file")]
    FileName { name: String },
    #[error("the guest has no cgroup file {name}")]
    NoFile { name: String },
    #[error("cannot set {name} to {value:?}")]
    Set { name: String, value: String, source: io::Error },
}

impl HasKind for CgroupError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFrozen => ErrorKind::DeadlineExceeded,
            Self::FileName { .. } => ErrorKind::InvalidArgument,
            Self::TooManyNested { .. } | Self::Name { .. } => ErrorKind::FailedPrecondition,
            Self::NoFile { .. } => ErrorKind::Unimplemented,
            Self::Set { source, .. } => match source.raw_os_error() {
                Some(libc::EINVAL | libc::ERANGE | libc::E2BIG | libc::EOVERFLOW) => {
                    ErrorKind::InvalidArgument
                }
                Some(libc::ENODEV) => ErrorKind::NotFound,
                _ => ErrorKind::Internal,
            },
            _ => ErrorKind::Internal,
        }
    }
}

impl Cgroup {
    /// `path` is the spec's cgroupsPath, which the host has made absolute and free of `..`.
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: Path::new(ROOT).join(path.strip_prefix("/").unwrap_or(path)) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Creates the cgroup, with all controllers of its parents, and allows only the devices that the program
    /// `devices` allows.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn create(&self, filters: &DeviceFilters, devices: &[Instruction]) -> Result<(), CgroupError> {
        let failed = |source| CgroupError::Create { path: self.path.clone(), source };
        let below_root = self.path.strip_prefix(ROOT).unwrap_or(&self.path);
        let mut dir = PathBuf::from(ROOT);
        for name in below_root {
            dir.push(name);
            match fs::create_dir(&dir) {
                Err(err) if err.kind() != io::ErrorKind::AlreadyExists => return Err(failed(err)),
                Ok(()) if dir != self.path => enable_controllers(&dir)?,
                _ => {}
            }
        }
        let dir = fs::File::open(&self.path).map_err(failed)?;
        filters
            .attach(dir.as_fd(), devices)
            .map_err(|source| CgroupError::Devices { path: self.path.clone(), source })
    }

    /// How many processes the kernel has killed for lack of memory in the cgroup's parent and all below it. It counts on
    /// when a cgroup below is removed, as that of a failed creation is. 0 without the memory controller.
    pub(crate) fn killed_for_memory(&self) -> u64 {
        let events = self.path.parent().map(|parent| fs::read_to_string(parent.join("memory.events")));
        events.and_then(Result::ok).and_then(|events| count(&events, "oom_kill")).unwrap_or(0)
    }

    /// Moves a process into the cgroup.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn add(&self, pid: Pid) -> io::Result<()> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string())
    }

    /// All processes, including those in child cgroups. Empty when the cgroup is gone.
    ///
    /// # Errors
    /// The cgroup cannot be read, or exceeds the limits on what the agent reads.
    pub(crate) fn pids(&self) -> Result<Vec<Pid>, CgroupError> {
        let mut pids = Vec::new();
        for dir in self.tree()? {
            let path = dir.join("cgroup.procs");
            let text = match fs::read_to_string(&path) {
                Ok(text) => text,
                // A threaded child cgroup has no processes of its own, and any cgroup may disappear while
                // this reads.
                Err(err) if is_gone(&err) || err.raw_os_error() == Some(libc::EOPNOTSUPP) => continue,
                Err(source) => return Err(CgroupError::Read { path, source }),
            };
            pids.extend(text.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw));
            if pids.len() > MAX_PIDS {
                return Err(CgroupError::TooMany { path: self.path.clone() });
            }
        }
        Ok(pids)
    }

    /// Sends a signal to every process. SIGKILL also reaches processes that are forked meanwhile.
    ///
    /// # Errors
    /// The cgroup cannot be read or written.
    pub(crate) fn signal_all(&self, signal: i32) -> Result<(), CgroupError> {
        if signal == libc::SIGKILL {
            return self.kill();
        }
        for pid in self.pids()? {
            // A process that has just ended needs no signal.
            let _ = sys::kill_raw(pid, signal);
        }
        Ok(())
    }

    /// Kills all processes in the cgroup.
    ///
    /// # Errors
    /// The cgroup exists and cannot be written.
    pub(crate) fn kill(&self) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.kill");
        match fs::write(&path, "1") {
            Ok(()) => Ok(()),
            Err(err) if is_gone(&err) => Ok(()),
            Err(source) => Err(CgroupError::Write { path, source }),
        }
    }

    /// Waits until the cgroup is empty, then removes it with its children.
    ///
    /// # Errors
    /// Processes remain after the deadline, or the kernel refuses.
    pub(crate) async fn remove(&self) -> Result<(), CgroupError> {
        self.emptied().await?;
        remove_tree(&self.path).map_err(|source| CgroupError::Remove { path: self.path.clone(), source })
    }

    /// Waits until the cgroup is empty.
    ///
    /// # Errors
    /// Processes remain after the deadline.
    pub(crate) async fn emptied(&self) -> Result<(), CgroupError> {
        let empty = self.watch("cgroup.events", |text| has_line(text, "populated 0").then_some(()));
        let not_empty = |_| CgroupError::NotEmpty { path: self.path.clone() };
        tokio::time::timeout(EMPTY_DEADLINE, empty).await.map_err(not_empty)?.map(drop)
    }

    /// Reads a file now and after each change that the kernel reports, until `found` returns something. None
    /// when the cgroup, or the file's controller, does not exist or disappears.
    async fn watch<T>(
        &self,
        name: &str,
        mut found: impl FnMut(&str) -> Option<T>,
    ) -> Result<Option<T>, CgroupError> {
        let path = self.path.join(name);
        let failed = |source| CgroupError::Read { path: path.clone(), source };
        let file = match fs::File::open(&path) {
            Ok(file) => file,
            Err(err) if is_gone(&err) => return Ok(None),
            Err(source) => return Err(failed(source)),
        };
        // The kernel reports changes of these files as POLLPRI.
        let file = sys::register(file, Interest::PRIORITY).map_err(failed)?;
        loop {
            match fs::read_to_string(&path) {
                Ok(text) => {
                    if let Some(found) = found(&text) {
                        return Ok(Some(found));
                    }
                }
                Err(err) if is_gone(&err) => return Ok(None),
                Err(source) => return Err(failed(source)),
            }
            file.ready(Interest::PRIORITY).await.map_err(failed)?.clear_ready();
        }
    }

    fn tree(&self) -> Result<Vec<PathBuf>, CgroupError> {
        tree(&self.path).map_err(|source| match source.kind() {
            io::ErrorKind::QuotaExceeded => CgroupError::TooMany { path: self.path.clone() },
            _ => CgroupError::Read { path: self.path.clone(), source },
        })
    }
}

/// The number after a key of a flat keyed file.
fn count(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok())
}

fn has_line(text: &str, wanted: &str) -> bool {
    text.lines().any(|line| line == wanted)
}

/// Enables all controllers of a cgroup for its children.
///
/// # Errors
/// The kernel refuses; EBUSY when a process is in the cgroup.
pub(crate) fn enable_controllers(dir: &Path) -> Result<(), CgroupError> {
    let path = dir.join("cgroup.controllers");
    let controllers = fs::read_to_string(&path).map_err(|source| CgroupError::Read { path, source })?;
    let enable: Vec<String> = controllers.split_ascii_whitespace().map(|name| format!("+{name}")).collect();
    if enable.is_empty() {
        return Ok(());
    }
    let path = dir.join("cgroup.subtree_control");
    fs::write(&path, enable.join(" ")).map_err(|source| CgroupError::Write { path, source })
}

/// A cgroup and all below it, parents first. Empty when it does not exist.
fn tree(root: &Path) -> io::Result<Vec<PathBuf>> {
    let mut dirs = vec![root.to_owned()];
    let mut next = 0;
    while let Some(dir) = dirs.get(next) {
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(err) if is_gone(&err) => {
                dirs.remove(next);
                continue;
            }
            Err(err) => return Err(err),
        };
        next += 1;
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                dirs.push(entry.path());
            }
        }
        if dirs.len() > MAX_CGROUPS {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
    }
    Ok(dirs)
}

/// Removes a cgroup without processes, and all cgroups below it.
///
/// # Errors
/// Those of rmdir(2); EBUSY while a process is in one of the cgroups.
pub(crate) fn remove_tree(root: &Path) -> io::Result<()> {
    for dir in tree(root)?.iter().rev() {
        match fs::remove_dir(dir) {
            Err(err) if !is_gone(&err) => return Err(err),
            _ => {}
        }
    }
    Ok(())
}

/// Whether a cgroup is gone. Reading one that is being removed returns ENODEV.
fn is_gone(err: &io::Error) -> bool {
    err.kind() == io::ErrorKind::NotFound || err.raw_os_error() == Some(libc::ENODEV)
}
