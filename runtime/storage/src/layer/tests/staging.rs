//! Tests of the exchange: the old or the new layer is in place, and nothing else is left.

use std::{fs, path::Path};

use super::{LIMITS, LayerFixture, TestArchive};
use crate::layer::{LayerError, StagingDir, apply, sweep};

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_new_layer_takes_the_place_of_the_old_one() {
    let fixture = LayerFixture::new();
    let upper = fixture.path("root");
    fs::write(upper.join("old"), "").unwrap();
    let staging = StagingDir::next_to(&upper).unwrap();
    apply(TestArchive::new().file("new", b"x").bytes().as_slice(), staging.fresh(), None, LIMITS).unwrap();
    assert_eq!(names(&upper), ["old"]);
    let replaced = staging.exchange().unwrap();
    assert_eq!(names(&upper), ["new"]);
    replaced.sync().unwrap();
    drop(replaced);
    fixture.assert_contained();
}

#[test]
fn a_mounted_layer_stays_in_place_and_gets_the_new_content() {
    let fixture = LayerFixture::new();
    let upper = fixture.path("root");
    fs::create_dir_all(upper.join("dir/deep")).unwrap();
    fs::write(upper.join("old"), "").unwrap();
    let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    let before = inode(&upper);
    let staging = StagingDir::next_to(&upper).unwrap();
    apply(TestArchive::new().file("new", b"x").bytes().as_slice(), staging.fresh(), None, LIMITS).unwrap();
    let replaced = staging.exchange_content().unwrap();
    assert_eq!((names(&upper), inode(&upper)), (vec!["new".to_owned()], before));
    replaced.sync().unwrap();
    drop(replaced);
    fixture.assert_contained();
}

#[test]
fn a_failure_leaves_the_old_layer_and_nothing_else() {
    let fixture = LayerFixture::new();
    let upper = fixture.path("root");
    fs::write(upper.join("old"), "").unwrap();
    let staging = StagingDir::next_to(&upper).unwrap();
    let archive = TestArchive::new().file("new", b"x").file("new", b"y").bytes();
    apply(archive.as_slice(), staging.fresh(), None, LIMITS).unwrap_err();
    drop(staging);
    assert_eq!(names(&upper), ["old"]);
    fixture.assert_contained();
}

#[test]
fn what_a_killed_export_left_is_swept() {
    let fixture = LayerFixture::new();
    let (upper, other) = (fixture.path("root"), fixture.path("root-2"));
    let killed = fixture.path(".machinen-root-killed/fresh/d");
    fs::create_dir_all(&killed).unwrap();
    fs::write(killed.join("f"), "x").unwrap();
    // The staging directory of a layer with a similar name is kept.
    fs::create_dir(&other).unwrap();
    let neighbours = StagingDir::next_to(&other).unwrap();
    sweep(&upper).unwrap();
    assert_eq!(names(fixture.dir.path()).len(), 4);
    neighbours.exchange().unwrap();
    fs::remove_dir(&other).unwrap();
    fixture.assert_contained();
}

#[test]
fn a_mount_point_cannot_be_replaced() {
    let fixture = LayerFixture::new();
    let error = StagingDir::next_to(Path::new("/proc")).map(|staging| staging.exchange().map(drop));
    let error = match error {
        Ok(result) => result.unwrap_err(),
        // With a read-only root file system the staging directory cannot be made.
        Err(error) => error,
    };
    assert!(matches!(error, LayerError::MountPoint { .. } | LayerError::File(_)), "{error}");
    fixture.assert_contained();
}
