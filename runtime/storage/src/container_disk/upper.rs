//! The upper directory of an overlay, which receives a container's changes and may have some already.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use machinen_base::fs::FileError;

/// Permissions that containerd's overlayfs snapshotter gives a new upper directory. An empty directory with
/// other permissions has been written to.
const FRESH_MODE: u32 = 0o755;

/// Whether the directory has changes that a new disk must start with.
pub(super) fn was_written(upper: &Path) -> Result<bool, FileError> {
    let metadata = fs::metadata(upper).map_err(FileError::at("look at", upper))?;
    let mode = metadata.permissions().mode() & 0o7777;
    let mut entries = fs::read_dir(upper).map_err(FileError::at("list", upper))?;
    Ok(mode != FRESH_MODE || entries.next().is_some())
}
