//! Tests of what a hostile guest may send: it is refused, and nothing outside of the fresh directory changes.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::fd::AsFd as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use machinen_base::{
    error::{ErrorKind, HasKind as _, chain},
    space::DiskReserve,
};
use proptest::prelude::*;
use tar::EntryType;

use super::{LIMITS, LayerFixture, Repeated, TestArchive};
use crate::{
    layer::{EarlierExports, LayerError, LayerLimits, LayerTarget, apply, store},
    rootdisk::tests::tool,
};

fn refused(what: &str, archive: TestArchive) {
    let fixture = LayerFixture::new();
    let error = chain(&fixture.apply(archive).expect_err(what));
    assert!(error.contains(what), "{what:?} is not in {error:?}");
    fixture.assert_contained();
}

/// Counts log lines.
#[derive(Default)]
struct LogLines(std::sync::atomic::AtomicUsize);

impl tracing::Subscriber for LogLines {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn many_device_nodes_are_few_lines() {
    let fixture = LayerFixture::new();
    let archive = (0..900)
        .fold(TestArchive::new(), |archive, n| archive.device(EntryType::Block, &format!("sda{n}"), 8, n));
    let lines = Arc::new(LogLines::default());
    let dispatch = tracing::Dispatch::new(Arc::clone(&lines));
    let applied = tracing::dispatcher::with_default(&dispatch, || fixture.apply(archive)).unwrap();
    assert_eq!(applied.devices_left_out, 900);
    assert_eq!(lines.0.load(Ordering::Relaxed), 4);
}

#[test]
fn paths_that_lead_elsewhere() {
    refused("absolute", TestArchive::new().file("/outside/new", b"x"));
    refused("\"..\"", TestArchive::new().file("../outside/new", b"x"));
    refused("\"..\"", TestArchive::new().dir("a").file("a/../../outside/new", b"x"));
    refused("\"..\"", TestArchive::new().dir(".."));
    refused("empty component", TestArchive::new().dir("a").file("a//b", b"x"));
    refused("empty component", TestArchive::new().file("./a", b"x"));
    refused("empty component", TestArchive::new().file("", b"x"));
    refused("zero", TestArchive::new().record("path", "a\0b").file("a", b"x"));
    refused("too long a name", TestArchive::new().file("n".repeat(256), b"x"));
    refused("too long a path", TestArchive::new().file("n/".repeat(2001), b"x"));
    refused("too many directories", TestArchive::new().dir("d/".repeat(513)));
}

#[test]
fn links_that_lead_elsewhere() {
    for target in ["../outside", "/", "/etc", "."] {
        refused("comes before its directory", TestArchive::new().symlink("a", target).file("a/new", b"x"));
        refused("comes twice", TestArchive::new().symlink("a", target).dir("a"));
        refused("comes twice", TestArchive::new().symlink("a", target).file("a", b"x"));
    }
    refused("absolute", TestArchive::new().link("a", "/outside/file"));
    refused("\"..\"", TestArchive::new().link("a", "../outside/file"));
    refused("not a file of the archive", TestArchive::new().symlink("s", "../outside").link("a", "s/file"));
    refused("not a file of the archive", TestArchive::new().link("a", "missing"));
    refused("not a file of the archive", TestArchive::new().dir("d").link("a", "d"));
    refused("not a file of the archive", TestArchive::new().file("f", b"").link("a", "f/x"));
    refused("the root", TestArchive::new().link("a", "."));
    refused("link to nothing", TestArchive::new().symlink("a", ""));
    // Later entries do not follow a link: only its own owner, mode and time change.
    let fixture = LayerFixture::new();
    let archive = TestArchive::new().owner(5, 5).mode(0o777).symlink("a", "../outside/file");
    fixture.apply(archive.symlink("b", "../outside")).unwrap();
    fixture.assert_contained();
    let outside = fs::metadata(fixture.path("outside/file")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&outside), 0);
}

