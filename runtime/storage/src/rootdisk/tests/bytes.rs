//! Tests that the bytes of a disk depend on its tree alone.

use std::{fs, path::Path};

use super::{
    CacheFixture, layer, tool,
    tree::{everything, touch},
};
use crate::rootdisk::{RootdiskKey, RootfsSource};

fn built(source: &RootfsSource) -> (RootdiskKey, Vec<u8>) {
    let fixture = CacheFixture::new();
    let disk = fixture.build(source).unwrap();
    (disk.key, fs::read(&disk.path).unwrap())
}

fn assert_same((key, bytes): &(RootdiskKey, Vec<u8>), (other_key, other): &(RootdiskKey, Vec<u8>)) {
    assert_eq!(key, other_key);
    if bytes != other {
        let different = bytes.iter().zip(other).position(|(a, b)| a != b);
        panic!("{} and {} bytes, first different at {different:?}", bytes.len(), other.len());
    }
}

#[test]
fn order_time_and_file_system_of_the_source_do_not_matter() {
    let (fixture, memory) = (CacheFixture::new(), tempfile::tempdir_in("/dev/shm").unwrap());
    let (first, second, third) = (fixture.path("first"), fixture.path("second"), memory.path().join("third"));
    everything(&first, false);
    everything(&second, true);
    // The root directory's time depends on when the image was unpacked.
    touch(&second, 99, 0);
    let disk = built(&layer(&first));
    assert_same(&disk, &built(&layer(&second)));
    assert_same(&disk, &built(&RootfsSource::Dir(first)));
    // tmpfs has no user attributes before Linux 6.6, so the tree is copied with what both have.
    let copy = |from: &Path, to: &Path| {
        let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
        tool("cp", &["-a", "--no-preserve=xattr", from, to]);
    };
    copy(&second, &third);
    let fourth = fixture.path("fourth");
    copy(&second, &fourth);
    assert_same(&built(&layer(&third)), &built(&layer(&fourth)));
}

#[test]
fn layers_are_merged_as_overlayfs_does() {
    let fixture = CacheFixture::new();
    let (lower, upper, flat) = (fixture.path("lo:w,er"), fixture.path("upper"), fixture.path("flat"));
    for (dir, files) in [
        (&lower, &["kept", "gone", "dir/old"][..]),
        (&upper, &["added", "dir/new"]),
        (&flat, &["kept", "added", "dir/new"]),
    ] {
        for file in files {
            let path = dir.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, file).unwrap();
            touch(&path, 7, 0);
        }
        touch(&dir.join("dir"), 8, 0);
    }
    tool("mknod", &[upper.join("gone").to_str().unwrap(), "c", "0", "0"]);
    let create = rustix::fs::XattrFlags::CREATE;
    rustix::fs::lsetxattr(upper.join("dir"), "trusted.overlay.opaque", b"y", create).unwrap();
    let both = RootfsSource::Overlay { lowers: vec![upper, lower] };
    assert_same(&built(&both), &built(&RootfsSource::Dir(flat)));
}

#[test]
fn more_layers_than_fit_into_mount_options() {
    let fixture = CacheFixture::new();
    let lowers: Vec<_> = (0..130)
        .map(|n| {
            let dir = fixture.path(&format!("a layer with a rather long name, number {n}"));
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join(n.to_string()), "").unwrap();
            dir
        })
        .collect();
    let disk = fixture.build(&RootfsSource::Overlay { lowers }).unwrap();
    let listed = fixture.cache.list().unwrap();
    assert_eq!((listed[0].key, listed[0].metadata.as_ref().unwrap().files), (disk.key, 131));
}
