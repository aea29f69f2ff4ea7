//! What the host decides about a reply of the guest, before the kernel gets it: how long names and attributes
//! are valid, how files are opened, which mode bits are shown, and which names a directory may list
//! (linux/fuse.h).
//!
//! A reply of another length than its request's is left as it is, since the kernel refuses it.

use std::time::Duration;

use machinen_protocol::fuse::{RequestHeader, opcode};

/// Attributes that come with a name remain valid for the call that has looked the name up. A name is looked up
/// each time that it is used.
const ATTRIBUTES_VALID: Duration = Duration::from_millis(10);
/// Files are read and written without the host's cache (FOPEN_DIRECT_IO). No other flag is set, so that neither
/// data nor listings are kept.
const DIRECT_IO: u32 = 1;

/// Sizes of fuse_entry_out, fuse_attr_out, fuse_open_out and the fixed part of fuse_dirent.
const ENTRY: usize = 128;
const ATTRIBUTES: usize = 104;
const OPENED: usize = 16;
const DIRENT: usize = 24;
/// Where fuse_attr has the mode.
const MODE: usize = 60;
/// Longest name of a file (limits.h, NAME_MAX).
const NAME_MAX: usize = 255;

/// Why a reply is not passed to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum HostileReply {
    #[error("the guest lists a name with control characters")]
    Name,
    #[error("the guest's listing is malformed")]
    Listing,
}

/// Rewrites the body of a successful reply.
///
/// # Errors
/// The reply names what must not be shown.
pub(super) fn harden(request: RequestHeader, body: &mut [u8]) -> Result<(), HostileReply> {
    match request.opcode {
        opcode::LOOKUP | opcode::SYMLINK | opcode::MKNOD | opcode::MKDIR | opcode::LINK
            if body.len() == ENTRY =>
        {
            entry(body);
        }
        opcode::GETATTR | opcode::SETATTR if body.len() == ATTRIBUTES => {
            put(body, 0, &validity(ATTRIBUTES_VALID));
            attributes(&mut body[16..]);
        }
        opcode::OPEN if body.len() == OPENED => put(body, 8, &DIRECT_IO.to_le_bytes()),
        opcode::OPENDIR if body.len() == OPENED => put(body, 8, &0_u32.to_le_bytes()),
        opcode::CREATE if body.len() == ENTRY + OPENED => {
            entry(&mut body[..ENTRY]);
            put(body, ENTRY + 8, &DIRECT_IO.to_le_bytes());
        }
        opcode::READDIR => return listing(body),
        _ => {}
    }
    Ok(())
}

fn entry(body: &mut [u8]) {
    // After the node and its generation: the seconds of both times, then their nanoseconds.
    let [seconds, nanoseconds] = times(ATTRIBUTES_VALID);
    put(body, 16, &0_u64.to_le_bytes());
    put(body, 24, &seconds.to_le_bytes());
    put(body, 32, &0_u32.to_le_bytes());
    put(body, 36, &(nanoseconds as u32).to_le_bytes());
    attributes(&mut body[40..]);
}

/// The view is mounted nosuid. Without the bits, a copy that keeps modes does not have them either.
fn attributes(body: &mut [u8]) {
    let mode = u32_at(body, MODE) & !(libc::S_ISUID | libc::S_ISGID);
    put(body, MODE, &mode.to_le_bytes());
}

fn validity(time: Duration) -> [u8; 12] {
    let [seconds, nanoseconds] = times(time);
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&seconds.to_le_bytes());
    bytes[8..].copy_from_slice(&(nanoseconds as u32).to_le_bytes());
    bytes
}

fn times(time: Duration) -> [u64; 2] {
    [time.as_secs(), time.subsec_nanos().into()]
}

