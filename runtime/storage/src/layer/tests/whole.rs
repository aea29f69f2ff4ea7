//! Tests of a whole root file system with an archive's changes, as the native snapshotter keeps it.

use std::{
    fs::{self, File},
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use super::{LIMITS, LayerFixture, TestArchive};
use crate::layer::{AppliedLayer, EarlierExports, LayerError, LayerTarget, PreviousLayer, apply, store};

fn lower(fixture: &LayerFixture) -> PathBuf {
    let lower = fixture.path("outside");
    for dir in ["kept/deep", "opaque/old", "changed", "gone"] {
        fs::create_dir_all(lower.join(dir)).unwrap();
    }
    for file in [
        "kept/deep/file",
        "opaque/old/file",
        "changed/kept",
        "changed/removed",
        "changed/replaced",
        "gone/file",
    ] {
        fs::write(lower.join(file), "old").unwrap();
    }
    fs::set_permissions(lower.join("kept/deep"), fs::Permissions::from_mode(0o1751)).unwrap();
    fs::create_dir(lower.join("to-file")).unwrap();
    fs::write(lower.join("to-dir"), "old").unwrap();
    lower
}

fn apply_over(
    fixture: &LayerFixture,
    lower: &Path,
    archive: TestArchive,
) -> Result<AppliedLayer, LayerError> {
    let root = File::open(fixture.path("root")).unwrap();
    let lower = File::open(lower).unwrap();
    apply(archive.bytes().as_slice(), root.as_fd(), Some(lower.as_fd()), LIMITS)
}

pub(super) fn tree(root: &Path) -> Vec<String> {
    let (mut found, mut dirs) = (Vec::new(), vec![root.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            found.push(path.strip_prefix(root).unwrap().display().to_string());
            if path.symlink_metadata().unwrap().is_dir() {
                dirs.push(path);
            }
        }
    }
    found.sort();
    found
}

#[test]
fn changes_and_what_was_not_touched() {
    let fixture = LayerFixture::new();
    let lower = lower(&fixture);
    let archive = TestArchive::new()
        .dir("changed")
        .file("changed/new", b"new")
        .whiteout("changed/removed")
        .file("changed/replaced", b"new")
        .dir("fresh")
        .whiteout("fresh/nothing-there")
        .whiteout("gone")
        .xattr("trusted.overlay.opaque", "y")
        .dir("opaque")
        .file("opaque/new", b"new")
        .file("to-file", b"new")
        .dir("to-dir");
    apply_over(&fixture, &lower, archive).unwrap();
    let root = fixture.path("root");
    let wanted = [
        "changed",
        "changed/kept",
        "changed/new",
        "changed/replaced",
        "file",
        "fresh",
        "kept",
        "kept/deep",
        "kept/deep/file",
        "opaque",
        "opaque/new",
        "to-dir",
        "to-file",
    ];
    assert_eq!(tree(&root), wanted);
    for (file, content) in
        [("changed/kept", "old"), ("changed/replaced", "new"), ("to-file", "new"), ("kept/deep/file", "old")]
    {
        assert_eq!(fs::read_to_string(root.join(file)).unwrap(), content, "{file}");
    }
    // The files are unchanged, their times included.
    for path in ["kept", "kept/deep", "kept/deep/file"] {
        let (old, new) = (fs::metadata(lower.join(path)).unwrap(), fs::metadata(root.join(path)).unwrap());
        assert_eq!(
            (old.mode(), old.mtime_nsec(), old.mtime()),
            (new.mode(), new.mtime_nsec(), new.mtime()),
            "{path}"
        );
    }
    assert_eq!(fs::metadata(root.join("changed")).unwrap().mtime(), 7);
    assert!(rustix::fs::lgetxattr(root.join("opaque"), "trusted.overlay.opaque", &mut [0; 8][..]).is_err());
    // The old tree is whole until it is removed.
    assert_eq!(fs::read_to_string(lower.join("changed/replaced")).unwrap(), "old");
    assert_eq!(fs::read_to_string(lower.join("gone/file")).unwrap(), "old");
}

#[test]
fn links_in_the_old_tree_are_not_followed() {
    let fixture = LayerFixture::new();
    let lower = fixture.path("lower");
    fs::create_dir(&lower).unwrap();
    std::os::unix::fs::symlink("../outside", lower.join("dir")).unwrap();
    apply_over(&fixture, &lower, TestArchive::new().dir("dir").file("dir/new", b"x")).unwrap();
    assert_eq!(tree(&fixture.path("root")), ["dir", "dir/new"]);
    fs::remove_dir_all(lower).unwrap();
    fixture.assert_contained();
}

/// No lower layer has such a file, so the container's archive has no mark for it.
#[test]
fn what_was_removed_after_a_pause_does_not_come_back() {
    let fixture = LayerFixture::new();
    let root = fixture.path("root");
    fs::write(root.join("old"), "old").unwrap();
    let target = LayerTarget::Whole(root.clone());
    let (record, mut first) = (fixture.path("no-record"), None);
    for (name, wanted) in [("one", ["old", "one"]), ("two", ["old", "two"])] {
        let before = first.as_ref().map(|first: &PreviousLayer| first.files().unwrap());
        let archive = TestArchive::new().file(name, b"new").bytes();
        let earlier = EarlierExports { before, record: &record };
        let (_, replaced) = store(archive.as_slice(), &target, earlier, LIMITS).unwrap();
        assert_eq!(tree(&root), wanted);
        first.get_or_insert(replaced);
    }
    drop(first);
    fixture.assert_contained();
}
