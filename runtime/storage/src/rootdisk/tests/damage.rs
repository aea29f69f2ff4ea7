//! Tests that changed disks are detected and built again, and that no content of a disk causes worse than an
//! error.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::Path,
};

use proptest::prelude::*;

use super::{
    CacheFixture, layer,
    tree::{everything, touch},
};
use crate::rootdisk::{DiskState, ext4, source_mount::SourceMount, store::UnusableDisk, tree::SourceTree};

/// Changes a byte in place and, if asked, makes it look as if nothing was written.
fn flip(path: &Path, at: u64, hidden: bool) {
    let before = fs::metadata(path).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    drop(file);
    if hidden {
        touch(path, before.mtime(), before.mtime_nsec());
    }
}

/// The blocks that are not all zeros, with their offsets.
fn blocks(disk: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    disk.chunks(4096)
        .enumerate()
        .filter(|(_, block)| *block != [0; 4096])
        .map(|(index, block)| (index * 4096, block))
}

fn find(disk: &[u8], needle: &[u8]) -> u64 {
    let found = |block: &[u8]| block.windows(needle.len()).position(|window| window == needle);
    blocks(disk).find_map(|(offset, block)| found(block).map(|at| (offset + at) as u64)).unwrap()
}

#[test]
fn a_changed_disk_is_built_again() {
    let fixture = CacheFixture::new();
    let root = fixture.path("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("file"), "needle").unwrap();
    let first = fixture.build(&layer(&root)).unwrap();
    let good = fs::read(&first.path).unwrap();
    let metadata = first.path.with_extension("json");
    let index = fs::read_dir(fixture.cache.dir().join("index")).unwrap().next().unwrap().unwrap().path();
    let text = fs::read_to_string(&metadata).unwrap();
    let path = first.path.clone();
    let damages: [(&str, &dyn Fn()); 8] = [
        ("truncated", &|| File::options().write(true).open(&path).unwrap().set_len(1 << 20).unwrap()),
        ("written to", &|| flip(&path, 5 << 20, false)),
        ("another superblock", &|| flip(&path, 1024 + 0x68, true)),
        ("no metadata", &|| fs::remove_file(&metadata).unwrap()),
        ("half of the metadata", &|| fs::write(&metadata, &text[..text.len() / 2]).unwrap()),
        ("metadata of another version", &|| {
            fs::write(&metadata, text.replace("\"version\": 1", "\"version\": 2")).unwrap();
        }),
        ("no disk", &|| fs::remove_file(&path).unwrap()),
        ("neither disk nor metadata", &|| {
            [&path, &metadata].into_iter().for_each(|path| fs::remove_file(path).unwrap());
        }),
    ];
    for (what, damage) in damages {
        damage();
        let again = fixture.build(&layer(&root)).unwrap();
        assert_eq!((again.key, again.cached), (first.key, false), "{what}");
        assert!(fs::read(&again.path).unwrap() == good, "{what}");
        assert!(fixture.build(&layer(&root)).unwrap().cached, "{what}");
    }
    for junk in ["", "0000", "\u{fffd}", &"0".repeat(64)] {
        fs::write(&index, junk).unwrap();
        let again = fixture.build(&layer(&root)).unwrap();
        assert_eq!((again.key, again.cached), (first.key, true), "{junk:?}");
    }
    // The owner of an open descriptor keeps the old disk.
    assert_eq!(first.file.metadata().unwrap().len(), 1 << 20);
}

#[test]
fn verify_reads_everything() {
    let fixture = CacheFixture::new();
    let root = fixture.path("root");
    everything(&root, false);
    let disk = fixture.build(&layer(&root)).unwrap();
    assert_eq!(fixture.cache.verify(disk.key).unwrap(), Ok(()));
    let bytes = fs::read(&disk.path).unwrap();
    let needles: [&[u8]; 5] = [b"middle", b"of a device", b"hard too", b"deep", &[b'x'; 60]];
    for needle in needles {
        let at = find(&bytes, needle);
        flip(&disk.path, at, true);
        let damage = fixture.cache.verify(disk.key).unwrap().unwrap_err();
        assert!(matches!(damage, UnusableDisk::Content | UnusableDisk::Damaged(_)), "{damage}");
        assert_eq!(fixture.cache.list().unwrap()[0].state, DiskState::Unfinished);
        assert!(!fixture.build(&layer(&root)).unwrap().cached);
        assert_eq!(fixture.cache.verify(disk.key).unwrap(), Ok(()));
    }
}

#[test]
fn no_byte_can_make_the_reader_fail_badly() {
    let fixture = CacheFixture::new();
    let root = fixture.path("root");
    everything(&root, false);
    let disk = fixture.build(&layer(&root)).unwrap();
    let good = fs::read(&disk.path).unwrap();
    let tree = SourceTree::walk(&SourceMount::of_dir(&root).unwrap()).unwrap();
    // The offsets of all words that are not zero.
    let words = blocks(&good).flat_map(|(offset, block)| {
        let words = block.chunks(4).enumerate().filter(|(_, word)| **word != [0; 4]);
        words.map(move |(index, _)| (offset + index * 4) as u64)
    });
    let words: Vec<u64> = words.collect();
    let file = File::options().read(true).write(true).create_new(true).open(fixture.path("copy")).unwrap();
    let config = ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() };
    let change = (any::<prop::sample::Index>(), 0..4_u64, prop_oneof![Just(0_u8), Just(0xff), any::<u8>()]);
    proptest!(config, |(changes in prop::collection::vec(change, 1..4))| {
        file.set_len(0).unwrap();
        file.set_len(good.len() as u64).unwrap();
        blocks(&good).for_each(|(offset, block)| file.write_all_at(block, offset as u64).unwrap());
        for (word, rest, byte) in &changes {
            file.write_all_at(&[*byte], word.get(&words) + rest).unwrap();
        }
        // Errors are fine, and so is a change that does not matter; a panic or an endless loop is not.
        let _ = ext4::manifest(&file);
        let _ = ext4::normalise(&file, &tree, ext4::OriginMarks::Kept);
    });
}
