//! Copies, hashes and syncs images concurrently.

use std::{
    fs::File,
    io, mem,
    ops::Range,
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{self, Scope, ScopedJoinHandle},
};

use sha2::{Digest as _, Sha256};

use super::{CheckpointError, digest, manifest::ImageDigest};

/// Number of open copies that may wait for each worker.
const WAITING: usize = 32;

/// A range of an image that was copied to its file and may not be on stable storage yet.
#[derive(Debug, Clone)]
pub(super) struct CopiedRange {
    pub(super) file: Arc<File>,
    pub(super) path: Arc<Path>,
    pub(super) name: String,
    /// Size of the image.
    pub(super) size: u64,
    pub(super) bytes: Range<u64>,
}

impl CopiedRange {
    fn is_last(&self) -> bool {
        self.bytes.end == self.size
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> CheckpointError {
        CheckpointError::file("write", &*self.path)
    }
}

/// Runs `copy`, which passes on each range that it has copied, while worker threads hash and sync these
/// ranges. The callback returns false when a worker has failed, and `copy` ends then.
pub(super) fn run(
    copy: impl FnOnce(&mut dyn FnMut(CopiedRange) -> bool) -> Result<(), CheckpointError>,
) -> Result<Vec<ImageDigest>, CheckpointError> {
    thread::scope(|scope| {
        let ((wholes, to_wholes), (parts, to_parts), (synced, to_sync)) =
            (spawn(scope, hash_wholes), spawn(scope, hash_parts), spawn(scope, sync));
        let workers = [to_wholes, to_parts, to_sync];
        let copied = copy(&mut |copied| workers.iter().all(|worker| worker.send(copied.clone()).is_ok()));
        drop(workers);
        let no_panic = "the thread does not panic";
        let (wholes, parts, synced) =
            (wholes.join().expect(no_panic), parts.join().expect(no_panic), synced.join().expect(no_panic));
        copied.and(synced)?;
        let digests = wholes?.into_iter().zip(parts?);
        Ok(digests.map(|(whole, parts)| ImageDigest { parts, ..whole }).collect())
    })
}

type HashWorker<'scope, T> = (ScopedJoinHandle<'scope, T>, SyncSender<CopiedRange>);

fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce(Receiver<CopiedRange>) -> T + Send + 'scope,
) -> HashWorker<'scope, T> {
    let (sender, receiver) = sync_channel(WAITING);
    (scope.spawn(move || work(receiver)), sender)
}

fn hash_wholes(copied: Receiver<CopiedRange>) -> Result<Vec<ImageDigest>, CheckpointError> {
    let (mut digests, mut digest) = (Vec::new(), Sha256::new());
    for copy in copied {
        digest::update(&mut digest, &copy.file, copy.bytes.clone()).map_err(copy.failed())?;
        if copy.is_last() {
            let sha256 = digest::hexadecimal(mem::take(&mut digest));
            digests.push(ImageDigest { name: copy.name, size: copy.size, sha256, parts: Vec::new() });
        }
    }
    Ok(digests)
}

/// The parts' digests of each image; none for an image of a single part.
fn hash_parts(copied: Receiver<CopiedRange>) -> Result<Vec<Vec<String>>, CheckpointError> {
    let (mut all, mut parts) = (Vec::new(), Vec::new());
    for copy in copied {
        if copy.size > digest::PART {
            parts.extend(digest::of_parts(&copy.file, copy.bytes.clone()).map_err(copy.failed())?);
        }
        if copy.is_last() {
            all.push(mem::take(&mut parts));
        }
    }
    Ok(all)
}

fn sync(copied: Receiver<CopiedRange>) -> Result<(), CheckpointError> {
    copied
        .into_iter()
        .filter(CopiedRange::is_last)
        .try_for_each(|copy| copy.file.sync_all().map_err(copy.failed()))
}
