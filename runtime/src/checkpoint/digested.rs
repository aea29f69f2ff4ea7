//! Images that are copied, read for their digests and brought to the medium, all at the same time.

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

/// Copies that are open and wait for their digests.
const WAITING: usize = 32;

/// Some bytes of an image that are in their file, and not on the medium yet.
#[derive(Debug, Clone)]
pub(super) struct Copied {
    pub(super) file: Arc<File>,
    pub(super) path: Arc<Path>,
    pub(super) name: String,
    /// Of the image.
    pub(super) size: u64,
    pub(super) bytes: Range<u64>,
}

impl Copied {
    fn is_last(&self) -> bool {
        self.bytes.end == self.size
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> CheckpointError {
        CheckpointError::file("write", &*self.path)
    }
}

/// Has images copied by `copy`, which passes on what it has copied, while others read that for its digests and bring it to the
/// medium. `copy` ends when it is told that nobody goes on.
pub(super) fn digested(
    copy: impl FnOnce(&mut dyn FnMut(Copied) -> bool) -> Result<(), CheckpointError>,
) -> Result<Vec<ImageDigest>, CheckpointError> {
    thread::scope(|scope| {
        let ((wholes, to_whole), (parts, to_parts), (synced, to_sync)) =
            (with_input(scope, wholes), with_input(scope, parts), with_input(scope, synced));
        let workers = [to_whole, to_parts, to_sync];
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

type Worker<'scope, T> = (ScopedJoinHandle<'scope, T>, SyncSender<Copied>);

fn with_input<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce(Receiver<Copied>) -> T + Send + 'scope,
) -> Worker<'scope, T> {
    let (sender, receiver) = sync_channel(WAITING);
    (scope.spawn(move || work(receiver)), sender)
}

fn wholes(copied: Receiver<Copied>) -> Result<Vec<ImageDigest>, CheckpointError> {
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

/// Those of each image that has more than one.
fn parts(copied: Receiver<Copied>) -> Result<Vec<Vec<String>>, CheckpointError> {
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

fn synced(copied: Receiver<Copied>) -> Result<(), CheckpointError> {
    copied
        .into_iter()
        .filter(Copied::is_last)
        .try_for_each(|copy| copy.file.sync_all().map_err(copy.failed()))
}
