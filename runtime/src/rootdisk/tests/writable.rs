//! Writable layers.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::{Fixture, tool};
use crate::error::{ErrorKind, Kind as _};
use crate::rootdisk::open_writable;

const SIZE: u64 = 4 << 30;

#[test]
fn a_layer_is_an_empty_file_system_of_its_own() {
    let fixture = Fixture::new();
    let (first, second) = (fixture.path("first"), fixture.path("second"));
    let file = fixture.cache.create_writable(&first, SIZE - 1, Path::new("mke2fs")).unwrap();
    let metadata = file.metadata().unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o777), (SIZE, 0o600));
    assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
    tool("e2fsck", &["-fn", first.to_str().unwrap()]);

    // The guest writes; the next layer is empty all the same, and needs no mke2fs.
    let mounted = fixture.path("mounted");
    fs::create_dir(&mounted).unwrap();
    let (disk, dir) = (first.display(), mounted.display());
    let script = format!("mount -o loop {disk} {dir} && head -c 1M /dev/urandom >{dir}/file; umount {dir}");
    tool("unshare", &["--mount", "sh", "-ec", &script]);
    fixture.cache.create_writable(&second, SIZE, Path::new("/nowhere")).unwrap();
    tool("e2fsck", &["-fn", second.to_str().unwrap()]);
    let allocated = |path| fs::metadata(path).unwrap().blocks() * 512;
    assert!(allocated(&first) > 1 << 20 && allocated(&second) < 1 << 20);
    assert_eq!(fixture.leftovers().len(), 2, "only the template and its metadata: {:?}", fixture.leftovers());
}

#[test]
fn a_damaged_template_is_made_anew() {
    let fixture = Fixture::new();
    let create =
        |name: &str| fixture.cache.create_writable(&fixture.path(name), 16 << 20, Path::new("mke2fs"));
    create("first").unwrap();
    let template = fixture.leftovers().into_iter().find(|path| path.extension().unwrap() == "ext4").unwrap();
    let before = fs::metadata(&template).unwrap();
    let mut bytes = fs::read(&template).unwrap();
    let last = bytes.iter().rposition(|&byte| byte != 0).unwrap();
    bytes[last] ^= 1;
    fs::write(&template, bytes).unwrap();
    super::tree::touch(&template, before.mtime(), before.mtime_nsec());
    create("second").unwrap();
    assert!(fs::read(fixture.path("first")).unwrap() == fs::read(fixture.path("second")).unwrap());
}

#[test]
fn what_a_container_wrote_is_never_overwritten() {
    let fixture = Fixture::new();
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
