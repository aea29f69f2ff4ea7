//! A disk in a file that the caller provides and that has the whole root file system, as the blockfile
//! snapshotter mounts it. The disk is the snapshot: machinen neither creates, exports nor removes it.

use std::{fs::File, path::Path};

use machinen_base::fs::FileError;

/// Opens the disk as the VM gets it.
pub(super) fn open(path: &Path, read_only: bool) -> Result<File, FileError> {
    File::options().read(true).write(!read_only).open(path).map_err(FileError::at("open", path))
}
