//! Writable disks that start with what an archive of a container's changes has.

use std::{fs::File, io::Read, path::Path};

use super::{ContainerDiskError, ContainerDiskOptions, seed};
use crate::{
    layer::{self, LayerLimits, StagingDir},
    rootdisk::RootdiskCache,
};

/// The name in the cache's directory next to which archives are unpacked. No file has it.
const PLACE: &str = "archived";

/// Makes a disk in an unnamed file in the cache's directory, whose directory `upper` has what the archive has (the format of
/// `machinen_protocol::layer`). The archive may come from anybody. Blocks.
///
/// # Errors
/// No agent would have made the archive, or it has more than `entries` files or does not fit; no space or no mke2fs.
pub fn from_archive(
    archive: impl Read + Send,
    options: &ContainerDiskOptions,
    entries: u64,
) -> Result<File, ContainerDiskError> {
    let cache = RootdiskCache::open(&options.cache)?;
    let place = cache.dir().join(PLACE);
    sweep_archives(cache.dir())?;
    let staging = StagingDir::next_to(&place)?;
    let limits = LayerLimits { entries, bytes: options.size, reserve: options.reserve };
    layer::apply_confined(archive, staging.fresh(), None, limits)?;
    seed::unnamed(&staging.fresh_path(), options)
}

/// Removes what killed processes have unpacked in a cache's directory.
///
/// # Errors
/// The directory cannot be listed.
pub fn sweep_archives(cache: &Path) -> Result<(), ContainerDiskError> {
    Ok(layer::sweep(&cache.join(PLACE))?)
}
