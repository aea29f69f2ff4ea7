//! What the targets that unpack archives share.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

/// The properties of the files in a directory that must not change.
pub(crate) fn state(dir: &Path) -> Vec<(String, u64, u32, u32, i64, Vec<u8>)> {
    let entries = fs::read_dir(dir).expect("it is there").map(|entry| {
        let path = entry.expect("it is there").path();
        let status = fs::symlink_metadata(&path).expect("it is there");
        let content = fs::read(&path).expect("a file");
        (path.display().to_string(), status.nlink(), status.mode(), status.uid(), status.mtime(), content)
    });
    entries.collect()
}

/// Corrects the checksums of all headers, as an attacker would.
pub(crate) fn with_checksums(archive: &[u8]) -> Vec<u8> {
    let (mut archive, mut at) = (archive.to_vec(), 0_usize);
    while let Some(block) = archive.get_mut(at..at + 512) {
        let mut header = tar::Header::from_byte_slice(block).clone();
        if block.iter().any(|&byte| byte != 0) {
            header.set_cksum();
            block.copy_from_slice(header.as_bytes());
        }
        let size = header.entry_size().unwrap_or(0).min(1 << 30) as usize;
        at += 512 + size.next_multiple_of(512);
    }
    archive
}
