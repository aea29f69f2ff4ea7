//! Tests of containers' writable disks; they need root and mke2fs.

use std::{fs, os::unix::fs::MetadataExt as _};

use machinen_base::{
    error::{ErrorKind, HasKind as _},
    process::Spawn,
    space::DiskReserve,
};

use super::{
    ContainerDiskOptions, ContainerDiskPlan, PendingDisk, blank, from_archive, open_remaining, seed,
};
use crate::rootdisk::tests::{CacheFixture, tool, tree::touch};

const SIZE: u64 = 4 << 30;

fn options(fixture: &CacheFixture, size: u64) -> ContainerDiskOptions {
    ContainerDiskOptions {
        cache: fixture.cache.dir().to_owned(),
        size,
        mke2fs: "mke2fs".into(),
        reserve: DiskReserve::default(),
    }
}

#[test]
fn a_disk_that_would_take_what_is_kept_free_is_not_made() {
    let fixture = CacheFixture::new();
    let upper = fixture.path("upper");
    fs::create_dir(&upper).unwrap();
    let full = ContainerDiskOptions { reserve: DiskReserve::percent(100), ..options(&fixture, SIZE) };
    let path = fixture.path("disk");
    let refused = [
        blank::create(&path, &full).unwrap_err(),
        blank::scratch(&full).unwrap_err(),
        seed::create(&path, &upper, &full).unwrap_err(),
    ];
    for error in refused {
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        assert!(error.to_string().contains("(rootdisk.disk_reserve_percent)"), "{error}");
    }
    assert!(!path.exists());
    blank::create(&path, &options(&fixture, SIZE)).unwrap();
}

#[test]
fn a_layer_is_an_empty_file_system_of_its_own() {
    let fixture = CacheFixture::new();
    let (first, second) = (fixture.path("first"), fixture.path("second"));
    let file = blank::create(&first, &options(&fixture, SIZE - 1)).unwrap();
    let metadata = file.metadata().unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o777), (SIZE, 0o600));
    assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
    tool("e2fsck", &["-fn", first.to_str().unwrap()]);

    // The guest writes. The next layer is empty nevertheless, and needs no mke2fs.
    let mounted = fixture.path("mounted");
    fs::create_dir(&mounted).unwrap();
    let (disk, dir) = (first.display(), mounted.display());
    let script = format!("mount -o loop {disk} {dir} && head -c 1M /dev/urandom >{dir}/file; umount {dir}");
    tool("unshare", &["--mount", "sh", "-ec", &script]);
    let without_mke2fs = ContainerDiskOptions { mke2fs: "/nowhere".into(), ..options(&fixture, SIZE) };
    blank::create(&second, &without_mke2fs).unwrap();
    tool("e2fsck", &["-fn", second.to_str().unwrap()]);
    let allocated = |path| fs::metadata(path).unwrap().blocks() * 512;
    assert!(allocated(&first) > 1 << 20 && allocated(&second) < 1 << 20);
    assert_eq!(fixture.leftovers().len(), 2, "only the blank and its metadata: {:?}", fixture.leftovers());
}

/// An archive as the agent packs it: a directory and a file in it.
fn archive() -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, kind, content) in [
        (".", tar::EntryType::Directory, &b""[..]),
        ("dir", tar::EntryType::Directory, b""),
        ("dir/file", tar::EntryType::Regular, b"written"),
    ] {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).unwrap();
        header.set_entry_type(kind);
        header.set_mode(0o750);
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(1);
        header.set_size(content.len() as u64);
        header.set_cksum();
        archive.append(&header, content).unwrap();
    }
    archive.into_inner().unwrap()
}

/// Directories in which archives were unpacked.
fn unpacked(fixture: &CacheFixture) -> usize {
    let entries = fs::read_dir(fixture.cache.dir()).unwrap().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(".machinen-")).count()
}

