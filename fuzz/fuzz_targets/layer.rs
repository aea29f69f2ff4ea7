//! Applies any archive to a directory: the archive may be refused, but nothing outside the directory changes.
//!
//! `cargo fuzz run layer` (as root; `--sanitizer none` with a stable toolchain). Checksums are corrected
//! before the archive is read, since an attacker would do that too.
#![no_main]

#[path = "../archive.rs"]
mod archive;

use std::{
    fs::{self, File},
    os::fd::AsFd,
    path::Path,
};

use libfuzzer_sys::fuzz_target;
use machinen::layer::{LayerLimits, apply};
use machinen_base::space::DiskReserve;

use archive::{state, with_checksums};

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
