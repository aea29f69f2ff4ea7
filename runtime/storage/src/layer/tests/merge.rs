//! Tests of changes that are merged into a directory that stays in place.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, symlink},
    path::{Path, PathBuf},
};

use tar::EntryType;

use super::{LIMITS, LayerFixture, TestArchive, whole::tree};
use crate::layer::{EarlierExports, LayerError, LayerTarget, store, sweep, sweep_within};

struct Merged {
    fixture: LayerFixture,
    records: tempfile::TempDir,
}

impl Merged {
    fn new() -> Self {
        Self { fixture: LayerFixture::new(), records: tempfile::tempdir().unwrap() }
    }

    fn root(&self) -> PathBuf {
        self.fixture.path("root")
    }

    fn write(&self, files: &[&str]) {
        for file in files {
            let path = self.root().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "old").unwrap();
        }
    }

    fn merge(&self, archive: TestArchive) -> Result<(), LayerError> {
        let target = LayerTarget::InPlace(self.root());
        let record = self.records.path().join("disk.exported");
        let (_, stored) = store(
            archive.bytes().as_slice(),
            &target,
            EarlierExports { before: None, record: &record },
            LIMITS,
        )?;
        stored.sync()?;
        assert!(!record.with_extension("next").exists());
        Ok(())
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.root().join(file)).unwrap()
    }
}

#[test]
fn changes_replace_and_remove_what_was_there() {
    let merged = Merged::new();
    merged.write(&["kept/file", "changed/kept", "changed/removed", "changed/replaced", "gone/deep/file"]);
    merged.write(&["opaque/old/file", "opaque/new", "to-dir", "to-file/old", "to-link"]);
    let before = fs::metadata(merged.root()).unwrap();
    let archive = TestArchive::new()
        .mode(0o751)
        .owner(7, 8)
        .xattr("trusted.kept", "value")
        .dir("changed")
        .file("changed/new", b"new")
        .whiteout("changed/nothing-there")
        .whiteout("changed/removed")
        .file("changed/replaced", b"new")
        .link("changed/second-name", "changed/replaced")
        .whiteout("gone")
        .xattr("trusted.overlay.opaque", "y")
        .dir("opaque")
        .dir("opaque/new")
        .file("opaque/new/file", b"new")
        .dir("to-dir")
        .file("to-dir/new", b"new")
        .file("to-file", b"new")
        .symlink("to-link", "/outside")
        .device(EntryType::Fifo, "fifo", 0, 0);
    merged.merge(archive).unwrap();
    let wanted = [
        "changed",
        "changed/kept",
        "changed/new",
        "changed/replaced",
        "changed/second-name",
        "fifo",
        "kept",
        "kept/file",
        "opaque",
        "opaque/new",
        "opaque/new/file",
        "to-dir",
        "to-dir/new",
        "to-file",
        "to-link",
    ];
    let root = merged.root();
    assert_eq!(tree(&root), wanted);
    assert_eq!(
        ["changed/kept", "changed/replaced", "to-file"].map(|file| merged.read(file)),
        ["old", "new", "new"]
    );
    let changed = fs::metadata(root.join("changed")).unwrap();
    assert_eq!((changed.mode() & 0o7777, changed.uid(), changed.gid(), changed.mtime()), (0o751, 7, 8, 7));
    let mut value = [0; 8];
    let length = rustix::fs::lgetxattr(root.join("changed"), "trusted.kept", &mut value[..]).unwrap();
    assert_eq!(&value[..length], b"value");
    for dir in ["opaque", "changed"] {
        assert!(rustix::fs::lgetxattr(root.join(dir), "trusted.overlay.opaque", &mut [0; 8][..]).is_err());
    }
    let names =
        ["changed/replaced", "changed/second-name"].map(|name| fs::metadata(root.join(name)).unwrap().ino());
    assert_eq!(names[0], names[1]);
    // The directory is still the same one.
    assert_eq!(fs::metadata(&root).unwrap().ino(), before.ino());
    merged.fixture.assert_contained();
}

#[test]
fn attributes_that_the_container_has_removed_are_removed() {
    let merged = Merged::new();
    merged.merge(TestArchive::new().xattr("trusted.a", "1").xattr("trusted.b", "1").dir("dir")).unwrap();
    merged.merge(TestArchive::new().xattr("trusted.b", "2").dir("dir")).unwrap();
    let dir = merged.root().join("dir");
    let mut value = [0; 8];
    assert!(rustix::fs::lgetxattr(&dir, "trusted.a", &mut value[..]).is_err());
    assert_eq!(rustix::fs::lgetxattr(&dir, "trusted.b", &mut value[..]), Ok(1));
    assert_eq!(value[0], b'2');
}

#[test]
fn no_link_is_followed() {
    let merged = Merged::new();
    symlink("../outside", merged.root().join("dir")).unwrap();
    symlink("../outside/file", merged.root().join("file")).unwrap();
    symlink("../outside", merged.root().join("gone")).unwrap();
    symlink("../outside", merged.root().join("opaque")).unwrap();
    let archive = TestArchive::new()
        .dir("dir")
        .whiteout("dir/file")
        .file("file", b"new")
        .whiteout("gone")
        .xattr("trusted.overlay.opaque", "y")
        .dir("opaque");
    merged.merge(archive).unwrap();
    assert_eq!(tree(&merged.root()), ["dir", "file", "opaque"]);
    merged.fixture.assert_contained();
}

