//! Extended attributes: in the inode as far as they fit, the rest in one block.
//!
//! mke2fs places them in the order in which the source file system lists them; [`Ext4Image::sort_xattrs`]
//! rewrites them in a fixed order. Whether the block is needed does not depend on the order (it is when the
//! sum of all does not fit into the inode), so nothing else on the disk moves.

use super::{
    BLOCK, Ext4Error, INODE, damaged, image::Ext4Image, inode::Ext4Inode, normalise::OriginMarks, put16,
    put32, u16_at, u32_at,
};
use crate::rootdisk::manifest::Xattrs;

const MAGIC: u32 = 0xea02_0000;
const ENTRY: usize = 16;
const BLOCK_HEADER: usize = 32;
/// The numbers of name prefixes, and the prefixes. Those of ACLs are whole names.
const PREFIXES: [(u8, &[u8]); 6] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
    (7, b"system."),
];

/// An attribute as it is on the disk: the name without its prefix, and the value.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Raw {
    prefix: u8,
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Raw {
    fn space(&self) -> usize {
        ENTRY + self.name.len().next_multiple_of(4) + self.value.len().next_multiple_of(4)
    }

    /// `trusted.overlay.origin`.
    fn is_origin(&self) -> bool {
        self.prefix == 4 && self.name == b"overlay.origin"
    }

    /// The attribute that it is on the disk, if any.
    fn on_disk(self, marks: OriginMarks) -> Option<Self> {
        match marks {
            OriginMarks::Kept => Some(self),
            _ if self.is_origin() => None,
            OriginMarks::DroppedOfUser if self.prefix == 1 && self.name.starts_with(b"overlay.") => {
                (self.name == b"overlay.opaque").then_some(Self { prefix: 4, ..self })
            }
            _ => Some(self),
        }
    }

    fn hash(&self) -> u32 {
        let name = self.name.iter().fold(0_u32, |hash, &byte| hash.rotate_left(5) ^ u32::from(byte));
        self.value.chunks(4).fold(name, |hash, chunk| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            hash.rotate_left(16) ^ u32::from_le_bytes(word)
        })
    }
}

impl Ext4Image<'_> {
    /// Names and values as getxattr(2) gives them, sorted by name.
    pub(super) fn xattrs(&mut self, inode: &Ext4Inode) -> Result<Xattrs, Ext4Error> {
        let (inside, outside) = self.raw_xattrs(inode)?;
        let mut named = Vec::new();
        for raw in inside.into_iter().chain(outside) {
            let prefix = PREFIXES.iter().find(|(number, _)| *number == raw.prefix);
            let (_, prefix) = prefix.ok_or_else(|| damaged("an extended attribute of an unknown kind"))?;
            let value = if matches!(raw.prefix, 2 | 3) { acl(&raw.value)? } else { raw.value };
            named.push(([prefix, &raw.name[..]].concat(), value));
        }
        named.sort();
        Ok(named)
    }

    /// Puts the attributes in order; true if the inode changed. `path` is for messages.
    pub(super) fn sort_xattrs(
        &mut self,
        inode: &mut Ext4Inode,
        path: &[u8],
        marks: OriginMarks,
    ) -> Result<bool, Ext4Error> {
        let (inside, outside) = self.raw_xattrs(inode)?;
        let found = [inside, outside].concat();
        let mut all: Vec<_> = found.iter().cloned().filter_map(|raw| raw.on_disk(marks)).collect();
        if all == found && found.len() < 2 {
            return Ok(false);
        }
        // The order that the kernel requires in a block.
        all.sort_by(|a, b| (a.prefix, a.name.len(), &a.name).cmp(&(b.prefix, b.name.len(), &b.name)));
        let start = inode.xattr_start().ok_or_else(|| damaged("an inode has no room for attributes"))?;
        let block = inode.xattr_block();
        let room = INODE - start - 4;
        let (inside, outside) = split(all, room, if block == 0 { 0 } else { BLOCK - BLOCK_HEADER })
            .ok_or_else(|| Ext4Error::Xattrs { path: String::from_utf8_lossy(path).into_owned() })?;
        let bytes = inode.bytes_mut();
        put32(bytes, start, MAGIC);
        write(&mut bytes[start + 4..], 0, &inside, false);
        if block != 0 {
            write(&mut self.block_mut(block)?[BLOCK_HEADER..], BLOCK_HEADER, &outside, true);
        }
        Ok(true)
    }

    fn raw_xattrs(&mut self, inode: &Ext4Inode) -> Result<(Vec<Raw>, Vec<Raw>), Ext4Error> {
        let (mut inside, mut outside) = (Vec::new(), Vec::new());
        if let Some(start) = inode.xattr_start()
            && u32_at(inode.bytes(), start) == MAGIC
        {
            inside = parse(&inode.bytes()[start + 4..], 0)?;
        }
        if inode.xattr_block() != 0 {
            let block = self.block(inode.xattr_block())?;
            if (u32_at(block, 0), u32_at(block, 4), u32_at(block, 8)) != (MAGIC, 1, 1) {
                return Err(damaged("a block of extended attributes has no header"));
            }
            outside = parse(&block[BLOCK_HEADER..], BLOCK_HEADER)?;
        }
        Ok((inside, outside))
    }
}

