//! The format in which a container's changes travel: the upper directory of its overlay, unchanged, as a tar
//! stream.
//!
//! The archive is POSIX.1-2001 ("pax") and any tar reads it. The host requires more than that:
//!
//! - The first entry is the upper directory itself, named `.`; other names are relative and have no empty,
//!   `.` or `..` component.
//! - A directory comes before its content, and its whole content before anything outside it. No name comes
//!   twice.
//! - Each entry has at most one extended header (`x`), with records of [`KEYS`] and `SCHILY.xattr.*`, and the
//!   archive has no other extensions. Sizes that do not fit in octal digits are binary, as in GNU tar.
//! - A removed file is a character device 0:0, and a directory that hides what is below it has the attribute
//!   `trusted.overlay.opaque`, both as overlayfs keeps them. Other attributes of overlayfs have a meaning
//!   only on the disk where they were made, and are not sent.
//! - A file with holes is in GNU's sparse format 1.0: the data begins with a map, see [`map`].
//! - Another name of a file is a hard link to the first one, symbolic links and sockets included.
//! - tar has no type for a bound socket: it is a fifo with the record [`FILE_TYPE`], as in star(1).

/// Most bytes in the records of one entry: many times 4 KiB of attributes and two paths.
pub const MAX_RECORDS: usize = 256 << 10;
/// Most bytes of a path in the archive.
pub const MAX_PATH: usize = 4000;
/// Most directories above an entry: removing a tree takes an open descriptor for each.
pub const MAX_DEPTH: usize = 512;
/// Most pieces of data of a file with holes; the list of them takes 16 MiB of memory.
pub const MAX_PIECES: usize = 1 << 20;
/// Size of a block, bytes: everything in a tar stream is a multiple of it.
pub const BLOCK: usize = 512;

/// Prefix of the records that carry extended attributes.
pub const XATTR: &str = "SCHILY.xattr.";
/// The attribute of a directory that hides what lower layers have of it, and the value that says so.
pub const OPAQUE: (&str, &[u8]) = ("trusted.overlay.opaque", b"y");
/// Attributes that are overlayfs's own.
pub const OVERLAY: &str = "trusted.overlay.";
/// Attributes that overlayfs keeps for an overlay inside the container; they are sent.
pub const NESTED_OVERLAY: &str = "trusted.overlay.overlay.";

/// The keys of records that are not attributes.
pub const KEYS: [&str; 7] = [PATH, LINK, MTIME, FILE_TYPE, SPARSE_MAJOR, SPARSE_MINOR, SPARSE_SIZE];
/// Key of the entry's path.
pub const PATH: &str = "path";
/// Key of a link's target.
pub const LINK: &str = "linkpath";
/// Key of the time of the last change: see [`format_time`].
pub const MTIME: &str = "mtime";
/// Key of the type of a file that tar has none for; only of a fifo that is a [`SOCKET`].
pub const FILE_TYPE: &str = "SCHILY.filetype";
/// The value of [`FILE_TYPE`].
pub const SOCKET: &str = "socket";
/// Key of the sparse format's major version.
pub const SPARSE_MAJOR: &str = "GNU.sparse.major";
/// Key of the sparse format's minor version.
pub const SPARSE_MINOR: &str = "GNU.sparse.minor";
/// Key of the file's size with its holes, bytes.
pub const SPARSE_SIZE: &str = "GNU.sparse.realsize";

/// Whether an extended attribute belongs to the container's files and is sent; all others stay on the disk.
///
/// Security labels other than file capabilities belong to the kernel that set them.
pub fn travels(name: &[u8]) -> bool {
    let starts = |prefix: &str| name.starts_with(prefix.as_bytes());
    let plain_trusted = starts("trusted.") && !starts(OVERLAY);
    let exact = ["security.capability", "system.posix_acl_access", "system.posix_acl_default", OPAQUE.0];
    starts("user.")
        || plain_trusted
        || starts(NESTED_OVERLAY)
        || exact.iter().any(|exact| exact.as_bytes() == name)
}

/// Records are malformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed record in an extended header")]
pub struct RecordError;

/// Appends the record `<length> <key>=<value>\n`, whose length counts its own digits.
pub fn push_record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length.to_string().len() + rest != length {
        length = length.to_string().len() + rest;
    }
    records.extend_from_slice(format!("{length} ").as_bytes());
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

/// Splits the records, in order. Values may hold any byte, a line feed too.
#[derive(Debug, Clone, Copy)]
pub struct Records<'a>(pub &'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = Result<(&'a [u8], &'a [u8]), RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let record = first_record(self.0);
        match record {
            Some((_, _, rest)) => self.0 = rest,
            // Without this record's length the next one cannot be found.
            None => self.0 = &[],
        }
        Some(record.map(|(key, value, _)| (key, value)).ok_or(RecordError))
    }
}

fn first_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(8).position(|&byte| byte == b' ')?;
    let length = decimal(&bytes[..space])?;
    let (record, rest) = bytes.split_at_checked(usize::try_from(length).ok()?)?;
    let body = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|&byte| byte == b'=')?;
    Some((&body[..equals], &body[equals + 1..], rest))
}

