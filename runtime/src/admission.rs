//! Whether this host has memory for one more VM, before its kernel has to kill something.
//!
//! Memory is taken page by page while a VM starts, so that twenty that start at once would all find enough. Each notes
//! what it is going to take in a file that it holds locked until it has started; what the others hold is not there
//! any more for who comes next. A file that nobody holds is of a process that was killed.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::error::{ErrorKind, Kind};

const MEMINFO: &str = "/proc/meminfo";

/// Why no VM may start.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    #[error(
        "not enough memory on this host for one more VM: it takes some {needed} MiB, and {available} MiB are available of \
         which {reserve} MiB are kept free (vm.memory_reserve_percent) and {promised} MiB are for VMs that are starting; end \
         a container or add memory"
    )]
    Memory { needed: u64, available: u64, reserve: u64, promised: u64 },
    #[error("cannot {action} {}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
}

impl Kind for AdmissionError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Memory { .. } => ErrorKind::ResourceExhausted,
            Self::File { .. } => ErrorKind::Internal,
        }
    }
}

/// The host's memory, MiB (proc_meminfo(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    pub total: u64,
    pub available: u64,
}

impl HostMemory {
    /// # Errors
    /// /proc/meminfo cannot be read.
    pub fn now() -> Result<Self, AdmissionError> {
        let failed = |source| AdmissionError::File { action: "read", path: MEMINFO.into(), source };
        let text = fs::read_to_string(MEMINFO).map_err(failed)?;
        Self::parse(&text).ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib >> 10)
        };
        Some(Self { total: field("MemTotal:")?, available: field("MemAvailable:")? })
    }
}

/// What a VM that is starting is going to take; dropped when it has it.
#[derive(Debug)]
pub struct Promise {
    path: PathBuf,
    _held: File,
}

impl Drop for Promise {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), "cannot remove a file: {error}");
        }
    }
}

/// Promises `needed` MiB to one more VM, in the directory `dir`, which is made if it is missing.
///
/// # Errors
/// There is not so much beyond `reserve_percent` of the host's memory and what others were promised.
pub fn admit(
    dir: &Path,
    needed: u64,
    reserve_percent: u64,
    host: HostMemory,
) -> Result<Promise, AdmissionError> {
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| AdmissionError::File { action, path, source }
    };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed("make the directory", dir))?;
    let guard = File::open(dir).map_err(failed("open", dir))?;
    // Held by everyone for as long as it takes to look and to promise.
    flock(&guard, FlockOperation::LockExclusive).map_err(|error| failed("lock", dir)(error.into()))?;
    let promised = promised(dir).map_err(failed("read", dir))?;
    let reserve = host.total * reserve_percent / 100;
    if reserve_percent > 0 && host.available < reserve + promised + needed {
        return Err(AdmissionError::Memory { needed, available: host.available, reserve, promised });
    }
    let file = tempfile::Builder::new().prefix("vm-").tempfile_in(dir).map_err(failed("write in", dir))?;
    let (mut held, path) = file.keep().map_err(|error| failed("write in", dir)(error.error))?;
    let promise = flock(&held, FlockOperation::NonBlockingLockExclusive).map_err(io::Error::from);
    promise.and_then(|()| write!(held, "{needed}")).map_err(failed("write", &path))?;
    Ok(Promise { path, _held: held })
}

/// The sum of what is promised; what nobody holds any more is removed.
fn promised(dir: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let Ok(file) = File::open(&path) else { continue };
        if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
            fs::remove_file(&path)?;
            continue;
        }
        sum += fs::read_to_string(&path)?.parse::<u64>().unwrap_or_default();
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostMemory = HostMemory { total: 10_000, available: 1_000 };

    #[test]
    fn those_that_start_at_once_share_what_there_is() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("starting");
        let promises: Vec<_> = (0..3).map(|_| admit(&dir, 300, 1, HOST).unwrap()).collect();
        let error = admit(&dir, 300, 1, HOST).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("takes some 300 MiB, and 1000 MiB") && text.contains("100 MiB are kept"),
            "{text}"
        );
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        drop(promises);
        drop(admit(&dir, 300, 1, HOST).unwrap());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }

    #[test]
    fn a_promise_of_the_dead_counts_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("vm-killed"), "900").unwrap();
        let promise = admit(dir.path(), 800, 1, HOST).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        drop(promise);
    }

    #[test]
    fn without_a_reserve_nothing_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        admit(dir.path(), 1 << 40, 0, HOST).unwrap();
    }

    #[test]
    fn this_host_has_memory() {
        let host = HostMemory::now().unwrap();
        assert!(host.total > 64 && host.available <= host.total, "{host:?}");
        assert_eq!(HostMemory::parse("MemTotal: 1 kB\n"), None);
    }
}
