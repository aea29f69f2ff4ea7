//! Parses and checks the headers of an archive. No file is accessed.

use std::{ffi::CString, io::Read};

use machinen_base::text::printable;
use machinen_protocol::layer::{
    self, BLOCK, FILE_TYPE, LINK, MAX_DEPTH, MAX_PATH, MAX_PIECES, MTIME, PATH, Records, SOCKET,
    SPARSE_MAJOR, SPARSE_MINOR, SPARSE_SIZE, XATTR,
};
use tar::{EntryType, Header};

/// Longest name of a file, bytes (limits.h, NAME_MAX).
const NAME_MAX: usize = 255;
/// Longest name of an attribute, bytes (xattr(7)).
const XATTR_NAME_MAX: usize = 255;
/// Longest target of a symbolic link, bytes (symlink(2)).
const TARGET_MAX: usize = 4095;

/// Offsets and lengths of the parts of a file that are not holes.
pub(super) type DataPieces = Vec<(u64, u64)>;

/// The names that lead to a file; none for the root.
pub(super) type Components = Vec<Vec<u8>>;

/// One entry, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ArchiveEntry {
    pub(super) path: Components,
    pub(super) node: EntryNode,
    /// Permissions with setuid, setgid and sticky bit.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds.
    pub(super) mtime: (i64, u32),
    pub(super) xattrs: Vec<(CString, Vec<u8>)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum EntryNode {
    Directory,
    /// The data follows.
    File,
    /// A map of pieces and the pieces follow; the number is the file's size.
    Sparse(u64),
    Symlink(CString),
    Link(Components),
    Fifo,
    Socket,
    Character(u32, u32),
    Block(u32, u32),
}

/// Whether the header begins an extended header, whose records belong to the next entry.
pub(super) fn is_extended(header: &Header) -> bool {
    header.entry_type() == EntryType::XHeader
}

/// Parses a header and the records that precede it.
///
/// # Errors
/// What is wrong, and the path as far as it is known.
pub(super) fn parse(
    header: &Header,
    size: u64,
    records: &[u8],
) -> Result<ArchiveEntry, (String, &'static str)> {
    let records = ExtendedRecords::parse(records).map_err(|what| (lossy(&header.path_bytes()), what))?;
    let path = records.path.unwrap_or(&header.path_bytes()).to_owned();
    entry(header, size, &path, records).map_err(|what| (lossy(&path), what))
}

fn entry(
    header: &Header,
    size: u64,
    path: &[u8],
    records: ExtendedRecords<'_>,
) -> Result<ArchiveEntry, &'static str> {
    let node = node(header, &records)?;
    if size != 0 && !matches!(node, EntryNode::File | EntryNode::Sparse(_)) {
        return Err("has data although it is not a regular file");
    }
    let number = |value: std::io::Result<u64>| {
        value.ok().and_then(|value| u32::try_from(value).ok()).ok_or("has an impossible owner")
    };
    let mtime = match records.mtime {
        Some(mtime) => mtime,
        None => {
            let seconds = header.mtime().ok().and_then(|seconds| i64::try_from(seconds).ok());
            (seconds.ok_or("has an impossible time")?, 0)
        }
    };
    Ok(ArchiveEntry {
        path: components(path)?,
        node,
        mode: header.mode().map_err(|_| "has an impossible mode")? & 0o7777,
        uid: number(header.uid())?,
        gid: number(header.gid())?,
        mtime,
        xattrs: records.xattrs,
    })
}

fn node(header: &Header, records: &ExtendedRecords<'_>) -> Result<EntryNode, &'static str> {
    let link = || -> Result<Vec<u8>, &'static str> {
        let target = match records.link {
            Some(target) => target.to_owned(),
            None => header.link_name_bytes().ok_or("is a link to nothing")?.into_owned(),
        };
        if target.len() > TARGET_MAX { Err("is a link with too long a target") } else { Ok(target) }
    };
    let device = || -> Result<(u32, u32), &'static str> {
        let number = |number: std::io::Result<Option<u32>>| number.ok().flatten();
        let numbers = number(header.device_major()).zip(number(header.device_minor()));
        numbers.ok_or("is a device without a number")
    };
    let node = match header.entry_type() {
        EntryType::Regular => match records.sparse {
            [None, None, None] => EntryNode::File,
            [Some(1), Some(0), Some(size)] => EntryNode::Sparse(size),
            _ => return Err("has holes in an unknown format"),
        },
        EntryType::Directory => EntryNode::Directory,
        EntryType::Symlink => {
            let target = CString::new(link()?).map_err(|_| "is a link with a zero in its target")?;
            if target.is_empty() {
                return Err("is a link to nothing");
            }
            EntryNode::Symlink(target)
        }
        EntryType::Link => {
            let target = components(&link()?)?;
            if target.is_empty() {
                return Err("is a hard link to the root");
            }
            EntryNode::Link(target)
        }
        EntryType::Fifo if records.is_socket => EntryNode::Socket,
        EntryType::Fifo => EntryNode::Fifo,
        EntryType::Char => device().map(|(major, minor)| EntryNode::Character(major, minor))?,
        EntryType::Block => device().map(|(major, minor)| EntryNode::Block(major, minor))?,
        _ => return Err("has an unexpected type"),
    };
    if records.is_socket && node != EntryNode::Socket {
        return Err("is marked as a socket although it is something else");
    }
    match (&node, records.sparse) {
        (EntryNode::Sparse(_), _) | (_, [None, None, None]) => Ok(node),
        _ => Err("has holes although it is not a regular file"),
    }
}

