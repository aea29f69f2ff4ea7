//! CRIU's lists of saved pages (`pagemap-*.img`, criu's images/pagemap.proto), and the conversion of a list
//! that refers to an earlier dump into a complete one.
//!
//! A checkpoint is a flat directory, in which CRIU finds no earlier dump. So each list that refers to pages
//! of the earlier dump is rewritten, and its file of pages is composed of pieces of both files, without
//! copying them.

use std::{
    fs, io,
    ops::Range,
    path::{Path, PathBuf},
};

use protobuf::{CodedInputStream, CodedOutputStream, rt::WireType};

use super::{
    CriuError,
    image::{self, MAGIC},
};

/// Page size of x86-64.
const PAGE: u64 = 4096;

/// Flags of an entry, which say where the pages are.
const IN_PARENT: u32 = 1;
const PRESENT: u32 = 4;

/// The list of pages of a process, or of shared memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pagemap {
    magic: [u8; MAGIC],
    /// The pages are in `pages-ID.img`, in the order of the entries.
    pages_id: u32,
    entries: Vec<PageRange>,
}

/// Consecutive pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PageRange {
    address: u64,
    pages: u64,
    flags: u32,
}

/// The source of a part of a file of pages, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) of_parent: bool,
    pub(super) bytes: Range<u64>,
}

impl Pagemap {
    /// Reads a list.
    ///
    /// # Errors
    /// The file cannot be read, or is not such a list.
    pub(super) fn read(path: &Path) -> Result<Self, CriuError> {
        let failed = |source| CriuError::File { what: "read", path: path.to_owned(), source };
        let bytes = fs::read(path).map_err(failed)?;
        Self::parse(&bytes).map_err(failed)
    }

    /// Writes the list.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn write(&self, path: &Path) -> Result<(), CriuError> {
        let written = self.bytes().and_then(|bytes| fs::write(path, bytes));
        written.map_err(|source| CriuError::File { what: "write", path: path.to_owned(), source })
    }

    pub(super) fn refers_to_parent(&self) -> bool {
        self.entries.iter().any(|entry| entry.flags & IN_PARENT != 0)
    }

    /// Name of the file with the pages.
    pub(super) fn pages_name(&self) -> String {
        format!("pages-{}.img", self.pages_id)
    }

    /// Converts the list so that all of its pages are in its own file of pages, and returns the pieces of
    /// that file.
    ///
    /// # Errors
    /// `parent` lacks a page to which the list refers.
    pub(super) fn completed_by(&self, parent: &Self) -> Result<(Self, Vec<Piece>), CriuError> {
        let (mut entries, mut pieces) = (Vec::new(), Vec::<Piece>::new());
        let mut place = |of_parent: bool, bytes: Range<u64>| match pieces.last_mut() {
            Some(last) if last.of_parent == of_parent && last.bytes.end == bytes.start => {
                last.bytes.end = bytes.end;
            }
            _ => pieces.push(Piece { of_parent, bytes }),
        };
        let mut own = 0;
        for entry in &self.entries {
            if entry.flags & IN_PARENT != 0 {
                for bytes in parent.places(*entry)? {
                    place(true, bytes);
                }
                entries.push(PageRange { flags: entry.flags & !IN_PARENT | PRESENT, ..*entry });
                continue;
            }
            if entry.flags & PRESENT != 0 {
                place(false, own..own + entry.pages * PAGE);
                own += entry.pages * PAGE;
            }
            entries.push(*entry);
        }
        Ok((Self { entries, ..*self }, pieces))
    }

    /// The places of an entry's pages in this list's file; the pages may be in several entries of this list.
    fn places(&self, wanted: PageRange) -> Result<Vec<Range<u64>>, CriuError> {
        let (mut found, mut next, end) = (Vec::new(), wanted.address, wanted.end());
        let mut offset = 0;
        for entry in self.entries.iter().filter(|entry| entry.flags & PRESENT != 0) {
            if next < end && (entry.address..entry.end()).contains(&next) {
                let until = end.min(entry.end());
                let from = offset + (next - entry.address);
                found.push(from..from + (until - next));
                next = until;
            }
            offset += entry.pages * PAGE;
        }
        if next < end { Err(CriuError::Missing { address: next }) } else { Ok(found) }
    }

    fn parse(bytes: &[u8]) -> io::Result<Self> {
        let (magic, messages) = image::split(bytes)?;
        let (head, rest) = messages.split_first().ok_or(io::ErrorKind::UnexpectedEof)?;
        let pages_id = u32::try_from(fields(head)?[1]).map_err(io::Error::other)?;
        let mut entries = Vec::new();
        for message in rest {
            let [_, address, pages, in_parent, flags] = fields(message)?;
            let flags = match (in_parent, u32::try_from(flags).map_err(io::Error::other)?) {
                (0, flags) => flags,
                (_, flags) => flags | IN_PARENT,
            };
            if pages.checked_mul(PAGE).and_then(|bytes| address.checked_add(bytes)).is_none() {
                return Err(io::Error::other(format!("{pages} pages at {address:#x} are too many")));
            }
            entries.push(PageRange { address, pages, flags });
        }
        Ok(Self { magic, pages_id, entries })
    }

    fn bytes(&self) -> io::Result<Vec<u8>> {
        let mut bytes = self.magic.to_vec();
        let mut add = |values: &[(u32, u64)]| -> io::Result<()> {
            let mut message = Vec::new();
            let mut stream = CodedOutputStream::vec(&mut message);
            for (field, value) in values {
                stream.write_uint64(*field, *value)?;
            }
            stream.flush()?;
            drop(stream);
            image::append(&mut bytes, &message)
        };
        add(&[(1, self.pages_id.into())])?;
        for PageRange { address, pages, flags } in &self.entries {
            add(&[(1, *address), (2, *pages), (4, (*flags).into())])?;
        }
        Ok(bytes)
    }
}

