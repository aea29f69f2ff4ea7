//! The digest by which `verify` knows that a template is as it was built.
//!
//! Pages of zeros do not count: whether such a page of a memfd exists depends on who has looked at it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

const PAGE: usize = 4096;
const CHUNK: usize = 256 * PAGE;

/// Hexadecimal digest of a template's memory and device state. Reads all of both.
pub(super) fn digest(memory: &File, devices: &[u8]) -> io::Result<String> {
    let mut hasher = Sha256::new();
    hasher.update(devices);
    let mut buffer = vec![0; CHUNK];
    for_each_extent(memory, |mut offset, end| {
        while offset < end {
            let length = usize::try_from(end - offset).unwrap_or(CHUNK).min(CHUNK);
            memory.read_exact_at(&mut buffer[..length], offset)?;
            for (page, number) in buffer[..length].chunks(PAGE).zip(offset / PAGE as u64..) {
                if page.iter().any(|byte| *byte != 0) {
                    hasher.update(number.to_le_bytes());
                    hasher.update(page);
                }
            }
            offset += length as u64;
        }
        Ok(())
    })?;
    Ok(hasher.finalize().iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}")))
}

/// Calls back for each range that is not a hole.
fn for_each_extent(file: &File, mut each: impl FnMut(u64, u64) -> io::Result<()>) -> io::Result<()> {
    let mut at = 0;
    loop {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        at = seek(file, SeekFrom::Hole(start))?;
        each(start, at)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memfd;

    fn memory(write: &[(u64, &[u8])]) -> File {
        let file = File::from(memfd::sparse(4 << 20).unwrap());
        for (at, bytes) in write {
            file.write_all_at(bytes, *at).unwrap();
        }
        file
    }

    #[test]
    fn every_byte_and_its_place_count_and_holes_do_not() {
        let page = [7; PAGE];
        let all = |write: &[(u64, &[u8])], devices: &[u8]| digest(&memory(write), devices).unwrap();
        let base = all(&[(1 << 20, &page)], b"d");
        assert_eq!(base, all(&[(1 << 20, &page), (0, &[0; 3 * PAGE])], b"d"));
        assert_ne!(base, all(&[(2 << 20, &page)], b"d"));
        assert_ne!(base, all(&[(1 << 20, &page)], b"e"));
        assert_ne!(base, all(&[(1 << 20, &page), ((1 << 20) + 99, b"x")], b"d"));
        assert_eq!(base.len(), 64);
    }
}