#[test]
fn names_that_come_twice_or_out_of_order() {
    refused("comes twice", TestArchive::new().file("a", b"x").file("a", b"y"));
    refused("comes twice", TestArchive::new().dir("a").dir("a"));
    refused("comes twice", TestArchive::new().dir("a").file("a", b"x"));
    refused("comes twice", TestArchive::new().file("a", b"x").dir("a"));
    refused("comes twice", TestArchive::new().whiteout("a").symlink("a", "b"));
    refused("comes twice", TestArchive::new().file("a", b"").file("b", b"").link("b", "a"));
    refused("comes before its directory", TestArchive::new().file("a", b"x").file("a/b", b"x"));
    refused("comes before its directory", TestArchive::new().file("a/b", b"x"));
    refused("long after it", TestArchive::new().dir("a").dir("b").file("a/c", b"x"));
    refused("comes twice, or is not a directory", TestArchive::new().dir("."));
    refused("comes before the root", TestArchive::without_root().file("a", b"x"));
    refused("comes twice, or is not a directory", TestArchive::without_root().file(".", b"x"));
    refused("is empty", TestArchive::without_root());
}

#[test]
fn kinds_and_records_that_no_agent_sends() {
    for kind in [b'L', b'K', b'g', b'S', b'7', b'Z', b'D', b'M'] {
        refused("unexpected type", TestArchive::new().entry(EntryType::new(kind), "a", |_| (), b""));
    }
    refused(
        "although it is not a regular file",
        TestArchive::new().entry(EntryType::Directory, "a", |_| (), b"x"),
    );
    for kind in ["regular", "directory", "", "socket\0", "block special"] {
        let entry = |archive: TestArchive| archive.entry(EntryType::Fifo, "a", |_| (), b"");
        refused("unexpected type", entry(TestArchive::new().record("SCHILY.filetype", kind)));
    }
    let marked_as_socket = || TestArchive::new().record("SCHILY.filetype", "socket");
    refused("although it is something else", marked_as_socket().file("a", b""));
    refused("although it is something else", marked_as_socket().dir("a"));
    refused("although it is something else", marked_as_socket().symlink("a", "b"));
    refused("although it is something else", marked_as_socket().device(EntryType::Block, "a", 8, 0));
    refused(
        "although it is something else",
        TestArchive::new().file("f", b"").record("SCHILY.filetype", "socket").link("a", "f"),
    );
    refused("has data", marked_as_socket().entry(EntryType::Fifo, "a", |_| (), b"data"));
    refused("unexpected record", TestArchive::new().record("size", "5").file("a", b"x"));
    refused("unexpected record", TestArchive::new().record("GNU.sparse.map", "0,5").file("a", b"x"));
    refused("impossible time", TestArchive::new().record("mtime", "soon").file("a", b"x"));
    refused("impossible owner", TestArchive::new().owner(1 << 32, 0).file("a", b"x"));
    for name in [
        "trusted.overlay.metacopy",
        "trusted.overlay.redirect",
        "security.selinux",
        "security.ima",
        "system.x",
        "",
    ] {
        refused("a container's file may not have", TestArchive::new().xattr(name, "x").file("a", b"x"));
    }
    refused(
        "a container's file may not have",
        TestArchive::new().xattr("trusted.overlay.opaque", "x").dir("a"),
    );
    refused(
        "a container's file may not have",
        TestArchive::new().xattr(&format!("user.{}", "x".repeat(255)), "x").dir("a"),
    );
    refused(
        "two extended headers",
        TestArchive::new().record("path", "a").entry(EntryType::XHeader, "x", |_| (), b""),
    );
    refused(
        "ends with an extended header",
        TestArchive::new().entry(EntryType::XHeader, "x", |_| (), b"10 path=a\n"),
    );
    refused(
        "malformed",
        TestArchive::new().entry(EntryType::XHeader, "x", |_| (), b"nonsense").file("a", b""),
    );
}

#[test]
fn malformed_maps_of_holes() {
    let sparse = |full: &str, content: &[u8]| {
        let archive = TestArchive::new().record("GNU.sparse.major", "1").record("GNU.sparse.minor", "0");
        archive.record("GNU.sparse.realsize", full).file("a", content)
    };
    let map = |text: &str| {
        let mut map = text.as_bytes().to_vec();
        map.resize(512, 0);
        map
    };
    refused("overlapping", sparse("100", &map("2\n0\n8\n4\n8\n")));
    refused("beyond its end", sparse("100", &map("1\n96\n8\n")));
    refused("beyond its end", sparse("100", &map("1\n18446744073709551615\n8\n")));
    refused("too many holes", sparse("100", &map("1048577\n")));
    refused("not a list of numbers", sparse("100", &map("1\n-1\n8\n")));
    refused("too large a number", sparse("100", &map(&format!("1\n{}", "0".repeat(400)))));
    refused("incomplete", sparse("100", b""));
    refused("incomplete", sparse("100", &map(&format!("900\n{}", "1\n".repeat(254)))));
    refused("more or less data", sparse("100", &map("1\n0\n8\n")));
    refused("more or less data", sparse("100", &map("0\n").repeat(2)));
    refused("set the size of", sparse("18446744073709551615", &map("0\n")));
    refused("unknown format", TestArchive::new().record("GNU.sparse.major", "0").file("a", b""));
    refused("not a regular file", TestArchive::new().record("GNU.sparse.major", "1").dir("a"));
}