#[test]
fn a_disk_is_made_of_an_archive() {
    use std::os::fd::AsRawFd as _;
    let fixture = CacheFixture::new();
    let file = from_archive(archive().as_slice(), &options(&fixture, SIZE), 100).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    tool("e2fsck", &["-fn", &path]);
    let script = format!("debugfs -R 'cat /upper/dir/file' {path} 2>/dev/null | grep -qx written");
    tool("sh", &["-c", &script]);
    assert_eq!((file.metadata().unwrap().nlink(), unpacked(&fixture)), (0, 0));
    assert!(fixture.leftovers().is_empty(), "{:?}", fixture.leftovers());
}

#[test]
fn what_is_no_archive_of_an_agent_is_refused_and_leaves_nothing() {
    let fixture = CacheFixture::new();
    let options = options(&fixture, SIZE);
    let whole = archive();
    for (bytes, entries) in [(&whole[..1000], 100), (b"no archive", 100), (&whole[..], 2)] {
        from_archive(bytes, &options, entries).unwrap_err();
        assert_eq!(unpacked(&fixture), 0);
    }
    // What a killed process has unpacked.
    let left = fixture.cache.dir().join(".machinen-archived-abc123");
    fs::create_dir_all(left.join("fresh/dir")).unwrap();
    super::sweep_archives(fixture.cache.dir()).unwrap();
    assert!(!left.exists());
}

#[test]
fn a_damaged_blank_is_made_again() {
    let fixture = CacheFixture::new();
    let create = |name: &str| blank::create(&fixture.path(name), &options(&fixture, 16 << 20));
    create("first").unwrap();
    let blank = fixture.leftovers().into_iter().find(|path| path.extension().unwrap() == "ext4").unwrap();
    let before = fs::metadata(&blank).unwrap();
    let mut bytes = fs::read(&blank).unwrap();
    let last = bytes.iter().rposition(|&byte| byte != 0).unwrap();
    bytes[last] ^= 1;
    fs::write(&blank, bytes).unwrap();
    touch(&blank, before.mtime(), before.mtime_nsec());
    create("second").unwrap();
    assert!(fs::read(fixture.path("first")).unwrap() == fs::read(fixture.path("second")).unwrap());
}

#[test]
fn what_a_container_wrote_is_never_overwritten() {
    let fixture = CacheFixture::new();
    let path = fixture.path("layer");
    let create = || blank::create(&path, &options(&fixture, 16 << 20));
    create().unwrap();
    let error = create().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(open_remaining(&path).unwrap().metadata().unwrap().len(), 16 << 20);
    for (content, what) in [(vec![], "is too short"), (vec![0; 4096], "is not an ext4 file system")] {
        fs::write(&path, content).unwrap();
        let text = open_remaining(&path).unwrap_err().to_string();
        assert!(text.starts_with(&format!("the writable layer {} {what}", path.display())), "{text}");
    }
    fs::remove_file(&path).unwrap();
    assert_eq!(open_remaining(&path).unwrap_err().kind(), ErrorKind::NotFound);
    let error = blank::create(&path, &options(&fixture, u64::MAX >> 1)).unwrap_err();
    assert!(error.to_string().ends_with("the largest is 16 TiB"), "{error}");
}

/// Lists a tree: all properties of its files except the sizes of directories, and all attributes.
const LISTING: &str = "cd \"$1\" && find . -type d -printf '%P %y %m %U %G %T@\\n' -o -printf '%P %y %m %U %G %T@ %s %n %l\\n' | sort; \
                       find . -type c -exec stat -c '%n %t %T' {} + | sort; \
                       find . -type f -exec md5sum {} + | sort; \
                       find . ! -type d -links +1 -printf '%i %P\\n' | sort -k2 | \
                       awk '{ if (!($1 in first)) first[$1] = $2; print first[$1], $2 }'";