/// Parses digits without a sign or blanks; None also when the number exceeds u64.
pub fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || digits.len() > 20 {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// Formats seconds and nanoseconds (less than 10^9, counted forwards) as a decimal fraction.
pub fn format_time(seconds: i64, nanoseconds: u32) -> String {
    let nanos = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    let sign = if nanos < 0 { "-" } else { "" };
    let nanos = nanos.unsigned_abs();
    format!("{sign}{}.{:09}", nanos / 1_000_000_000, nanos % 1_000_000_000)
}

/// The inverse of [`format_time`]; a fraction may be missing or have up to nine digits.
pub fn parse_time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = text.strip_prefix(b"-").map_or((false, text), |rest| (true, rest));
    let mut parts = text.splitn(2, |&byte| byte == b'.');
    let seconds = i128::from(decimal(parts.next()?)?);
    let fraction = match parts.next() {
        None => 0,
        Some(digits) if digits.len() <= 9 => {
            i128::from(decimal(digits)?) * 10_i128.pow(u32::try_from(9 - digits.len()).ok()?)
        }
        Some(_) => return None,
    };
    let nanos = seconds * 1_000_000_000 + fraction;
    let nanos = if negative { -nanos } else { nanos };
    let seconds = i64::try_from(nanos.div_euclid(1_000_000_000)).ok()?;
    Some((seconds, u32::try_from(nanos.rem_euclid(1_000_000_000)).ok()?))
}

/// The map before the data of a file with holes: the number of pieces, then the offset and length of each,
/// one number per line, padded to whole blocks.
pub fn map(pieces: &[(u64, u64)]) -> Vec<u8> {
    let mut map = format!("{}\n", pieces.len());
    for (offset, length) in pieces {
        map.push_str(&format!("{offset}\n{length}\n"));
    }
    let mut map = map.into_bytes();
    map.resize(map.len().next_multiple_of(BLOCK), 0);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_those_of_posix() {
        let mut records = Vec::new();
        push_record(&mut records, b"path", b"a");
        push_record(&mut records, b"SCHILY.xattr.user.x", b"=\n\0 \n");
        assert_eq!(records, b"9 path=a\n29 SCHILY.xattr.user.x==\n\0 \n\n");
        let parsed: Result<Vec<_>, _> = Records(&records).collect();
        let wanted: [(&[u8], &[u8]); 2] = [(b"path", b"a"), (b"SCHILY.xattr.user.x", b"=\n\0 \n")];
        assert_eq!(parsed.unwrap(), wanted);
    }

    #[test]
    fn a_length_counts_its_own_digits() {
        for value in 0..2000 {
            let mut records = Vec::new();
            push_record(&mut records, b"k", &vec![b'v'; value]);
            let parsed: Vec<_> = Records(&records).collect();
            assert_eq!(parsed, [Ok((&b"k"[..], vec![b'v'; value].as_slice()))]);
        }
    }

    #[test]
    fn noise_is_refused() {
        for noise in [
            &b"5"[..],
            b"5 a=",
            b"99999999999999999999 a=b\n",
            b"-6 a=b\n",
            b"6 ab\n\n",
            b"7 a=b\n",
            b"0 a=b\n",
            b"2 a=b\n",
            b" 6 a=b\n",
            b"\0",
        ] {
            assert_eq!(Records(noise).next(), Some(Err(RecordError)), "{noise:?}");
        }
    }

    #[test]
    fn times_before_and_after_the_epoch() {
        for (seconds, nanoseconds, text) in [
            (0, 0, "0.000000000"),
            (1_700_000_000, 5, "1700000000.000000005"),
            (-1, 500_000_000, "-0.500000000"),
            (-2, 0, "-2.000000000"),
            (i64::MIN, 0, "-9223372036854775808.000000000"),
            (i64::MAX, 999_999_999, "9223372036854775807.999999999"),
        ] {
            assert_eq!(format_time(seconds, nanoseconds), text);
            assert_eq!(parse_time(text.as_bytes()), Some((seconds, nanoseconds)), "{text}");
        }
        assert_eq!(parse_time(b"7"), Some((7, 0)));
        assert_eq!(parse_time(b"7.5"), Some((7, 500_000_000)));
        for bad in [&b""[..], b".", b"-", b"7.", b"+7", b"1e3", b"9223372036854775808", b"1.0000000000"] {
            assert_eq!(parse_time(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_map_is_whole_blocks() {
        let map = map(&[(0, 4096), (1 << 40, 1)]);
        assert!(map.starts_with(b"2\n0\n4096\n1099511627776\n1\n\0") && map.len() == BLOCK);
    }

    #[test]
    fn attributes_of_overlayfs_itself_stay() {
        for name in [
            "user.a",
            "security.capability",
            "trusted.x",
            "trusted.overlay.opaque",
            "trusted.overlay.overlay.opaque",
        ] {
            assert!(travels(name.as_bytes()), "{name}");
        }
        for name in [
            "trusted.overlay.origin",
            "trusted.overlay.metacopy",
            "trusted.overlay.redirect",
            "security.selinux",
            "system.nfs4_acl",
            "",
        ] {
            assert!(!travels(name.as_bytes()), "{name}");
        }
    }
}
