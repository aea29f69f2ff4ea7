//! Where the bytes of a file are on its disk.

use std::fs::File;
use std::os::fd::AsFd;

use machinen_protocol::api::{Extent, ImageFile};

use super::CriuError;
use crate::sys::{self, FileExtent};

/// More pieces than a file of this size on an empty disk has.
const MAX_PIECES: usize = 1 << 14;

/// What the host has to know of a file in order to read it from the disk.
///
/// # Errors
/// Those of reading the file's map; too many pieces.
pub(super) fn locate(name: String, file: &File) -> Result<ImageFile, CriuError> {
    let failed = |source| CriuError::File { what: "locate", path: name.clone().into(), source };
    let size = file.metadata().map_err(failed)?.len();
    let mut extents = Vec::new();
    let mut from = 0;
    while from < size {
        let found = sys::file_extents(file.as_fd(), from).map_err(failed)?;
        let Some(last) = found.last() else { break };
        from = last.logical + last.length;
        let ended = last.last;
        extents.extend(found.into_iter().filter(|extent| !extent.zero).map(|extent| piece(&extent, size)));
        if extents.len() > MAX_PIECES {
            return Err(CriuError::Pieces { name });
        }
        if ended {
            break;
        }
    }
    Ok(ImageFile { name, size, extents, ..Default::default() })
}

/// The last block of a file is the file's only as far as that goes.
fn piece(extent: &FileExtent, size: u64) -> Extent {
    let length = extent.length.min(size.saturating_sub(extent.logical));
    Extent { logical: extent.logical, physical: extent.physical, length, ..Default::default() }
}