/// No lower layer has such a file, so the container's archive has no mark for it.
#[test]
fn what_an_earlier_export_has_put_there_is_removed_again() {
    let merged = Merged::new();
    merged.write(&["users", "dir/users"]);
    let first = TestArchive::new()
        .dir("dir")
        .file("dir/first", b"")
        .dir("own")
        .file("own/first", b"")
        .dir("to-file")
        .file("to-file/first", b"");
    merged.merge(first).unwrap();
    fs::write(merged.root().join("own/users"), "").unwrap();
    merged.merge(TestArchive::new().dir("dir").file("second", b"").file("to-file", b"")).unwrap();
    assert_eq!(tree(&merged.root()), ["dir", "dir/users", "second", "to-file", "users"]);
    merged.merge(TestArchive::new().dir("dir")).unwrap();
    assert_eq!(tree(&merged.root()), ["dir", "dir/users", "users"]);
    assert_eq!(fs::metadata(merged.root().join("dir")).unwrap().mtime(), 7);
    merged.fixture.assert_contained();
}

#[test]
fn an_archive_that_is_refused_changes_nothing() {
    let merged = Merged::new();
    merged.write(&["dir/file"]);
    merged.merge(TestArchive::new().file("new", b"x").whiteout("dir").file("new", b"y")).unwrap_err();
    assert_eq!(tree(&merged.root()), ["dir", "dir/file"]);
    merged.fixture.assert_contained();
}

/// A kill in the middle leaves a part of the changes. The disk still has all of them.
#[test]
fn a_second_merge_completes_the_first() {
    let archive = || {
        let opaque = TestArchive::new().whiteout("gone").xattr("trusted.overlay.opaque", "y").dir("opaque");
        opaque.file("opaque/new", b"new").dir("to-dir").file("to-dir/new", b"new")
    };
    let merged = Merged::new();
    for present in
        [&["gone/file", "opaque/new", "to-dir/new"][..], &["opaque/old", "to-dir"], &["opaque"], &[]]
    {
        merged.write(present);
        merged.merge(archive()).unwrap();
        assert_eq!(tree(&merged.root()), ["opaque", "opaque/new", "to-dir", "to-dir/new"]);
        fs::remove_dir_all(merged.root()).unwrap();
        fs::create_dir(merged.root()).unwrap();
    }
}

/// Mounts a tmpfs at the path in a mount namespace of this thread.
fn mounted(at: &Path, work: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let mount = || {
            use nix::mount::{MsFlags, mount};
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            mount(Some("none"), at, Some("tmpfs"), MsFlags::empty(), none).unwrap();
            work();
        };
        scope.spawn(mount).join().unwrap();
    });
}

#[test]
fn a_mount_point_receives_changes() {
    let merged = Merged::new();
    mounted(&merged.root(), || {
        merged.write(&["old"]);
        merged.merge(TestArchive::new().whiteout("old").dir("dir").file("dir/new", b"new")).unwrap();
        assert_eq!(tree(&merged.root()), ["dir", "dir/new"]);
    });
    assert_eq!(tree(&merged.root()), [""; 0]);
    merged.fixture.assert_contained();
}

#[test]
fn what_is_mounted_in_the_directory_is_not_touched() {
    let merged = Merged::new();
    merged.write(&["dir/hidden"]);
    let dir = merged.root().join("dir");
    mounted(&dir, || {
        fs::write(dir.join("file"), "").unwrap();
        for archive in [
            TestArchive::new().whiteout("dir"),
            TestArchive::new().dir("dir").whiteout("dir/file"),
            TestArchive::new().xattr("trusted.overlay.opaque", "y").dir("dir"),
            TestArchive::new().file("dir", b""),
        ] {
            let error = merged.merge(archive).unwrap_err();
            assert!(matches!(error, LayerError::Write { .. }), "{error}");
            assert_eq!(tree(&dir), ["file"]);
        }
    });
    merged.fixture.assert_contained();
}

#[test]
fn what_a_killed_merge_has_left_is_swept() {
    use crate::layer::StagingDir;
    let merged = Merged::new();
    let root = merged.root();
    let running = StagingDir::on_file_system_of(&root).unwrap();
    fs::create_dir_all(root.join(".machinen-root-killed/fresh")).unwrap();
    fs::create_dir(merged.fixture.path(".machinen-root-killed")).unwrap();
    sweep(&root).unwrap();
    sweep_within(&root).unwrap();
    assert_eq!(tree(&root), [""; 0]);
    assert!(running.fresh_path().exists(), "an export that is running is left alone");
    drop(running);
    merged.fixture.assert_contained();
}

/// Of a file that both have changed, the last one's content stays.
#[test]
fn two_containers_in_one_directory() {
    let merged = Merged::new();
    merged.write(&["both"]);
    let target = LayerTarget::InPlace(merged.root());
    for name in ["one", "two"] {
        let record = merged.records.path().join(name);
        let archive = TestArchive::new().file("both", name.as_bytes()).file(name, b"");
        store(archive.bytes().as_slice(), &target, EarlierExports { before: None, record: &record }, LIMITS)
            .unwrap();
    }
    assert_eq!(tree(&merged.root()), ["both", "one", "two"]);
    assert_eq!(merged.read("both"), "two");
}
