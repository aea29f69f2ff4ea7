//! Tests of writable layers.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use machinen_base::{
    error::{ErrorKind, HasKind as _},
    process::Spawn,
};

use super::{CacheFixture, tool};
use crate::rootdisk::open_writable;

const SIZE: u64 = 4 << 30;

#[test]
fn a_layer_is_an_empty_file_system_of_its_own() {
    let fixture = CacheFixture::new();
    let (first, second) = (fixture.path("first"), fixture.path("second"));
    let file = fixture.cache.create_writable(&first, SIZE - 1, Path::new("mke2fs")).unwrap();
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
    fixture.cache.create_writable(&second, SIZE, Path::new("/nowhere")).unwrap();
    tool("e2fsck", &["-fn", second.to_str().unwrap()]);
    let allocated = |path| fs::metadata(path).unwrap().blocks() * 512;
    assert!(allocated(&first) > 1 << 20 && allocated(&second) < 1 << 20);
    assert_eq!(fixture.leftovers().len(), 2, "only the blank and its metadata: {:?}", fixture.leftovers());
}

#[test]
fn a_damaged_blank_is_made_again() {
    let fixture = CacheFixture::new();
    let create =
        |name: &str| fixture.cache.create_writable(&fixture.path(name), 16 << 20, Path::new("mke2fs"));
    create("first").unwrap();
    let blank = fixture.leftovers().into_iter().find(|path| path.extension().unwrap() == "ext4").unwrap();
    let before = fs::metadata(&blank).unwrap();
    let mut bytes = fs::read(&blank).unwrap();
    let last = bytes.iter().rposition(|&byte| byte != 0).unwrap();
    bytes[last] ^= 1;
    fs::write(&blank, bytes).unwrap();
    super::tree::touch(&blank, before.mtime(), before.mtime_nsec());
    create("second").unwrap();
    assert!(fs::read(fixture.path("first")).unwrap() == fs::read(fixture.path("second")).unwrap());
}

#[test]
fn what_a_container_wrote_is_never_overwritten() {
    let fixture = CacheFixture::new();
    let path = fixture.path("layer");
    let create = || fixture.cache.create_writable(&path, 16 << 20, Path::new("mke2fs"));
    create().unwrap();
    let error = create().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(open_writable(&path).unwrap().metadata().unwrap().len(), 16 << 20);
    for (content, what) in [(vec![], "is too short"), (vec![0; 4096], "is not an ext4 file system")] {
        fs::write(&path, content).unwrap();
        let text = open_writable(&path).unwrap_err().to_string();
        assert!(text.starts_with(&format!("the writable layer {} {what}", path.display())), "{text}");
    }
    fs::remove_file(&path).unwrap();
    assert_eq!(open_writable(&path).unwrap_err().kind(), ErrorKind::NotFound);
    let error = fixture.cache.create_writable(&path, u64::MAX >> 1, Path::new("mke2fs")).unwrap_err();
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
    let file = fixture.cache.seed_writable(&disk, SIZE, &upper, Path::new("mke2fs")).unwrap();
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
    let error = fixture.cache.seed_writable(&disk, 64 << 20, &upper, Path::new("mke2fs")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    assert!(error.to_string().contains("io.machinen.rootdisk-size"), "{error}");
    assert!(!disk.exists());
}
