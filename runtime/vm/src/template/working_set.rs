//! The pages of a template's memory that each clone writes to before a container's program runs.
//!
//! They are recorded from the first clone, when its first container has been created, and copied ahead in every later one while
//! QEMU loads the devices: a fault of its own for each page costs several times as much, in the guest's KVM above all. Nothing of a
//! user's has run when they are recorded. A record that is missing or damaged only makes clones slower.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use machinen_base::{
    fs::if_exists,
    process::{PageRange, copied_pages, copy_ahead},
};
use tokio::task::{JoinHandle, spawn_blocking};

/// Pages that are not written to are copied as well if they are no more than this between others: each call costs as much as some
/// pages.
const GAP: u64 = 8;
/// A clone gets no more memory ahead of time than this, in pages of 4096 bytes (64 MiB).
const MAX_PAGES: u64 = 16 << 10;
/// The longest record that is read, bytes.
const MAX_RECORD: u64 = 1 << 20;

/// What is known of one template.
#[derive(Debug)]
pub(crate) struct WorkingSet {
    path: PathBuf,
    /// The number under which QEMU has opened the memory.
    memory_fd: i32,
    ranges: Vec<PageRange>,
    recorded: AtomicBool,
}

impl WorkingSet {
    /// Reads the record at `path`, if there is one.
    pub(super) fn read(path: PathBuf, memory_fd: i32) -> Self {
        let ranges = read(&path).unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), "the record of what clones write to is ignored: {error}");
            None
        });
        let recorded = AtomicBool::new(ranges.is_some());
        Self { path, memory_fd, ranges: ranges.unwrap_or_default(), recorded }
    }

    /// Copies the recorded pages in the clone whose QEMU is `pid`, on a thread of its own.
    pub(crate) fn copy_ahead(self: &std::sync::Arc<Self>, pid: u32) -> Option<JoinHandle<()>> {
        let this = std::sync::Arc::clone(self);
        let copy = move || match copy_ahead(pid, this.memory_fd, &this.ranges) {
            Ok(()) => tracing::debug!(pid, pages = pages(&this.ranges), "memory was copied ahead"),
            Err(error) => tracing::debug!(pid, "memory was not copied ahead: {error}"),
        };
        (!self.ranges.is_empty()).then(|| spawn_blocking(copy))
    }

    /// Records what the clone whose QEMU is `pid` has written to, unless there is a record. Blocks.
    ///
    /// # Errors
    /// The memory of QEMU cannot be looked at, or the record not be written.
    pub(crate) fn record(&self, pid: u32) -> io::Result<()> {
        if self.recorded.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let ranges = bounded(copied_pages(pid, self.memory_fd, GAP)?);
        tracing::debug!(
            pid,
            pages = pages(&ranges),
            ranges = ranges.len(),
            "what clones write to is recorded"
        );
        // Clones may be recorded at the same time, so each record appears as a whole.
        let new = self.path.with_extension(format!("pages.{}", std::process::id()));
        let written = write(&new, &ranges).and_then(|()| fs::rename(&new, &self.path));
        if written.is_err() {
            // The first error is the one to report.
            let _ = fs::remove_file(&new);
        }
        written
    }
}

fn read(path: &Path) -> io::Result<Option<Vec<PageRange>>> {
    let Some(file) = if_exists(File::open(path))? else { return Ok(None) };
    if file.metadata()?.size() > MAX_RECORD {
        return Err(io::Error::other("it is too long"));
    }
    let mut text = Vec::new();
    file.take(MAX_RECORD).read_to_end(&mut text)?;
    Ok(Some(bounded(serde_json::from_slice(&text)?)))
}

fn write(path: &Path, ranges: &[PageRange]) -> io::Result<()> {
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(&serde_json::to_vec(ranges)?)
}

fn pages(ranges: &[PageRange]) -> u64 {
    ranges.iter().map(|range| range.count).sum()
}

/// The first ranges, as many as a clone may have.
fn bounded(mut ranges: Vec<PageRange>) -> Vec<PageRange> {
    let mut left = MAX_PAGES;
    ranges.retain(|range| {
        let fits = range.count <= left;
        left -= if fits { range.count } else { 0 };
        fits
    });
    ranges
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_record_is_bounded_and_may_be_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pages");
        let set = || WorkingSet::read(path.clone(), 9);
        assert!(set().ranges.is_empty() && !set().recorded.into_inner());
        let range = |first, count| PageRange { first, count };
        write(&path, &[range(3, 5), range(100, MAX_PAGES), range(1 << 40, 7), range(9, u64::MAX)]).unwrap();
        assert_eq!(set().ranges, [range(3, 5), range(1 << 40, 7)]);
        assert!(set().recorded.into_inner());
        for damaged in [&b"{"[..], b"[{\"first\":-1,\"count\":2}]", &vec![b'['; (MAX_RECORD + 1) as usize]] {
            fs::write(&path, damaged).unwrap();
            assert!(set().ranges.is_empty() && !set().recorded.into_inner());
        }
    }

    #[tokio::test]
    async fn a_process_that_has_gone_is_no_error_of_a_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pages");
        write(&path, &[PageRange { first: 1, count: 1 }]).unwrap();
        let set = Arc::new(WorkingSet::read(path, 9));
        set.copy_ahead(0x7fff_ffff).unwrap().await.unwrap();
    }
}
