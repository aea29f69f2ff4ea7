//! Tests of copying a layer for another container.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};

use rustix::fs::{CWD, FileType, Mode, XattrFlags, getxattr, mknodat, setxattr};

use super::*;
use crate::layer::{LayerCopy, LayerTarget, identity};

fn layers(dir: &Path) -> (PathBuf, PathBuf, LayerCopy) {
    let (from, to) = (dir.join("1/fs"), dir.join("2/fs"));
    fs::create_dir_all(&from).unwrap();
    fs::create_dir_all(&to).unwrap();
    let layers =
        LayerCopy::Directories { from: LayerTarget::Upper(from.clone()), to: LayerTarget::Upper(to.clone()) };
    (from, to, layers)
}

#[test]
fn everything_of_a_layer_is_copied_and_nothing_is_shared() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (from, to, layers) = layers(dir.path());
    fs::create_dir(from.join("sub")).unwrap();
    setxattr(from.join("sub"), "trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
    fs::write(from.join("sub/file"), "written").unwrap();
    fs::hard_link(from.join("sub/file"), from.join("other")).unwrap();
    symlink("/etc/shadow", from.join("link")).unwrap();
    mknodat(CWD, from.join("removed"), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    File::create(from.join("holes")).unwrap().set_len(64 << 20).unwrap();
    fs::set_permissions(&from, fs::Permissions::from_mode(0o1701)).unwrap();
    fs::write(to.join("before"), "").unwrap();
    layers.copy(Some(&identity(&from).unwrap())).unwrap();
    assert!(!to.join("before").exists());
    assert_eq!(fs::read_to_string(to.join("sub/file")).unwrap(), "written");
    let inode = |path: PathBuf| fs::symlink_metadata(path).unwrap().ino();
    assert_eq!(inode(to.join("sub/file")), inode(to.join("other")));
    assert_ne!(inode(to.join("sub/file")), inode(from.join("sub/file")));
    assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/etc/shadow"));
    let removed = fs::symlink_metadata(to.join("removed")).unwrap();
    assert!(removed.file_type().is_char_device() && removed.rdev() == 0);
    assert!(fs::metadata(to.join("holes")).unwrap().blocks() < 64);
    assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o7777, 0o1701);
    let mut value = [0; 8];
    assert_eq!(getxattr(to.join("sub"), "trusted.overlay.opaque", &mut value[..]).unwrap(), 1);
    assert_eq!(fs::read_dir(dir.path().join("2")).unwrap().count(), 1, "something is left next to it");
}

#[test]
fn another_layer_than_the_checkpoints_is_refused() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (from, to, layers) = layers(dir.path());
    let then = identity(&from).unwrap();
    fs::write(to.join("before"), "").unwrap();
    fs::rename(&from, dir.path().join("old")).unwrap();
    fs::create_dir(&from).unwrap();
    for recorded in [Some(then.as_str()), None] {
        assert!(matches!(layers.copy(recorded), Err(LayerError::Exchanged { .. })));
    }
    assert!(to.join("before").exists());
    assert_eq!(fs::read_dir(dir.path().join("2")).unwrap().count(), 1);
}

#[test]
fn a_disk_is_copied_in_place() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (from, to) = (dir.path().join("a"), dir.path().join("b"));
    let disk = File::create(&from).unwrap();
    disk.set_len(64 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, b"data", 1 << 20).unwrap();
    fs::write(&to, "other").unwrap();
    let inode = fs::metadata(&to).unwrap().ino();
    let layers = LayerCopy::Disks { from: from.clone(), to: to.clone() };
    assert!(layers.is_live());
    layers.copy(None).unwrap();
    let copy = fs::metadata(&to).unwrap();
    assert_eq!((copy.ino(), copy.len()), (inode, 64 << 20));
    assert!(copy.blocks() < 1024, "the holes are filled: {} blocks", copy.blocks());
    assert_eq!(fs::read(&to).unwrap(), fs::read(&from).unwrap());
}
