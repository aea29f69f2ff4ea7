//! Copy mounts: a container gets a copy of a directory of the host, and what it writes there never reaches the host.
//!
//! ```text
//!   directory ──> base disk in the cache, by the digest of its content, shared and read-only
//!                 + a disk without a name: empty, or with what a checkpoint has ──> overlay in the guest
//! ```
//! The second disk is gone with its last descriptor, so nothing has to be removed when the container or this process
//! ends.

use std::{fs::File, io, os::unix::fs::MetadataExt as _, path::PathBuf};

use machinen_base::error::{ErrorKind, HasKind};
use machinen_storage::{
    container_disk::{from_archive, scratch},
    rootdisk::{Rootdisk, RootdiskCache, RootdiskProgress, RootfsSource},
};
use tokio::task::spawn_blocking;

use super::{PodError, create::CreatePlan, restore::RestorePlan};
use crate::{
    checkpoint::ManifestCopy,
    config::{RootdiskConfig, copies::CopyMount},
};

/// Why a directory cannot be copied.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {}, the source of the copy mount {}", path.display(), destination.display())]
pub struct CopyError {
    /// The path on the host.
    path: PathBuf,
    /// The path in the container.
    destination: PathBuf,
    /// The cause.
    source: io::Error,
}

impl HasKind for CopyError {
    fn kind(&self) -> ErrorKind {
        match self.source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::NotADirectory => ErrorKind::InvalidArgument,
            _ => ErrorKind::Internal,
        }
    }
}

/// A copy whose disks are open.
#[derive(Debug)]
pub(super) struct OpenCopy {
    /// The path in the container's configuration.
    pub(super) destination: PathBuf,
    pub(super) base: Rootdisk,
    pub(super) writable: File,
}

impl OpenCopy {
    /// What a checkpoint records.
    pub(super) fn recorded(&self) -> ManifestCopy {
        ManifestCopy { destination: self.destination.clone(), rootdisk: self.base.key.to_string() }
    }

    /// What the container has written takes no more than this, bytes.
    pub(super) fn written(&self) -> Result<u64, PodError> {
        Ok(self.writable.metadata().map_err(PodError::Descriptor)?.blocks() * 512)
    }
}

/// Checks what can be checked before anything is changed, and brings the copies into the order of the checkpoint. Blocks.
///
/// # Errors
/// A directory does not exist, or the checkpoint has other copies.
pub(super) fn plan(
    configured: &[CopyMount],
    restore: Option<&RestorePlan>,
) -> Result<Vec<CopyMount>, PodError> {
    match restore {
        // The base disks may be in the cache although the directories are gone.
        Some(restore) => restore.arrange_copies(configured),
        None => {
            configured.iter().try_for_each(check_source)?;
            Ok(configured.to_vec())
        }
    }
}

fn check_source(copy: &CopyMount) -> Result<(), CopyError> {
    let found = copy.source.metadata().and_then(|found| match found.is_dir() {
        true => Ok(()),
        false => Err(io::ErrorKind::NotADirectory.into()),
    });
    found.map_err(|source| CopyError {
        path: copy.source.clone(),
        destination: copy.destination.clone(),
        source,
    })
}

/// Opens the disks of all copies, and makes those that are missing.
///
/// # Errors
/// A directory cannot be read or changes meanwhile, a disk cannot be made, or the checkpoint is damaged.
pub(super) async fn open(plan: &CreatePlan, id: &str) -> Result<Vec<OpenCopy>, PodError> {
    if plan.copies.is_empty() {
        return Ok(Vec::new());
    }
    let (copies, restore) = (plan.copies.clone(), plan.restore.clone());
    let (config, id) = (plan.config.rootdisk.clone(), id.to_owned());
    let open = move || {
        let cache = RootdiskCache::open(&config.dir).map_err(PodError::Rootdisk)?;
        let open = |(number, copy): (usize, CopyMount)| {
            let base = base(&cache, &copy, restore.as_ref().map(|restore| (restore, number)), &config, &id)?;
            let options = config.copy_disks();
            let writable = match &restore {
                Some(restore) => {
                    from_archive(restore.open_written(number)?, &options, config.layer_max_entries)?
                }
                None => scratch(&options)?,
            };
            Ok(OpenCopy { destination: copy.destination, base, writable })
        };
        copies.into_iter().enumerate().map(open).collect()
    };
    spawn_blocking(open).await.map_err(PodError::Worker)?
}

/// The disk with the copied files.
fn base(
    cache: &RootdiskCache,
    copy: &CopyMount,
    restored: Option<(&RestorePlan, usize)>,
    config: &RootdiskConfig,
    id: &str,
) -> Result<Rootdisk, PodError> {
    if let Some((restore, number)) = restored
        && let Some(key) = restore.copy_base(number)
        && let Some(base) = cache.get(key).map_err(PodError::Rootdisk)?
    {
        return Ok(base);
    }
    check_source(copy)?;
    let source = RootfsSource::Dir(copy.source.clone());
    let mut log = |progress| match progress {
        RootdiskProgress::Hashed { .. } => tracing::debug!(id, "copy mount {copy}: {progress}"),
        _ => tracing::info!(id, "copy mount {copy}: {progress}"),
    };
    let base = cache.get_or_build(&source, &config.base_disks(), &mut log).map_err(PodError::Rootdisk)?;
    if let Some((restore, number)) = restored {
        restore.check_copy_base(number, base.key)?;
    }
    Ok(base)
}

#[cfg(test)]
mod tests {
    use machinen_base::error::chain;

    use super::*;

    #[test]
    fn only_directories_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let check = |name: &str| {
            check_source(&CopyMount { source: dir.path().join(name), destination: "/data".into() })
        };
        assert!(check("").is_ok());
        for (name, kind, words) in [
            ("file", ErrorKind::InvalidArgument, "file, the source of the copy mount /data: not a directory"),
            ("gone", ErrorKind::NotFound, "gone, the source of the copy mount /data: No such file"),
        ] {
            let error = check(name).unwrap_err();
            assert_eq!(error.kind(), kind);
            assert!(chain(&error).contains(words), "{}", chain(&error));
        }
    }
}