/// Divides sorted attributes between inode and block: in order, or, should that not fit, the largest into the
/// inode first.
fn split(all: Vec<Raw>, inside: usize, outside: usize) -> Option<(Vec<Raw>, Vec<Raw>)> {
    let attempt = |order: Vec<usize>| {
        let mut kept = vec![false; all.len()];
        let mut room = inside.checked_sub(4)?;
        for index in order {
            if let Some(rest) = room.checked_sub(all[index].space()) {
                (room, kept[index]) = (rest, true);
            }
        }
        let rest: usize = all.iter().zip(&kept).filter(|(_, kept)| !**kept).map(|(raw, _)| raw.space()).sum();
        (rest == 0 || rest + 4 <= outside).then_some(kept)
    };
    let mut by_size: Vec<usize> = (0..all.len()).collect();
    by_size.sort_by_key(|&index| std::cmp::Reverse(all[index].space()));
    let kept = attempt((0..all.len()).collect()).or_else(|| attempt(by_size))?;
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for (raw, kept) in all.into_iter().zip(kept) {
        if kept { first.push(raw) } else { second.push(raw) }
    }
    Some((first, second))
}

/// Reads entries up to the end mark; `base` is added to offsets of values in `area`.
fn parse(area: &[u8], base: usize) -> Result<Vec<Raw>, Ext4Error> {
    let malformed = || damaged("a malformed extended attribute");
    let (mut found, mut at) = (Vec::new(), 0);
    while at + 4 <= area.len() && u32_at(area, at) != 0 {
        let entry = area.get(at..at + ENTRY).ok_or_else(malformed)?;
        let (name, prefix) = (usize::from(entry[0]), entry[1]);
        let (offset, size) = (usize::from(u16_at(entry, 2)), u32_at(entry, 8) as usize);
        if u32_at(entry, 4) != 0 {
            return Err(damaged("an extended attribute in an inode of its own"));
        }
        let name_bytes = area.get(at + ENTRY..at + ENTRY + name).ok_or_else(malformed)?;
        let value = match size {
            0 => &[][..],
            _ => offset
                .checked_sub(base)
                .and_then(|from| area.get(from..from.checked_add(size)?))
                .ok_or_else(malformed)?,
        };
        found.push(Raw { prefix, name: name_bytes.to_vec(), value: value.to_vec() });
        at += ENTRY + name.next_multiple_of(4);
    }
    Ok(found)
}