/// Splits a path into its names. Every path that does not plainly lead down from the root is refused.
pub(super) fn components(path: &[u8]) -> Result<Components, &'static str> {
    if path == b"." {
        return Ok(Vec::new());
    }
    if path.starts_with(b"/") {
        return Err("has an absolute path");
    }
    if path.len() > MAX_PATH {
        return Err("has too long a path");
    }
    if path.contains(&0) {
        return Err("has a zero in its path");
    }
    let path = path.strip_suffix(b"/").unwrap_or(path);
    let components: Components = path.split(|&byte| byte == b'/').map(<[u8]>::to_vec).collect();
    if components.len() > MAX_DEPTH {
        return Err("is below too many directories");
    }
    for component in &components {
        match component.as_slice() {
            b"" | b"." => return Err("has a path with an empty component"),
            b".." => return Err("has a path with \"..\""),
            long if long.len() > NAME_MAX => return Err("has too long a name"),
            _ => {}
        }
    }
    Ok(components)
}

/// The records of an extended header.
#[derive(Debug, Default)]
struct ExtendedRecords<'a> {
    path: Option<&'a [u8]>,
    link: Option<&'a [u8]>,
    mtime: Option<(i64, u32)>,
    is_socket: bool,
    /// Version of the format (two numbers) and the size.
    sparse: [Option<u64>; 3],
    xattrs: Vec<(CString, Vec<u8>)>,
}

impl<'a> ExtendedRecords<'a> {
    fn parse(records: &'a [u8]) -> Result<Self, &'static str> {
        let mut all = Self::default();
        for record in Records(records) {
            let (key, value) = record.map_err(|_| "has a malformed extended header")?;
            let number = || layer::decimal(value).ok_or("has a record that is not a number");
            if let Some(name) = key.strip_prefix(XATTR.as_bytes()) {
                all.xattrs.push((xattr(name, value)?, value.to_vec()));
                continue;
            }
            match std::str::from_utf8(key).unwrap_or_default() {
                PATH => all.path = Some(value),
                LINK => all.link = Some(value),
                MTIME => all.mtime = Some(layer::parse_time(value).ok_or("has an impossible time")?),
                FILE_TYPE if value == SOCKET.as_bytes() => all.is_socket = true,
                FILE_TYPE => return Err("has an unexpected type in its extended header"),
                SPARSE_MAJOR => all.sparse[0] = Some(number()?),
                SPARSE_MINOR => all.sparse[1] = Some(number()?),
                SPARSE_SIZE => all.sparse[2] = Some(number()?),
                _ => return Err("has an unexpected record in its extended header"),
            }
        }
        Ok(all)
    }
}

fn xattr(name: &[u8], value: &[u8]) -> Result<CString, &'static str> {
    let opaque = name == layer::OPAQUE.0.as_bytes();
    if !layer::travels(name) || name.len() > XATTR_NAME_MAX || (opaque && value != layer::OPAQUE.1) {
        return Err("has an attribute that a container's file may not have");
    }
    CString::new(name).map_err(|_| "has an attribute with a zero in its name")
}

/// Reads the map that precedes the data of a file with holes. Also returns how many bytes the map took.
///
/// # Errors
/// The map is malformed, or describes more than `size` bytes.
pub(super) fn read_map(content: &mut impl Read, size: u64) -> Result<(DataPieces, u64), &'static str> {
    let mut numbers: Vec<u64> = Vec::new();
    // The number of numbers to read, which the first one determines.
    let mut wanted = 1;
    let (mut digits, mut taken) = (Vec::new(), 0);
    while numbers.len() < wanted {
        let mut block = [0; BLOCK];
        content.read_exact(&mut block).map_err(|_| "has an incomplete map of its holes")?;
        taken += BLOCK as u64;
        for &byte in &block {
            if numbers.len() == wanted {
                break;
            }
            if byte != b'\n' {
                if digits.len() > 20 {
                    return Err("has a map of its holes with too large a number");
                }
                digits.push(byte);
                continue;
            }
            let number =
                layer::decimal(&digits).ok_or("has a map of its holes that is not a list of numbers")?;
            digits.clear();
            if numbers.is_empty() {
                if number > MAX_PIECES as u64 {
                    return Err("has too many holes");
                }
                wanted += 2 * number as usize;
            }
            numbers.push(number);
        }
    }
    let pieces: Vec<_> = numbers[1..].chunks_exact(2).map(|piece| (piece[0], piece[1])).collect();
    let mut end = 0;
    for &(offset, length) in &pieces {
        if offset < end {
            return Err("has overlapping pieces");
        }
        end = offset.checked_add(length).filter(|&end| end <= size).ok_or("has pieces beyond its end")?;
    }
    Ok((pieces, taken))
}

/// A path for messages.
pub(super) fn lossy(path: &[u8]) -> String {
    printable(&String::from_utf8_lossy(&path[..path.len().min(MAX_PATH)]))
}
