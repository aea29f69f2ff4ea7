//! Which files' data the guest's kernel may keep from one open(2) to the next.
//!
//! ```text
//!   OPEN: the state differs from the known one ──> the kernel drops its data      the state is noted with the handle
//!   READ or RELEASE of that handle ──> the data was dropped; what the kernel has since is of that state or newer
//!   OPEN: the state is the known one ──> the kernel keeps its data
//! ```
//! The kernel answers nothing to an open(2), so a state counts only when a later request shows that the data was
//! dropped: else a second open(2) at the same time could keep what the first is about to drop.
//!
//! A state is trusted only if a change after it is certain to show in the file's times:
//!
//! - The file has not changed for [`SETTLED`], which is more than the resolution of any file system's clock.
//! - No process has the file open for writing, so none has a writable mapping: a page that was written to through one
//!   is written to again without a new time until it is on the disk. A lease (fcntl(2)) is granted only then.
//! - The file system is one whose kernel code notices the first write to each clean page of a mapping
//!   (`page_mkwrite`). tmpfs does not, and with network file systems another host may write.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use machinen_base::sys::take_read_lease;
use rustix::fs::{fstat, fstatfs};

/// FAT has times of two seconds, ext4 with small inodes of one.
const SETTLED: Duration = Duration::from_millis(2500);
/// Files whose state is known at once. This bounds the memory: some 100 bytes each.
const MAX_KNOWN: usize = 64 << 10;

// linux/magic.h
const EXT: i64 = 0xef53;
const XFS: i64 = 0x5846_5342;
const BTRFS: i64 = 0x9123_683e;
const F2FS: i64 = 0xf2f5_2010;
const TMPFS: i64 = 0x0102_1994;
const OVERLAY: i64 = 0x794c_7630;

/// What tells that a file's content has not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileState {
    pub(super) size: i64,
    /// Seconds and nanoseconds.
    pub(super) modified: (i64, i64),
    pub(super) changed: (i64, i64),
}

impl FileState {
    pub(super) fn of(attributes: &libc::stat64) -> Self {
        Self {
            size: attributes.st_size,
            modified: (attributes.st_mtime, attributes.st_mtime_nsec),
            changed: (attributes.st_ctime, attributes.st_ctime_nsec),
        }
    }

    /// Whether the file has not changed for [`SETTLED`]; not if the clock was set back since its last change.
    fn is_settled(&self, now: SystemTime) -> bool {
        let (seconds, nanoseconds) = self.changed;
        let parts = u64::try_from(seconds).ok().zip(u32::try_from(nanoseconds).ok());
        parts.is_some_and(|(seconds, nanoseconds)| {
            let changed = UNIX_EPOCH + Duration::new(seconds, nanoseconds);
            now.duration_since(changed).is_ok_and(|age| age > SETTLED)
        })
    }
}

/// What the guest's kernel may have in its cache.
#[derive(Debug, Default)]
pub(super) struct KeptData {
    table: Mutex<KeptTable>,
}

#[derive(Debug, Default)]
struct KeptTable {
    /// By node: all that the guest has of the file is of this state or newer.
    known: HashMap<u64, FileState>,
    /// By handle: the node, and what its state was when the guest was told to drop its data.
    dropping: HashMap<u64, (u64, FileState)>,
}

impl KeptData {
    /// Whether what the guest has of a file that is being opened is of this state.
    pub(super) fn is_current(&self, node: u64, state: &FileState) -> bool {
        self.table().known.get(&node) == Some(state)
    }

    /// The guest is told to drop what it has of a file, with the reply to an open(2). The state is a trusted one.
    pub(super) fn drops(&self, node: u64, handle: u64, state: FileState) {
        self.table().dropping.insert(handle, (node, state));
    }

    /// The guest reads from a handle or releases it, so its kernel has had the reply to the open(2).
    pub(super) fn has_dropped(&self, handle: u64) {
        let mut table = self.table();
        let Some((node, state)) = table.dropping.remove(&handle) else { return };
        if table.known.len() >= MAX_KNOWN {
            // Every file is read once more.
            table.known.clear();
        }
        table.known.insert(node, state);
    }

    fn table(&self) -> MutexGuard<'_, KeptTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state of a file, if any later change is certain to show in it: `file` is open for reading only.
///
/// # Errors
/// The file system does not answer.
pub(super) fn trusted_state(file: &OwnedFd) -> io::Result<Option<FileState>> {
    // The lease ends with the descriptor. A process that opens the file for writing meanwhile waits for that.
    if !notices_mapped_writes(fstatfs(file)?.f_type) || !take_read_lease(file.as_fd())? {
        return Ok(None);
    }
    let found = fstat(file)?;
    let time = |seconds, nanoseconds: u64| (seconds, nanoseconds.cast_signed());
    let state = FileState {
        size: found.st_size,
        modified: time(found.st_mtime, found.st_mtime_nsec),
        changed: time(found.st_ctime, found.st_ctime_nsec),
    };
    Ok(state.is_settled(SystemTime::now()).then_some(state))
}

/// Whether the times of a file change with the first write to a clean page of a mapping.
fn notices_mapped_writes(file_system: i64) -> bool {
    [EXT, XFS, BTRFS, F2FS].contains(&file_system)
}

/// Whether close(2) has nothing to do on a file system of the host, and so no error: all writes have reached it.
pub(super) fn closes_without_work(file_system: i64) -> bool {
    notices_mapped_writes(file_system) || [TMPFS, OVERLAY].contains(&file_system)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(changed: i64) -> FileState {
        FileState { size: 1, modified: (changed, 0), changed: (changed, 5) }
    }

    #[test]
    fn data_is_kept_when_the_guest_is_known_to_have_dropped_what_was_before() {
        let kept = KeptData::default();
        kept.drops(7, 1, state(10));
        assert!(!kept.is_current(7, &state(10)), "the reply may not have arrived");
        kept.has_dropped(2);
        assert!(!kept.is_current(7, &state(10)), "another handle");
        kept.has_dropped(1);
        assert!(kept.is_current(7, &state(10)));
        assert!(!kept.is_current(7, &state(11)) && !kept.is_current(8, &state(10)));
    }

    #[test]
    fn what_is_known_is_bounded() {
        let kept = KeptData::default();
        for number in 0..=MAX_KNOWN as u64 {
            kept.drops(number, number, state(10));
            kept.has_dropped(number);
        }
        let table = kept.table();
        assert!(table.known.len() <= MAX_KNOWN && table.dropping.is_empty());
    }

    #[test]
    fn a_fresh_change_and_one_of_the_future_are_not_trusted() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert!(state(10).is_settled(at(13)));
        assert!(!state(10).is_settled(at(12)) && !state(10).is_settled(at(9)));
    }
}
