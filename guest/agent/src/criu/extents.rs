//! Locates the bytes of files on their disk.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;

use machinen_protocol::api::{Extent, ImageFile};

use super::{CriuError, pagemap::Merged};
use crate::sys::{self, FileExtent};

/// More pieces than a file of this size has on an empty disk, but few enough for a message to the host.
const MAX_PIECES: usize = 1 << 16;

/// Locates a part of a file for the host, which reads it from the disk. Writes that part back first.
///
/// # Errors
/// Those of writing and of reading the file's map; the part has too many pieces.
pub(super) fn locate(name: &str, path: &Path, bytes: Range<u64>) -> Result<ImageFile, CriuError> {
    let failed = |source| CriuError::File { what: "locate", path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    let bytes = bytes.start..bytes.end.min(size);
    let mut extents = Vec::new();
    // A length of 0 would mean the whole file.
    if !bytes.is_empty() {
        sys::write_back(file.as_fd(), bytes.start, bytes.end - bytes.start).map_err(failed)?;
    }
    let mut from = bytes.start;
    while from < bytes.end {
        let found = sys::file_extents(file.as_fd(), from..bytes.end).map_err(failed)?;
        let Some(last) = found.last() else { break };
        from = last.logical + last.length;
        let ended = last.last;
        let pieces: Vec<_> =
            found.into_iter().filter(|extent| !extent.zero).map(|extent| piece(&extent, size)).collect();
        cut(&pieces, &bytes, bytes.start, &mut extents);
        if extents.len() > MAX_PIECES {
            return Err(CriuError::Pieces { name: name.to_owned() });
        }
        if ended {
            break;
        }
    }
    Ok(ImageFile { name: name.to_owned(), size, extents, located: bytes.end, ..Default::default() })
}

/// [`locate`] for a whole file.
pub(super) const WHOLE: Range<u64> = 0..u64::MAX;

/// Locates a file that is composed of pieces. A file of too many pieces is written as one.
///
/// # Errors
/// Those of [`locate`], and those of writing the file.
pub(super) fn locate_pieces(merged: &Merged) -> Result<ImageFile, CriuError> {
    let own = locate(&merged.name, &merged.own, WHOLE)?;
    let other = locate(&merged.name, &merged.other, WHOLE)?;
    let (mut extents, mut size) = (Vec::new(), 0);
    for piece in &merged.pieces {
        let of = if piece.of_parent { &other } else { &own };
        cut(&of.extents, &piece.bytes, size, &mut extents);
        size += piece.bytes.end - piece.bytes.start;
    }
    if extents.len() <= MAX_PIECES {
        let name = merged.name.clone();
        return Ok(ImageFile { name, size, extents, located: size, ..Default::default() });
    }
    // In the directory of the earlier dump, so that it is not taken for an image.
    let whole = merged.other.with_extension("whole");
    put_together(merged, &whole).map_err(|source| CriuError::File {
        what: "write",
        path: whole.clone(),
        source,
    })?;
    locate(&merged.name, &whole, WHOLE)
}

/// Selects the extents within `bytes` of their file, which are at `at` in another file.
fn cut(extents: &[Extent], bytes: &Range<u64>, at: u64, into: &mut Vec<Extent>) {
    let after = extents.partition_point(|extent| extent.logical + extent.length <= bytes.start);
    for extent in extents[after..].iter().take_while(|extent| extent.logical < bytes.end) {
        let start = extent.logical.max(bytes.start);
        let end = (extent.logical + extent.length).min(bytes.end);
        into.push(Extent {
            logical: at + (start - bytes.start),
            physical: extent.physical + (start - extent.logical),
            length: end - start,
            ..Default::default()
        });
    }
}

fn put_together(merged: &Merged, whole: &Path) -> io::Result<()> {
    let (mut own, mut other) = (File::open(&merged.own)?, File::open(&merged.other)?);
    let mut to = File::create(whole)?;
    for piece in &merged.pieces {
        let from = if piece.of_parent { &mut other } else { &mut own };
        from.seek(SeekFrom::Start(piece.bytes.start))?;
        io::copy(&mut from.take(piece.bytes.end - piece.bytes.start), &mut to)?;
    }
    to.sync_all()
}

/// Cuts the last block of a file at the end of the file.
fn piece(extent: &FileExtent, size: u64) -> Extent {
    let length = extent.length.min(size.saturating_sub(extent.logical));
    Extent { logical: extent.logical, physical: extent.physical, length, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(logical: u64, physical: u64, length: u64) -> Extent {
        Extent { logical, physical, length, ..Default::default() }
    }

    #[test]
    fn a_part_of_a_file_is_where_its_extents_are() {
        // A hole from 300 to 400.
        let file = [extent(0, 1000, 100), extent(100, 5000, 200), extent(400, 2000, 100)];
        let part = |bytes: Range<u64>| {
            let mut found = Vec::new();
            cut(&file, &bytes, 7000, &mut found);
            found
        };
        assert_eq!(part(0..500), [extent(7000, 1000, 100), extent(7100, 5000, 200), extent(7400, 2000, 100)]);
        assert_eq!(part(50..150), [extent(7000, 1050, 50), extent(7050, 5000, 50)]);
        assert_eq!(part(250..450), [extent(7000, 5150, 50), extent(7150, 2000, 50)]);
        assert_eq!(part(300..400), []);
    }

    #[test]
    fn a_file_is_put_together_from_two() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("own"), "abcdef").unwrap();
        std::fs::write(path("other"), "0123456789").unwrap();
        let piece = |of_parent, bytes| super::super::pagemap::Piece { of_parent, bytes };
        let pieces = vec![piece(false, 0..2), piece(true, 4..8), piece(false, 2..3), piece(true, 0..1)];
        let merged = Merged { name: "x".into(), own: path("own"), other: path("other"), pieces };
        put_together(&merged, &path("whole")).unwrap();
        assert_eq!(std::fs::read_to_string(path("whole")).unwrap(), "ab4567c0");
    }
}