#[test]
fn a_seeded_layer_has_the_upper_directorys_files() {
    let fixture = CacheFixture::new();
    let (upper, disk) = (fixture.path("upper"), fixture.path("disk"));
    let long = "n".repeat(255);
    let script = format!(
        "mkdir -p {0}/etc {0}/opaque {0}/many; cd {0}; echo a > one; ln one two; mknod etc/gone c 0 0; chmod 751 .; \
         chown 3:4 .; mkfifo fifo; \
         cp /bin/true setuid; chown 7:8 setuid; chmod 4755 setuid; cp /bin/true opaque/cap; setcap cap_net_raw+p opaque/cap; \
         mknod null c 1 3; ln null null2; ln fifo fifo2; chown 5:6 fifo; \
         python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"socket\")'; chmod 640 socket; ln socket etc/socket; \
         ln -s nowhere short; ln short short2; ln short many/short; chown -h 9:9 short; \
         ln -s $(head -c 3000 /dev/zero | tr '\\0' x) far; ln far etc/far; \
         truncate -s 64M sparse; echo x >> sparse; ln -s {long} link; touch {long}; \
         for i in $(seq 300); do echo $i > many/$i; done; touch -d '2001-02-03 04:05:06.789012345' many/7 many etc . ; \
         touch -h -d '1950-01-01 00:00:00.5' link",
        upper.display()
    );
    tool("sh", &["-ec", &script]);
    let xattrs = [
        ("opaque", "trusted.overlay.opaque", "y"),
        ("one", "user.x", "two\nlines"),
        (".", "trusted.z", "z"),
        ("short", "trusted.s", "of a link"),
        ("etc/socket", "trusted.s", "of a socket"),
    ];
    for file in [".", "one", "many"] {
        // The mark refers to a file of the host.
        let create = rustix::fs::XattrFlags::CREATE;
        rustix::fs::lsetxattr(upper.join(file), "trusted.overlay.origin", b"handle", create).unwrap();
    }
    for (file, key, value) in xattrs {
        rustix::fs::lsetxattr(upper.join(file), key, value.as_bytes(), rustix::fs::XattrFlags::CREATE)
            .unwrap();
    }
    let file = seed::create(&disk, &upper, &options(&fixture, SIZE)).unwrap();
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    assert!(
        file.metadata().unwrap().blocks() * 512 < 8 << 20,
        "{} blocks",
        file.metadata().unwrap().blocks()
    );
    let disk_path = disk.to_str().unwrap();
    tool("e2fsck", &["-fn", disk_path]);
    let mounted = fixture.path("mounted");
    fs::create_dir(&mounted).unwrap();
    let (listing, wanted, found) = (fixture.path("listing"), fixture.path("wanted"), fixture.path("found"));
    fs::write(&listing, LISTING).unwrap();
    let script = format!(
        "sh {listing} {upper} > {wanted}; mount -o loop,noatime {disk} {dir}; sh {listing} {dir}/upper > {found}; \
         ls {dir} > {found}.root; echo more > {dir}/upper/more; umount {dir}",
        listing = listing.display(),
        upper = upper.display(),
        wanted = wanted.display(),
        disk = disk.display(),
        dir = mounted.display(),
        found = found.display(),
    );
    tool("unshare", &["--mount", "sh", "-ec", &script]);
    assert_eq!(fs::read_to_string(&found).unwrap(), fs::read_to_string(&wanted).unwrap());
    assert_eq!(fs::read_to_string(found.with_extension("root")).unwrap(), "upper\n");
    // The journal works.
    tool("e2fsck", &["-fn", disk_path]);
    // debugfs(8) shows attributes of a disk without mounting it.
    let all = [&xattrs[..], &[("opaque/cap", "security.capability", "")]].concat();
    for (file, key, value) in all {
        let request = format!("ea_get -V upper/{file} {key}");
        let output = Spawn::new("debugfs").args(["-R", &request, disk_path]).run().unwrap();
        let mut wanted = vec![0; 100];
        let length = rustix::fs::lgetxattr(upper.join(file), key, wanted.as_mut_slice()).unwrap();
        assert_eq!(output.stdout.strip_suffix(b"\n").unwrap(), &wanted[..length], "{file} {key} {value}");
    }
    for file in [".", "one", "many"] {
        let request = format!("ea_list upper/{file}");
        let output = Spawn::new("debugfs").args(["-R", &request, disk_path]).run().unwrap();
        assert!(!String::from_utf8_lossy(&output.stdout).contains("origin"), "{file}");
    }
}