/// Fills `area`: entries from its start, values from its end. The caller made sure that they fit.
fn write(area: &mut [u8], base: usize, attributes: &[Raw], hashed: bool) {
    area.fill(0);
    let (mut at, mut end) = (0, area.len());
    for raw in attributes {
        end -= raw.value.len().next_multiple_of(4);
        area[end..end + raw.value.len()].copy_from_slice(&raw.value);
        area[at] = raw.name.len() as u8;
        area[at + 1] = raw.prefix;
        put16(area, at + 2, (end + base) as u16);
        put32(area, at + 8, raw.value.len() as u32);
        put32(area, at + 12, if hashed { raw.hash() } else { 0 });
        area[at + ENTRY..at + ENTRY + raw.name.len()].copy_from_slice(&raw.name);
        at += ENTRY + raw.name.len().next_multiple_of(4);
    }
}

/// The value of an ACL as getxattr(2) gives it: version 2, and every entry has an id.
fn acl(disk: &[u8]) -> Result<Vec<u8>, Ext4Error> {
    let malformed = || damaged("a malformed ACL");
    if disk.len() < 4 || u32_at(disk, 0) != 1 {
        return Err(malformed());
    }
    let (mut value, mut rest) = (2_u32.to_le_bytes().to_vec(), &disk[4..]);
    while !rest.is_empty() {
        let tag = if rest.len() < 4 { return Err(malformed()) } else { u16_at(rest, 0) };
        // Named users (2) and groups (8) carry their id.
        let length = if matches!(tag, 2 | 8) { 8 } else { 4 };
        let entry = rest.get(..length).ok_or_else(malformed)?;
        value.extend_from_slice(&entry[..4]);
        value.extend_from_slice(if length == 8 { &entry[4..] } else { &[0xff; 4] });
        rest = &rest[length..];
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(name: &str, size: usize) -> Raw {
        Raw { prefix: 1, name: name.into(), value: vec![7; size] }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let attributes = [raw("a", 1), raw("bc", 0), raw("def", 12)];
        for base in [0, BLOCK_HEADER] {
            let mut area = [0xff; 128];
            write(&mut area, base, &attributes, true);
            assert_eq!(parse(&area, base).unwrap(), attributes);
        }
    }

    #[test]
    fn marks_of_an_ordinary_users_overlay_become_those_of_the_guests() {
        let of = |name: &str, marks| raw(name, 1).on_disk(marks).map(|raw| (raw.prefix, raw.name));
        let kept = |prefix, name: &str| Some((prefix, name.as_bytes().to_vec()));
        assert_eq!(of("overlay.opaque", OriginMarks::DroppedOfUser), kept(4, "overlay.opaque"));
        assert_eq!(of("overlay.impure", OriginMarks::DroppedOfUser), None);
        assert_eq!(of("overlay.opaque", OriginMarks::Dropped), kept(1, "overlay.opaque"));
        assert_eq!(of("comment", OriginMarks::DroppedOfUser), kept(1, "comment"));
        let origin = || Raw { prefix: 4, ..raw("overlay.origin", 1) };
        assert_eq!(
            (origin().on_disk(OriginMarks::Dropped), origin().on_disk(OriginMarks::Kept)),
            (None, Some(origin()))
        );
    }

    #[test]
    fn the_largest_go_inside_when_order_does_not_fit() {
        let all = vec![raw("a", 16), raw("b", 60)];
        let (inside, outside) = split(all.clone(), 84, 40).unwrap();
        assert_eq!((inside.len(), outside.len()), (1, 1));
        assert_eq!(outside, [raw("a", 16)]);
        assert_eq!(split(all, 84, 4), None);
    }

    #[test]
    fn values_outside_of_the_area_are_refused() {
        let mut area = [0; 64];
        write(&mut area, 0, &[raw("a", 4)], false);
        for (at, value) in [(2, 62_u16), (2, u16::MAX), (8, u16::MAX)] {
            let mut broken = area;
            put16(&mut broken, at, value);
            assert!(parse(&broken, 0).is_err(), "{at} {value}");
        }
    }

    #[test]
    fn acls_get_back_their_unused_ids() {
        let disk = [1, 0, 0, 0, 1, 0, 6, 0, 2, 0, 7, 0, 9, 0, 0, 0];
        let expected = [2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 7, 0, 9, 0, 0, 0];
        assert_eq!(acl(&disk).unwrap(), expected);
        assert!(acl(&disk[..14]).is_err());
    }
}
