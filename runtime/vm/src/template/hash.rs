//! The digest that shows whether a template is still as it was built.

use std::{fs::File, io};

use machinen_base::fs::hex;
use sha2::{Digest as _, Sha256};

use super::pages;

/// Hexadecimal digest of a template's memory and device state. Reads all of both.
pub(super) fn digest(memory: &File, devices: &[u8]) -> io::Result<String> {
    let mut hasher = Sha256::new();
    hasher.update(devices);
    pages::for_each(memory, |number, page| {
        hasher.update(number.to_le_bytes());
        hasher.update(page);
        Ok(())
    })?;
    Ok(hex(&hasher.finalize()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use machinen_base::memfd;

    const PAGE: usize = 4096;

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
