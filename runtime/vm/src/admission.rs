//! Decides whether this host has memory for one more VM, before the host's kernel has to kill processes.
//!
//! A VM takes its memory page by page while it starts, so twenty VMs that start at once would all find enough
//! free memory. Each start therefore reserves its memory: it writes the amount to a file that it keeps locked
//! until the VM has started, and later starts subtract all such amounts. A file that is not locked belongs to
//! a process that was killed.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::{FileError, create_private_dirs, lock, try_lock_shared},
};

/// What a clone takes of the host's memory until its container runs, MiB: its own pages.
pub const CLONE_NEEDS_MIB: u64 = 64;

const MEMINFO: &str = "/proc/meminfo";

/// Why no VM may start.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    /// The host has too little memory. All amounts are in MiB.
    #[error(
        "not enough memory on this host for one more VM: it needs about {needed} MiB, and {available} MiB are available of \
         which {reserve} MiB are kept free (vm.memory_reserve_percent) and {reserved} MiB are for VMs that are starting; end \
         a container or add memory"
    )]
    Memory {
        /// What the VM is expected to take.
        needed: u64,
        /// What the kernel of the host reports as available.
        available: u64,
        /// What the configuration keeps free (`vm.memory_reserve_percent`).
        reserve: u64,
        /// What VMs that are starting have reserved.
        reserved: u64,
    },
    /// The reservations or the state of the memory cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
}

impl HasKind for AdmissionError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Memory { .. } => ErrorKind::ResourceExhausted,
            Self::File(_) => ErrorKind::Internal,
        }
    }
}

/// The host's memory, MiB (proc_meminfo(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// All memory (`MemTotal`).
    pub total: u64,
    /// Memory that can be had without swapping (`MemAvailable`).
    pub available: u64,
}

impl HostMemory {
    /// Reads /proc/meminfo.
    ///
    /// # Errors
    /// /proc/meminfo cannot be read.
    pub fn now() -> Result<Self, AdmissionError> {
        let text = fs::read_to_string(MEMINFO).map_err(FileError::at("read", MEMINFO))?;
        let invalid = || FileError::new("read", MEMINFO, io::ErrorKind::InvalidData);
        Ok(Self::parse(&text).ok_or_else(invalid)?)
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib >> 10)
        };
        Some(Self { total: field("MemTotal:")?, available: field("MemAvailable:")? })
    }
}

/// Memory that is reserved for a VM that is starting. Dropped when the VM has taken it.
#[derive(Debug)]
pub struct Reservation {
    path: PathBuf,
    _held: File,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), "cannot remove a file: {error}");
        }
    }
}

/// Reserves `needed` MiB for one more VM, in the directory `dir`, which is created if it is missing.
///
/// # Errors
/// The host has less available memory than `reserve_percent` of all, the existing reservations and `needed`
/// together.
pub fn admit(
    dir: &Path,
    needed: u64,
    reserve_percent: u64,
    host: HostMemory,
) -> Result<Reservation, AdmissionError> {
    create_private_dirs(dir).map_err(FileError::at("make the directory", dir))?;
    let guard = File::open(dir).map_err(FileError::at("open", dir))?;
    // Locked while the reservations are read and one is added.
    lock(&guard).map_err(FileError::at("lock", dir))?;
    let reserved = reserved(dir).map_err(FileError::at("read", dir))?;
    let reserve = host.total * reserve_percent / 100;
    if reserve_percent > 0 && host.available < reserve + reserved + needed {
        return Err(AdmissionError::Memory { needed, available: host.available, reserve, reserved });
    }
    let file = tempfile::Builder::new().prefix("vm-").tempfile_in(dir);
    let file = file.map_err(FileError::at("write in", dir))?;
    let (mut held, path) = file.keep().map_err(|error| FileError::new("write in", dir, error.error))?;
    let locked = held.try_lock().map_err(io::Error::from);
    locked.and_then(|()| write!(held, "{needed}")).map_err(FileError::at("write", &path))?;
    Ok(Reservation { path, _held: held })
}

/// Returns the sum of all reservations, and removes those of processes that were killed.
fn reserved(dir: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let Ok(file) = File::open(&path) else { continue };
        if try_lock_shared(&file)? {
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
    fn concurrent_starts_share_the_available_memory() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("starting");
        let reservations: Vec<_> = (0..3).map(|_| admit(&dir, 300, 1, HOST).unwrap()).collect();
        let error = admit(&dir, 300, 1, HOST).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("needs about 300 MiB, and 1000 MiB") && text.contains("100 MiB are kept"),
            "{text}"
        );
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        drop(reservations);
        drop(admit(&dir, 300, 1, HOST).unwrap());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }

    #[test]
    fn a_reservation_of_a_killed_process_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("vm-killed"), "900").unwrap();
        let reservation = admit(dir.path(), 800, 1, HOST).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        drop(reservation);
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
