//! Tests with trees that have everything that a root file system can have.

use std::{
    ffi::CString,
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileExt as _, PermissionsExt as _, chown, lchown, symlink},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, lsetxattr, makedev, mknodat, utimensat,
};

use super::{CacheFixture, layer, small};
use crate::rootdisk::{
    ext4,
    hashing::{self, HashedTree},
    source_mount::SourceMount,
    tree::SourceTree,
};

/// A name that is not UTF-8, one with characters that shells and parsers stumble over, and the longest one.
fn names() -> [Vec<u8>; 3] {
    [b"\xff\xfe\x80".to_vec(), b" a\"b'c\\d\n:,$e ".to_vec(), vec![b'n'; 255]]
}

/// The value of an ACL with a named user, as setxattr(2) takes it.
fn acl() -> Vec<u8> {
    let mut value = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in
        [(1_u16, 6_u16, u32::MAX), (2, 4, 1000), (4, 4, u32::MAX), (0x10, 4, u32::MAX), (0x20, 0, u32::MAX)]
    {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

/// File capabilities: cap_net_raw+ep, version 2.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Makes the tree; `reverse` makes files and attributes in the other order.
pub(super) fn everything(root: &Path, reverse: bool) {
    fs::create_dir_all(root).unwrap();
    type MakeFile = Box<dyn Fn(&Path)>;
    let mut steps: Vec<MakeFile> = vec![
        Box::new(|root| fs::write(root.join("empty"), "").unwrap()),
        Box::new(|root| fs::write(root.join("text"), "text\n").unwrap()),
        Box::new(|root| fs::write(root.join("blocks"), [7; 3 * 4096]).unwrap()),
        Box::new(|root| fs::write(root.join("zeros"), [0; 9000]).unwrap()),
        Box::new(|root| {
            let file = File::create(root.join("sparse")).unwrap();
            file.set_len(5 << 20).unwrap();
            file.write_all_at(b"middle", (2 << 20) + 5).unwrap();
            file.write_all_at(b"end", (5 << 20) - 3).unwrap();
        }),
        Box::new(|root| {
            fs::write(root.join("setuid"), "s").unwrap();
            fs::set_permissions(root.join("setuid"), fs::Permissions::from_mode(0o6711)).unwrap();
        }),
        Box::new(|root| {
            fs::write(root.join("owned"), "o").unwrap();
            chown(root.join("owned"), Some(70_000), Some(3_000_000_000)).unwrap();
        }),
        Box::new(|root| fs::create_dir_all(root.join("dir/empty dir")).unwrap()),
        Box::new(|root| {
            fs::create_dir(root.join("sticky")).unwrap();
            fs::set_permissions(root.join("sticky"), fs::Permissions::from_mode(0o3777)).unwrap();
        }),
        Box::new(|root| {
            let many = root.join("many");
            fs::create_dir(&many).unwrap();
            (0..300).for_each(|n| {
                fs::write(many.join(format!("{n}{}", "x".repeat(n % 40))), n.to_string()).unwrap();
            });
        }),
        Box::new(|root| {
            let mut deep = root.join("deep");
            (0..40).for_each(|_| deep.push("directory"));
            fs::create_dir_all(&deep).unwrap();
            fs::write(deep.join("file"), "deep").unwrap();
        }),
        Box::new(|root| symlink("text", root.join("short link")).unwrap()),
        Box::new(|root| symlink("x".repeat(59), root.join("inline link")).unwrap()),
        Box::new(|root| symlink("x".repeat(60), root.join("block link")).unwrap()),
        Box::new(|root| symlink("x/".repeat(2047), root.join("long link")).unwrap()),
        Box::new(|root| {
            symlink("nowhere", root.join("owned link")).unwrap();
            lchown(root.join("owned link"), Some(12), Some(13)).unwrap();
        }),
        Box::new(|root| names().iter().for_each(|name| fs::write(root.join(path(name)), name).unwrap())),
        Box::new(|root| {
            let dir = root.join("nodes");
            fs::create_dir(&dir).unwrap();
            for (name, kind, major, minor) in [
                ("null", FileType::CharacterDevice, 1, 3),
                ("big", FileType::CharacterDevice, 0xabc, 0xd_ef12),
                ("loop", FileType::BlockDevice, 7, 255),
                ("fifo", FileType::Fifo, 0, 0),
                ("socket", FileType::Socket, 0, 0),
            ] {
                mknodat(CWD, dir.join(name), kind, Mode::from_raw_mode(0o640), makedev(major, minor))
                    .unwrap();
            }
        }),
    ];
    if reverse {
        steps.reverse();
    }
    steps.iter().for_each(|step| step(root));
    for (from, to) in [
        ("text", "hard"),
        ("text", "dir/hard too"),
        ("nodes/null", "dir/null"),
        ("nodes/fifo", "dir/fifo"),
        ("nodes/socket", "dir/socket"),
        ("short link", "dir/short link"),
        ("short link", "many/one of many"),
        ("block link", "another block link"),
        ("long link", "dir/long link"),
        ("long link", "dir/longer link"),
    ] {
        fs::hard_link(root.join(from), root.join(to)).unwrap();
    }
    let big = vec![0xa5; 900];
    let mut attributes: Vec<(&str, &str, &[u8])> = vec![
        ("setuid", "security.capability", &CAPABILITY),
        ("text", "user.one", b"1"),
        ("text", "user.two", b""),
        ("text", "trusted.three", b"\0binary\xff"),
        ("text", "security.capability", &CAPABILITY),
        ("text", "user.large", &big),
        ("blocks", "user.b", b"long enough not to be alone in the inode: 0123456789"),
        ("blocks", "user.a", b"likewise: 0123456789 0123456789 0123456789 0123456789"),
        ("block link", "trusted.link", b"of a link"),
        ("short link", "trusted.link", b"of a link"),
        ("nodes/null", "trusted.device", b"of a device"),
        ("dir", "user.directory", b"d"),
        ("", "user.root", b"r"),
    ];
    let acl = acl();
    attributes.push(("text", "system.posix_acl_access", &acl));
    attributes.push(("dir", "system.posix_acl_default", &acl));
    if reverse {
        attributes.reverse();
    }
    for (name, attribute, value) in attributes {
        lsetxattr(root.join(name), attribute, value, XattrFlags::empty()).unwrap();
    }
    fs::set_permissions(root, fs::Permissions::from_mode(0o1751)).unwrap();
    chown(root, Some(5), Some(6)).unwrap();
    let walked = SourceTree::walk(&SourceMount::of_dir(root).unwrap()).unwrap();
    for (index, entry) in walked.entries.iter().enumerate().rev() {
        let name = root.join(path(&entry.path));
        let seconds = match index % 5 {
            0 => -2_000_000_000,
            1 => 0,
            2 => 5_000_000_000,
            3 => 15_000_000_000,
            _ => 1_700_000_000,
        };
        if entry.first.is_none() {
            touch(&name, seconds + entry.path.len() as i64, entry.path.len() as i64 * 1001);
        }
    }
}

pub(super) fn path(bytes: &[u8]) -> PathBuf {
    std::ffi::OsStr::from_bytes(bytes).into()
}

/// Sets the modification time, and an access time that must not be found on the disk.
pub(crate) fn touch(path: &Path, seconds: i64, nanoseconds: i64) {
    let last_modification = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let last_access = Timespec { tv_sec: std::process::id().into(), tv_nsec: 0 };
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    utimensat(CWD, &path, &Timestamps { last_access, last_modification }, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

#[test]
fn everything_survives() {
    let fixture = CacheFixture::new();
    let root = fixture.path("root");
    everything(&root, false);
    let disk = fixture.build(&layer(&root)).unwrap();
    let path = disk.path.to_str().unwrap();
    // The disk's own reader, the kernel's, and e2fsck.
    assert_eq!(ext4::manifest(&disk.file).unwrap(), disk.key);
    super::tool("e2fsck", &["-fn", path]);
    let mounted = fixture.path("mounted");
    fs::create_dir(&mounted).unwrap();
    super::tool("mount", &["-o", "ro,loop,noload", path, mounted.to_str().unwrap()]);
    let read = || {
        let mount = SourceMount::of_dir(&mounted)?;
        let tree = SourceTree::walk(&mount)?;
        hashing::hash(&mount, &tree, disk.size, |_| ())
    };
    let read = read();
    super::tool("umount", &["-l", mounted.to_str().unwrap()]);
    assert_eq!(read.unwrap(), HashedTree { key: disk.key, has_trusted: true });
}

/// mke2fs runs once, without the privilege to read attributes of privileged processes, unless there are such.
#[test]
fn only_trees_with_trusted_attributes_are_copied_by_a_privileged_mke2fs() {
    let fixture = CacheFixture::new();
    let root = fixture.path("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("private"), "of a user without rights for others").unwrap();
    fs::set_permissions(root.join("private"), fs::Permissions::from_mode(0o400)).unwrap();
    chown(root.join("private"), Some(7), Some(7)).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).unwrap();
    let runs =
        |disk: &crate::rootdisk::Rootdisk| disk.phases.iter().filter(|(name, _)| *name == "mke2fs").count();
    let ordinary = fixture.build(&layer(&root)).unwrap();
    assert_eq!((runs(&ordinary), ext4::manifest(&ordinary.file).unwrap()), (1, ordinary.key));
    lsetxattr(root.join("private"), "trusted.x", b"y", XattrFlags::empty()).unwrap();
    fs::write(root.join("another shape"), "").unwrap();
    let trusted = fixture.build(&layer(&root)).unwrap();
    assert_eq!((runs(&trusted), ext4::manifest(&trusted.file).unwrap()), (2, trusted.key));
}

#[test]
fn an_image_may_have_a_lost_found_of_its_own() {
    let fixture = CacheFixture::new();
    let root = fixture.path("root");
    fs::create_dir_all(root.join("lost+found/kept")).unwrap();
    let disk = fixture.build(&layer(&root)).unwrap();
    assert_eq!(ext4::manifest(&disk.file).unwrap(), disk.key);
    super::tool("e2fsck", &["-fn", disk.path.to_str().unwrap()]);
    assert!(disk.size == small().min_size && !disk.cached);
}

#[test]
fn the_root_directory_may_have_many_blocks() {
    let fixture = CacheFixture::new();
    let root = fixture.path("root");
    fs::create_dir(&root).unwrap();
    (0..100).for_each(|n| fs::write(root.join(format!("{n:0>200}")), "").unwrap());
    let disk = fixture.build(&layer(&root)).unwrap();
    assert_eq!(ext4::manifest(&disk.file).unwrap(), disk.key);
    super::tool("e2fsck", &["-fn", disk.path.to_str().unwrap()]);
}