#[test]
fn an_upper_directory_that_does_not_fit_is_refused() {
    let fixture = CacheFixture::new();
    let (upper, disk) = (fixture.path("upper"), fixture.path("disk"));
    fs::create_dir(&upper).unwrap();
    fs::write(upper.join("big"), vec![7; 64 << 20]).unwrap();
    let error = seed::create(&disk, &upper, &options(&fixture, 64 << 20)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    assert!(error.to_string().contains("io.machinen.rootdisk-size"), "{error}");
    assert!(!disk.exists());
}

#[test]
fn a_new_disk_is_removed_unless_its_container_is_created() {
    let fixture = CacheFixture::new();
    let (upper, path) = (fixture.path("fs"), fixture.path("machinen-writable.ext4"));
    fs::create_dir(&upper).unwrap();
    let plan = ContainerDiskPlan::Upper { path: path.clone(), upper, mount: None };
    let options = options(&fixture, 16 << 20);
    let (_, pending) = plan.open(&options).unwrap();
    assert!(path.exists());
    drop(pending);
    assert!(!path.exists());
    let (_, pending) = plan.open(&options).unwrap();
    assert!(pending.keep(None).is_clean());
    // The VM was killed. The next container gets the disk, and a failed creation does not remove it.
    let (_, pending) = plan.open(&options).unwrap();
    drop(pending);
    let (_, pending) = plan.open(&options).unwrap();
    let disk = pending.keep(None);
    assert!(!disk.is_clean() && path.exists());
    disk.discard().unwrap();
    assert!(!path.exists());
    disk.discard().unwrap();
}

#[test]
fn a_disk_of_the_caller_is_only_opened() {
    let fixture = CacheFixture::new();
    let path = fixture.path("disk");
    let plan = ContainerDiskPlan::Existing { path: path.clone(), read_only: true };
    let error = plan.open(&options(&fixture, 16 << 20)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    fs::write(&path, "anything").unwrap();
    let (mut file, pending) = plan.open(&options(&fixture, 16 << 20)).unwrap();
    assert!(std::io::Write::write(&mut file, b"x").is_err());
    drop(pending);
    assert!(path.exists());
}

#[test]
fn containers_in_one_directory_have_disks_of_their_own() {
    let fixture = CacheFixture::new();
    let root = fixture.path("root");
    fs::create_dir(&root).unwrap();
    let plan = ContainerDiskPlan::InPlace { root };
    let open = || plan.open(&options(&fixture, 16 << 20)).unwrap();
    let kept = |(file, pending): (_, PendingDisk)| {
        drop::<fs::File>(file);
        pending.keep(None)
    };
    let (first, second) = (kept(open()), kept(open()));
    assert!(first.path() != second.path() && first.is_clean() && second.is_clean());
    // The first container ends, and its changes are exported; those of the second one are not.
    let record = first.path().with_extension("exported");
    fs::write(&record, "").unwrap();
    first.discard().unwrap();
    assert!(!first.path().exists() && !record.exists());
    let (left, path) = (second.path().to_owned(), first.path().to_owned());
    let third = kept(open());
    assert_eq!(third.path(), path);
    drop(second);
    // The next one gets the disk that is left.
    let fourth = kept(open());
    assert!(fourth.path() == left && !fourth.is_clean());
}