#[test]
fn more_than_the_limits() {
    let fixture = LayerFixture::new();
    let root = || TestArchive::new().bytes()[..512].to_vec();
    let endless = |make: fn(u64) -> TestArchive| Repeated {
        // An archive without its end.
        make: move |n| {
            let bytes = make(n).bytes();
            bytes[..bytes.len() - 1024].to_vec()
        },
        current: io::Cursor::new(root()),
        number: 0,
    };
    let names = endless(|n| TestArchive::without_root().file(n.to_string(), b""));
    assert!(matches!(fixture.apply_bytes(names), Err(LayerError::Entries { limit: 1000 })));

    let fixture = LayerFixture::new();
    let big = endless(|n| TestArchive::without_root().file(n.to_string(), &[7; 1 << 20]));
    assert!(matches!(fixture.apply_bytes(big), Err(LayerError::Bytes { .. })));

    // Each of the file's bytes takes a block.
    let fixture = LayerFixture::new();
    let pieces: Vec<_> = (0..20_000_u64).map(|n| (n * 8192, &b"x"[..])).collect();
    let archive = TestArchive::new().sparse("a", 1 << 40, &pieces);
    assert!(matches!(fixture.apply(archive), Err(LayerError::Bytes { .. })));

    // Long links and attributes take a block each, short ones nothing but their inode.
    let bytes = |archive| LayerFixture::new().apply(archive).unwrap().bytes;
    let short = bytes(TestArchive::new().symlink("a", "short"));
    assert_eq!(bytes(TestArchive::new().symlink("a", &"l".repeat(100))), short + 4096);
    let file = bytes(TestArchive::new().file("a", b""));
    assert_eq!(bytes(TestArchive::new().xattr("user.a", "b").file("a", b"")), file);
    assert_eq!(bytes(TestArchive::new().xattr("user.a", [7; 200]).file("a", b"")), file + 4096);

    // A size beyond the limits is refused without waiting for the data; so is that of an extended header.
    for (kind, what) in [(EntryType::Regular, "MiB"), (EntryType::XHeader, "too long an extended header")] {
        let fixture = LayerFixture::new();
        let mut bytes = TestArchive::new().entry(kind, "a", |header| header.set_size(1 << 60), b"").bytes();
        bytes.truncate(bytes.len() - 1024);
        let error = chain(&fixture.apply_bytes(bytes.chain(io::repeat(0))).unwrap_err());
        assert!(error.contains(what), "{error}");
    }

    // Data after the end of the archive is not read forever.
    let fixture = LayerFixture::new();
    let error = fixture.apply_bytes(TestArchive::new().bytes().chain(io::repeat(0))).unwrap_err();
    assert!(error.to_string().contains("continues after"), "{error}");
}

/// Reads a file of the host while it is read itself, as a parser that an archive has taken over might.
struct Reaching<'a> {
    archive: &'a [u8],
    file: &'a Path,
    reached: Arc<AtomicBool>,
}

impl Read for Reaching<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reached.fetch_or(File::open(self.file).is_ok(), Ordering::Relaxed);
        self.archive.read(buffer)
    }
}

#[test]
fn an_archive_is_unpacked_by_a_thread_that_reaches_no_other_file() {
    let dir = tempfile::tempdir().unwrap();
    let (target, outside) = (dir.path().join("upper"), dir.path().join("outside"));
    fs::create_dir(&target).unwrap();
    fs::write(&outside, "").unwrap();
    let reached = Arc::new(AtomicBool::new(false));
    let bytes = TestArchive::new().file("file", b"x").bytes();
    let archive = Reaching { archive: &bytes, file: &outside, reached: Arc::clone(&reached) };
    let earlier = EarlierExports { before: None, record: Path::new("/nowhere") };
    store(archive, &LayerTarget::Upper(target.clone()), earlier, LIMITS).unwrap();
    assert_eq!(fs::read(target.join("file")).unwrap(), b"x");
    assert!(!reached.load(Ordering::Relaxed));
}

