//! Applies any archive to a directory: the archive may be refused, but nothing outside the directory changes.
//!
//! `cargo fuzz run layer` (as root; `--sanitizer none` with a stable toolchain). Checksums are corrected
//! before the archive is read, since an attacker would do that too.
#![no_main]

use std::{
    fs::{self, File},
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::Path,
};

use libfuzzer_sys::fuzz_target;
use machinen_base::space::DiskReserve;
use machinen::layer::{LayerLimits, apply};

const LIMITS: LayerLimits = LayerLimits { entries: 64, bytes: 1 << 20, reserve: DiskReserve::percent(0) };

fuzz_target!(|bytes: &[u8]| {
    // The first byte chooses one of the two kinds of target.
    let Some((&kind, archive)) = bytes.split_first() else { return };
    let archive = with_checksums(archive);
    let base = if Path::new("/dev/shm").is_dir() { Path::new("/dev/shm") } else { Path::new("/tmp") };
    let dir = tempfile::tempdir_in(base).expect("a directory");
    let [root, outside, lower] = ["root", "outside", "lower"].map(|name| dir.path().join(name));
    for path in [&root, &outside, &lower, &lower.join("d")] {
        fs::create_dir(path).expect("a directory");
    }
    for file in [outside.join("file"), lower.join("f"), lower.join("d/f")] {
        fs::write(file, "untouched").expect("a file");
    }
    let before = state(&outside);
    let (into, from) = (File::open(&root).expect("it is there"), File::open(&lower).expect("it is there"));
    let lower_fd = (kind & 1 == 1).then(|| from.as_fd());
    if let Ok(applied) = apply(archive.as_slice(), into.as_fd(), lower_fd, LIMITS) {
        assert!(applied.entries <= LIMITS.entries && applied.bytes <= LIMITS.bytes);
    }
    assert_eq!(
        fs::read_dir(dir.path()).expect("it is there").count(),
        3,
        "something next to the directories"
    );
    assert_eq!(state(&outside), before, "something outside was changed");
    assert_eq!(fs::read(lower.join("d/f")).expect("it is there"), b"untouched");
});

/// The properties of the files in a directory that must not change.
fn state(dir: &Path) -> Vec<(String, u64, u32, u32, i64, Vec<u8>)> {
    let entries = fs::read_dir(dir).expect("it is there").map(|entry| {
        let path = entry.expect("it is there").path();
        let status = fs::symlink_metadata(&path).expect("it is there");
        let content = fs::read(&path).expect("a file");
        (path.display().to_string(), status.nlink(), status.mode(), status.uid(), status.mtime(), content)
    });
    entries.collect()
}

fn with_checksums(archive: &[u8]) -> Vec<u8> {
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
