//! Two exports of one container into a directory of the user's: nothing next to the directory changes.
//!
//! Run it as root.
#![no_main]

#[path = "../archive.rs"]
mod archive;

use std::{fs, path::Path};

use libfuzzer_sys::fuzz_target;
use machinen::layer::{EarlierExports, LayerLimits, LayerTarget, store};
use machinen_base::space::DiskReserve;

use archive::{state, with_checksums};

const LIMITS: LayerLimits = LayerLimits { entries: 64, bytes: 1 << 20, reserve: DiskReserve::percent(0) };

fuzz_target!(|data: &[u8]| {
    let Some((&split, archives)) = data.split_first() else { return };
    let (first, second) = archives.split_at((usize::from(split) * 512).min(archives.len()));
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let [root, outside] = ["root", "outside"].map(|name| dir.path().join(name));
    for path in [&root, &outside, &root.join("d")] {
        fs::create_dir(path).expect("a directory");
    }
    for file in [outside.join("file"), root.join("f"), root.join("d/f")] {
        fs::write(file, "untouched").expect("a file");
    }
    std::os::unix::fs::symlink(&outside, root.join("link")).expect("a link");
    let before = state(&outside);
    let record = dir.path().join("record");
    for archive in [first, second] {
        let archive = with_checksums(archive);
        let earlier = EarlierExports { before: None, record: Path::new(&record) };
        let stored = store(archive.as_slice(), &LayerTarget::InPlace(root.clone()), earlier, LIMITS);
        drop(stored);
    }
    assert_eq!(state(&outside), before, "something outside was changed");
    let mut left: Vec<_> = fs::read_dir(dir.path())
        .expect("it is there")
        .map(|entry| entry.expect("it is there").file_name())
        .collect();
    left.retain(|name| name != "record");
    assert_eq!(left.len(), 2, "something is left next to the directory: {left:?}");
});
