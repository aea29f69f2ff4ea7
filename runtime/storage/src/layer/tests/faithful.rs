//! Tests that what the agent sends is reproduced exactly.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
};

use rustix::fs::lgetxattr;
use tar::EntryType;

use super::{LayerFixture, TestArchive};

#[test]
fn owners_modes_times_and_content() {
    let fixture = LayerFixture::new();
    let archive = TestArchive::without_root()
        .owner(7, 8)
        .mode(0o751)
        .dir(".")
        .owner(4_294_967_294, 65534)
        .mode(0o4755)
        .record("mtime", "-1.5")
        .file("setuid", b"content")
        .mode(0o1777)
        .record("mtime", "1700000000.123456789")
        .dir("tmp")
        .mode(0o600)
        .file("tmp/empty", b"")
        .entry(EntryType::Fifo, "tmp/fifo", |_| (), b"")
        .symlink("tmp/link", "/nowhere/../at all");
    let applied = fixture.apply(archive).unwrap();
    assert_eq!((applied.entries, applied.devices_left_out), (6, 0));
    let status = |name: &str| fs::symlink_metadata(fixture.path("root").join(name)).unwrap();
    let seen = |name| {
        let status = status(name);
        (status.mode() & 0o7777, status.uid(), status.gid(), status.mtime(), status.mtime_nsec())
    };
    assert_eq!(seen(""), (0o751, 7, 8, 7, 0));
    assert_eq!(seen("setuid"), (0o4755, 4_294_967_294, 65534, -2, 500_000_000));
    // The directory's own time, although a file was added to it later.
    assert_eq!(seen("tmp"), (0o1777, 4_294_967_294, 65534, 1_700_000_000, 123_456_789));
    assert_eq!(seen("tmp/fifo"), (0o600, 4_294_967_294, 65534, 7, 0));
    assert!(status("tmp/fifo").file_type().is_fifo());
    assert_eq!(fs::read_link(fixture.path("root/tmp/link")).unwrap().to_str(), Some("/nowhere/../at all"));
    assert_eq!((status("tmp/link").uid(), status("tmp/link").mtime()), (4_294_967_294, 7));
    assert_eq!(fs::read(fixture.path("root/setuid")).unwrap(), b"content");
}

#[test]
fn attributes_and_marks() {
    let fixture = LayerFixture::new();
    // Version 2, cap_net_raw in the permitted set; one byte of it ends a line.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0x0a, 0, 0, 0, 0, 0, 0, 0];
    let archive = TestArchive::new()
        .xattr("trusted.overlay.opaque", "y")
        .dir("opaque")
        .xattr("trusted.overlay.overlay.opaque", "y")
        .dir("opaque/nested")
        .device(EntryType::Block, "opaque/nested/sda", 8, 0)
        .device(EntryType::Char, "opaque/nested/null", 1, 3)
        .xattr("security.capability", capability)
        .xattr("user.lines", "one\ntwo\n")
        .owner(1000, 1000)
        .file("ping", b"x")
        .xattr("trusted.of-a-link", "v")
        .symlink("link", "ping")
        .whiteout("removed")
        .device(EntryType::Char, "null", 1, 3)
        .device(EntryType::Char, "mem", 1, 1)
        .device(EntryType::Block, "sda", 8, 0);
    let applied = fixture.apply(archive).unwrap();
    assert_eq!(applied.devices_left_out, 3);
    let root = fixture.path("root");
    let xattr = |name: &str, key: &str| {
        let mut value = vec![0; 100];
        let length = lgetxattr(root.join(name), key, value.as_mut_slice()).unwrap();
        value.truncate(length);
        value
    };
    assert_eq!(xattr("opaque", "trusted.overlay.opaque"), b"y");
    assert_eq!(xattr("opaque/nested", "trusted.overlay.overlay.opaque"), b"y");
    assert_eq!(xattr("ping", "security.capability"), capability);
    assert_eq!(xattr("ping", "user.lines"), b"one\ntwo\n");
    assert_eq!(xattr("link", "trusted.of-a-link"), b"v");
    let device = |name: &str| {
        let status = fs::symlink_metadata(root.join(name)).unwrap();
        (status.file_type().is_char_device(), status.rdev())
    };
    assert_eq!(device("removed"), (true, 0));
    assert_eq!(device("null"), (true, 0x103));
    // No node that opens the host's memory or disks is made, and no file of the image becomes visible
    // instead.
    assert_eq!(device("mem"), (true, 0));
    assert_eq!(device("sda"), (true, 0));
    // In an opaque directory a mark would only be a name that cannot be looked up.
    assert!(fs::symlink_metadata(root.join("opaque/nested/sda")).is_err());
    assert_eq!(device("opaque/nested/null"), (true, 0x103));
}