#[test]
fn an_export_leaves_the_host_what_is_kept_free() {
    let dir = tempfile::tempdir().unwrap();
    tool("mount", &["-t", "tmpfs", "-o", "size=16m", "tmpfs", dir.path().to_str().unwrap()]);
    let limits = LayerLimits { reserve: DiskReserve::percent(50), ..LIMITS };
    let content = vec![7; 3 << 20];
    let names = ["1", "2", "3", "4"];
    let archive = names.into_iter().fold(TestArchive::new(), |archive, name| archive.file(name, &content));
    let root = File::open(dir.path()).unwrap();
    let result = apply(archive.bytes().as_slice(), root.as_fd(), None, limits);
    let space = limits.reserve.space(&root).unwrap();
    let whole = |name: &&&str| fs::metadata(dir.path().join(name)).is_ok_and(|file| file.len() == 3 << 20);
    let made: Vec<_> = names.iter().filter(whole).collect();
    tool("umount", &["-l", dir.path().to_str().unwrap()]);
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    assert!(
        matches!(error, LayerError::NoSpace { .. }) && error.to_string().contains("8 MiB are kept"),
        "{error}"
    );
    assert!(space.usable() > 0 && made.len() == 2, "{made:?}: {space:?}");
}

#[test]
fn an_archive_that_is_cut_short() {
    let whole = TestArchive::new().dir("d").xattr("user.a", "b").file("d/f", &[7; 1000]).bytes();
    // The archive is complete without the two blocks at its end.
    for length in (0..whole.len() - 1024).step_by(64).filter(|length| length % 512 != 0) {
        let fixture = LayerFixture::new();
        fixture.apply_bytes(&whole[..length]).expect_err("it is cut short");
    }
}

/// Few names and targets, so that entries collide.
fn entries() -> impl Strategy<Value = Vec<(u8, String, String)>> {
    let name = prop_oneof![
        Just("a"),
        Just("b"),
        Just("a/a"),
        Just("a/b"),
        Just("b/a"),
        Just("a/a/a"),
        Just("../outside/file"),
        Just("."),
        Just("a/../../outside/new"),
        Just("/outside/new"),
        Just("b/file"),
    ];
    let target = prop_oneof![
        Just("a"),
        Just("b"),
        Just("../outside"),
        Just("../outside/file"),
        Just("/"),
        Just("a/b"),
        Just("."),
        Just("b/file"),
    ];
    prop::collection::vec((0_u8..7, name.prop_map(str::to_owned), target.prop_map(str::to_owned)), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn any_order_of_entries_stays_inside(entries in entries()) {
        let fixture = LayerFixture::new();
        let mut archive = TestArchive::new().owner(3, 3);
        for (kind, path, target) in &entries {
            archive = match kind {
                0 => archive.dir(path),
                1 => archive.file(path, b"data"),
                2 => archive.symlink(path, target),
                3 => archive.link(path, target),
                4 => archive.whiteout(path),
                5 => archive.device(EntryType::Block, path, 8, 0),
                _ => archive.sparse(path, 1 << 20, &[(4096, b"data")]),
            };
        }
        let applied = fixture.apply(archive);
        fixture.assert_contained();
        if let Ok(applied) = applied {
            prop_assert_eq!(applied.entries, entries.len() as u64 + 1);
        }
    }

    #[test]
    fn any_damage_stays_inside(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let fixture = LayerFixture::new();
        let mut bytes = TestArchive::new()
            .dir("d")
            .xattr("user.a", "b")
            .file("d/f", b"data")
            .symlink("d/s", "../../outside")
            .sparse("d/z", 1 << 20, &[(4096, b"data")])
            .link("l", "d/f")
            .bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
            // An attacker would correct the checksum.
            let block = &mut bytes[at / 512 * 512..][..512];
            if block.iter().any(|&byte| byte != 0) {
                let mut header = tar::Header::from_byte_slice(block).clone();
                header.set_cksum();
                block.copy_from_slice(header.as_bytes());
            }
        }
        let applied = fixture.apply_bytes(bytes.as_slice());
        fixture.assert_contained();
        if let Ok(applied) = applied {
            prop_assert!(applied.bytes <= LIMITS.bytes);
        }
    }
}