impl PageRange {
    fn end(self) -> u64 {
        self.address + self.pages * PAGE
    }
}

/// The values of fields 1 to 4 of a message that has only numbers; 0 for a missing field.
fn fields(message: &[u8]) -> io::Result<[u64; 5]> {
    let mut values = [0; 5];
    let mut stream = CodedInputStream::from_bytes(message);
    while let Some(tag) = stream.read_raw_tag_or_eof()? {
        let (field, kind) = (tag >> 3, WireType::new(tag & 7));
        match (usize::try_from(field).ok().and_then(|field| values.get_mut(field)), kind) {
            (Some(value), Some(WireType::Varint)) => *value = stream.read_uint64()?,
            // The format is another than the one this code knows.
            _ => return Err(io::Error::other(format!("the field {field} is not known"))),
        }
    }
    Ok(values)
}

/// Rewrites the lists in `images` that refer to the dump in `parent`. For each, returns the file of pages,
/// the file in `parent` with the other pages, and the pieces of which the new file consists.
///
/// # Errors
/// A list cannot be read or written, or does not fit the earlier dump.
pub(super) fn merge(images: &Path, parent: &Path) -> Result<Vec<Merged>, CriuError> {
    let failed = |source| CriuError::File { what: "read", path: images.to_owned(), source };
    let mut merged = Vec::new();
    for entry in fs::read_dir(images).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let Some(name) = path.file_name().filter(|name| name.as_encoded_bytes().starts_with(b"pagemap-"))
        else {
            continue;
        };
        let list = Pagemap::read(&path)?;
        if !list.refers_to_parent() {
            continue;
        }
        let before = Pagemap::read(&parent.join(name))?;
        let (alone, pieces) = list.completed_by(&before)?;
        alone.write(&path)?;
        merged.push(Merged {
            name: list.pages_name(),
            own: images.join(list.pages_name()),
            other: parent.join(before.pages_name()),
            pieces,
        });
    }
    Ok(merged)
}

/// A file of pages that is composed of pieces.
#[derive(Debug)]
pub(super) struct Merged {
    pub(super) name: String,
    pub(super) own: PathBuf,
    /// The file of the earlier dump.
    pub(super) other: PathBuf,
    pub(super) pieces: Vec<Piece>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAGICS: [u8; MAGIC] = [0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56];

    fn list(pages_id: u32, entries: &[(u64, u64, u32)]) -> Pagemap {
        let entries =
            entries.iter().map(|&(page, pages, flags)| PageRange { address: page * PAGE, pages, flags });
        Pagemap { magic: MAGICS, pages_id, entries: entries.collect() }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let list = list(3, &[(16, 4, PRESENT), (1 << 35, 1, IN_PARENT), ((1 << 35) + 1, 9, 2 | PRESENT)]);
        let bytes = list.bytes().unwrap();
        assert_eq!(Pagemap::parse(&bytes).unwrap(), list);
        // A vaddr of two bytes: length, then fields 1, 2, 4.
        let one = self::list(1, &[(1, 2, PRESENT)]).bytes().unwrap();
        assert_eq!(one[MAGIC..], [2, 0, 0, 0, 8, 1, 7, 0, 0, 0, 8, 0x80, 0x20, 16, 2, 32, 4]);
        for length in [0, 7, 9, bytes.len() - 1] {
            assert!(Pagemap::parse(&bytes[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn a_list_of_another_kind_is_refused() {
        let mut bytes = list(1, &[]).bytes().unwrap();
        bytes.extend([2, 0, 0, 0, 0x28, 1]);
        assert!(Pagemap::parse(&bytes).is_err());
        bytes.truncate(bytes.len() - 6);
        // As many pages as no address space has.
        bytes.extend([13, 0, 0, 0, 8, 1, 16, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]);
        assert!(Pagemap::parse(&bytes).is_err());
    }

    #[test]
    fn pages_come_from_where_they_are() {
        let parent = list(7, &[(10, 4, PRESENT), (14, 2, PRESENT), (40, 8, PRESENT)]);
        let child = list(
            2,
            &[
                (8, 1, PRESENT),
                (12, 3, IN_PARENT),
                (15, 1, PRESENT),
                (42, 2, IN_PARENT),
                (44, 1, 2 | PRESENT),
            ],
        );
        assert!(child.refers_to_parent() && !parent.refers_to_parent());
        let (alone, pieces) = child.completed_by(&parent).unwrap();
        assert_eq!(
            alone,
            list(
                2,
                &[
                    (8, 1, PRESENT),
                    (12, 3, PRESENT),
                    (15, 1, PRESENT),
                    (42, 2, PRESENT),
                    (44, 1, 2 | PRESENT)
                ]
            )
        );
        let piece =
            |of_parent, pages: Range<u64>| Piece { of_parent, bytes: pages.start * PAGE..pages.end * PAGE };
        assert_eq!(
            pieces,
            [
                piece(false, 0..1),
                piece(true, 2..5),
                piece(false, 1..2),
                piece(true, 8..10),
                piece(false, 2..3)
            ]
        );
        for missing in [(9, 1, IN_PARENT), (15, 2, IN_PARENT), (47, 2, IN_PARENT)] {
            assert!(list(2, &[missing]).completed_by(&parent).is_err(), "{missing:?}");
        }
    }
}