#[test]
fn hard_links_and_holes() {
    let fixture = LayerFixture::new();
    let archive = TestArchive::new()
        .dir("a")
        .file("a/one", b"same")
        .symlink("a/symlink", "one")
        .dir("b")
        .link("b/two", "a/one")
        .link("b/symlink", "a/symlink")
        .sparse("holes", (1 << 30) + 5, &[(4096, b"data"), (1 << 29, &[7; 8192])])
        .sparse("only-a-hole", 1 << 40, &[])
        .link("three", "a/one");
    let applied = fixture.apply(archive).unwrap();
    assert!(applied.bytes < 64 << 10, "{applied:?}");
    let status = |name: &str| fs::symlink_metadata(fixture.path("root").join(name)).unwrap();
    assert_eq!(status("a/one").nlink(), 3);
    assert_eq!(status("a/one").ino(), status("b/two").ino());
    assert_eq!(status("a/symlink").ino(), status("b/symlink").ino());
    assert_eq!((status("holes").len(), status("only-a-hole").len()), ((1 << 30) + 5, 1 << 40));
    assert!(status("holes").blocks() * 512 <= 32 << 10, "{} blocks", status("holes").blocks());
    let file = fs::File::open(fixture.path("root/holes")).unwrap();
    let mut buffer = [1; 6];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut buffer, 4095).unwrap();
    assert_eq!(&buffer, b"\0data\0");
}

#[test]
fn sockets_are_names_with_owners_and_modes() {
    let fixture = LayerFixture::new();
    let archive = TestArchive::new()
        .dir("run")
        .owner(33, 34)
        .mode(0o660)
        .record("mtime", "1234.5")
        .xattr("trusted.of-a-socket", "v")
        .socket("run/socket")
        .link("run/same", "run/socket")
        .entry(EntryType::Fifo, "run/fifo", |_| (), b"");
    fixture.apply(archive).unwrap();
    let status = |name: &str| fs::symlink_metadata(fixture.path("root/run").join(name)).unwrap();
    let socket = status("socket");
    assert!(socket.file_type().is_socket() && status("fifo").file_type().is_fifo());
    assert_eq!((socket.mode() & 0o7777, socket.uid(), socket.gid()), (0o660, 33, 34));
    assert_eq!((socket.mtime(), socket.mtime_nsec()), (1234, 500_000_000));
    assert_eq!((socket.ino(), socket.nlink()), (status("same").ino(), 2));
    let mut value = [0; 9];
    let length =
        lgetxattr(fixture.path("root/run/socket"), "trusted.of-a-socket", value.as_mut_slice()).unwrap();
    assert_eq!(&value[..length], b"v");
}

#[test]
fn names_as_long_as_names_get() {
    let fixture = LayerFixture::new();
    let name = "n".repeat(255);
    let mut archive = TestArchive::new();
    let mut path = String::new();
    for _ in 0..15 {
        path = if path.is_empty() { name.clone() } else { format!("{path}/{name}") };
        archive = archive.dir(&path);
    }
    let deepest = format!("{path}/\u{fffd}\u{1}\n");
    let archive = archive.file(&deepest, b"deep").symlink("long", &"t/".repeat(2000));
    fixture.apply(archive).unwrap();
    assert_eq!(fs::read(fixture.path("root").join(deepest)).unwrap(), b"deep");
    assert_eq!(fs::read_link(fixture.path("root/long")).unwrap().as_os_str().len(), 4000);
}

#[test]
fn directories_may_end_at_any_depth() {
    let fixture = LayerFixture::new();
    let archive = TestArchive::new()
        .dir("a")
        .dir("a/b")
        .dir("a/b/c")
        .file("a/b/c/d", b"1")
        .file("a/e", b"2")
        .dir("f")
        .file("f/g", b"3")
        .file("h", b"4");
    fixture.apply(archive).unwrap();
    for path in ["", "a", "a/b", "a/b/c", "f", "f/g", "h"] {
        assert_eq!(fs::metadata(fixture.path("root").join(path)).unwrap().mtime(), 7, "{path}");
    }
}