fn listing(mut rest: &[u8]) -> Result<(), HostileReply> {
    while !rest.is_empty() {
        let length = rest.get(16..20).map(|_| u32_at(rest, 16) as usize).ok_or(HostileReply::Listing)?;
        if !(1..=NAME_MAX).contains(&length) {
            return Err(HostileReply::Listing);
        }
        let name = rest.get(DIRENT..DIRENT + length).ok_or(HostileReply::Listing)?;
        if is_odd(name) {
            return Err(HostileReply::Name);
        }
        // Each entry is padded; the last one need not be.
        rest = rest.get((DIRENT + length).next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(())
}

fn is_odd(name: &[u8]) -> bool {
    match std::str::from_utf8(name) {
        Ok(name) => name.chars().any(|char| char.is_control() || char == '/'),
        Err(_) => name.iter().any(|byte| byte.is_ascii_control() || *byte == b'/'),
    }
}

fn put(body: &mut [u8], at: usize, bytes: &[u8]) {
    body[at..at + bytes.len()].copy_from_slice(bytes);
}

fn u32_at(body: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(body[at..at + 4].try_into().expect("four bytes"))
}

#[cfg(test)]
mod tests {
    use machinen_protocol::fuse::{REQUEST_HEADER, ROOT};
    use proptest::prelude::*;

    use super::*;

    fn hardened(opcode: u32, mut body: Vec<u8>) -> Result<Vec<u8>, HostileReply> {
        let request = RequestHeader { length: REQUEST_HEADER, opcode, unique: 2, node: ROOT };
        harden(request, &mut body).map(|()| body)
    }

    fn dirent(name: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; DIRENT];
        bytes[16..20].copy_from_slice(&(name.len() as u32).to_le_bytes());
        bytes.extend_from_slice(name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn validities_are_the_hosts() {
        for opcode in [opcode::LOOKUP, opcode::MKDIR, opcode::CREATE] {
            let size = if opcode == opcode::CREATE { ENTRY + OPENED } else { ENTRY };
            let body = hardened(opcode, vec![0xff; size]).unwrap();
            assert_eq!(body[16..24], [0; 8], "a name is looked up each time");
            assert_eq!(body[24..32], [0; 8]);
            assert_eq!(body[32..36], [0; 4]);
            assert_eq!(u32_at(&body, 36), 10_000_000);
        }
        let body = hardened(opcode::GETATTR, vec![0xff; ATTRIBUTES]).unwrap();
        assert_eq!((&body[..8], u32_at(&body, 8)), (&[0; 8][..], 10_000_000));
    }

    #[test]
    fn mode_bits_that_give_rights_are_not_shown() {
        let mode = |at: usize, body: Vec<u8>| u32_at(&body, at);
        let entry = hardened(opcode::LOOKUP, vec![0xff; ENTRY]).unwrap();
        assert_eq!(mode(100, entry) & 0o7777, 0o1777);
        let attributes = hardened(opcode::SETATTR, vec![0xff; ATTRIBUTES]).unwrap();
        assert_eq!(mode(76, attributes) & 0o7777, 0o1777);
    }

    #[test]
    fn nothing_is_kept_of_an_open_file() {
        let flags = |opcode, at| u32_at(&hardened(opcode, vec![0xff; at + 8]).unwrap(), at);
        assert_eq!(flags(opcode::OPEN, 8), DIRECT_IO);
        assert_eq!(flags(opcode::OPENDIR, 8), 0);
        assert_eq!(flags(opcode::CREATE, ENTRY + 8), DIRECT_IO);
    }

    #[test]
    fn names_that_a_terminal_acts_upon_are_refused() {
        let list =
            |names: &[&[u8]]| hardened(opcode::READDIR, names.iter().flat_map(|name| dirent(name)).collect());
        assert!(list(&[b".", b"..", b"a b", "ä".as_bytes(), b"\xff", &[b'x'; 255]]).is_ok());
        for odd in [&b"\x1b[2J"[..], b"a\n", b"\x7f", b"a/b", "\u{9b}31m".as_bytes(), b"\xff\x07", b"\0"] {
            assert_eq!(list(&[b"ordinary", odd]), Err(HostileReply::Name), "{odd:?}");
        }
        for malformed in [vec![0; 8], dirent(b""), dirent(&[b'x'; 256]), dirent(b"name")[..26].to_vec()] {
            assert_eq!(hardened(opcode::READDIR, malformed), Err(HostileReply::Listing));
        }
    }

    proptest! {
        #[test]
        fn any_reply_keeps_its_length(opcode in 0_u32..50, body in prop::collection::vec(any::<u8>(), 0..300)) {
            let length = body.len();
            if let Ok(body) = hardened(opcode, body) {
                prop_assert_eq!(body.len(), length);
            }
        }
    }
}
