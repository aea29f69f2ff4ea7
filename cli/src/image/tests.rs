//! Images of all forms, and hostile ones, made by the tests.

use std::{
    io::Write as _,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use super::*;

struct Lab {
    dir: tempfile::TempDir,
    cache: ImageCache,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cache = ImageCache::open(&dir.path().join("cache")).unwrap();
        Self { dir, cache }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn prepare(&self, name: &str, reference: Option<&str>) -> Result<ReadyImage, ImageError> {
        prepare(&self.path(name), reference, &self.cache, &mut |_| {})
    }

    fn unpacked(&self, name: &str) -> PathBuf {
        self.prepare(name, None).unwrap().root.path().to_owned()
    }

    fn refused(&self, name: &str) -> String {
        let error = self.prepare(name, None).unwrap_err();
        let left = fs::read_dir(self.path("cache/images")).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
        assert!(left.is_empty(), "{left:?}");
        machinen::error::chain(&error)
    }
}

enum Made<'a> {
    File(&'a str, &'a [u8]),
    Dir(&'a str, u32),
    Symlink(&'a str, &'a str),
    Hardlink(&'a str, &'a str),
    Other(&'a str, EntryType),
}

fn tar(entries: &[Made<'_>]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for entry in entries {
        let mut header = Header::new_gnu();
        header.set_mode(0o644);
        header.set_mtime(1000);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(0);
        let (name, content, target): (&str, &[u8], &str) = match entry {
            Made::File(name, content) => {
                header.set_entry_type(EntryType::Regular);
                header.set_size(content.len() as u64);
                (name, content, "")
            }
            Made::Dir(name, mode) => {
                header.set_entry_type(EntryType::Directory);
                header.set_mode(*mode);
                (name, &[], "")
            }
            Made::Symlink(name, target) => {
                header.set_entry_type(EntryType::Symlink);
                (name, &[], target)
            }
            Made::Hardlink(name, target) => {
                header.set_entry_type(EntryType::Link);
                (name, &[], target)
            }
            Made::Other(name, kind) => {
                header.set_entry_type(*kind);
                (name, &[], "")
            }
        };
        // Past the checks of the crate, which would refuse hostile names.
        let bytes = header.as_old_mut();
        bytes.name[..name.len()].copy_from_slice(name.as_bytes());
        bytes.linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        tar.append(&header, content).unwrap();
    }
    tar.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    machinen::fs::hex(&Sha256::digest(bytes))
}

fn architecture() -> String {
    oci_spec::image::Arch::default().to_string()
}

fn config(diffs: &[String]) -> Value {
    let diffs: Vec<_> = diffs.iter().map(|diff| format!("sha256:{diff}")).collect();
    json!({
        "architecture": architecture(), "os": "linux", "config": { "Cmd": ["sh"], "Env": ["A=1"] },
        "rootfs": { "type": "layers", "diff_ids": diffs },
    })
}

/// Files of an image layout with the layers.
fn layout(layers: &[Vec<u8>]) -> Vec<(String, Vec<u8>)> {
    let mut files = vec![("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec())];
    let mut add = |bytes: Vec<u8>, media: &str| {
        let digest = sha256(&bytes);
        let entry = json!({ "mediaType": media, "digest": format!("sha256:{digest}"), "size": bytes.len() });
        files.push((format!("blobs/sha256/{digest}"), bytes));
        entry
    };
    let diffs: Vec<_> = layers.iter().map(|layer| sha256(layer)).collect();
    let entries: Vec<_> =
        layers.iter().map(|layer| add(gzip(layer), "application/vnd.oci.image.layer.v1.tar+gzip")).collect();
    let config = add(config(&diffs).to_string().into_bytes(), "application/vnd.oci.image.config.v1+json");
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config,
        "layers": entries,
    });
    let mut entry = add(manifest.to_string().into_bytes(), "application/vnd.oci.image.manifest.v1+json");
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "one:1" });
    let index = json!({ "schemaVersion": 2, "manifests": [entry] });
    files.push(("index.json".to_owned(), index.to_string().into_bytes()));
    files
}

fn write_dir(dir: &Path, files: &[(String, Vec<u8>)]) {
    for (name, bytes) in files {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

fn write_archive(path: &Path, files: &[(String, Vec<u8>)], compressed: bool) {
    let entries: Vec<_> = files.iter().map(|(name, bytes)| Made::File(name, bytes)).collect();
    let tar = tar(&entries);
    fs::write(path, if compressed { gzip(&tar) } else { tar }).unwrap();
}

fn two_layers() -> Vec<Vec<u8>> {
    let lower = tar(&[
        Made::Dir("etc/", 0o755),
        Made::File("etc/a", b"lower"),
        Made::File("etc/b", b"stays"),
        Made::Dir("opaque/", 0o700),
        Made::File("opaque/old", b"x"),
        Made::Dir("usr/lib/", 0o755),
        Made::Symlink("lib", "usr/lib"),
        Made::File("gone", b"x"),
        Made::Hardlink("hard", "etc/b"),
    ]);
    let upper = tar(&[
        Made::File("etc/a", b"upper"),
        Made::File("opaque/new", b"y"),
        Made::File("opaque/.wh..wh..opq", b""),
        Made::File(".wh.gone", b""),
        Made::File("lib/through", b"z"),
        Made::Other("dev/sda", EntryType::Block),
    ]);
    vec![lower, upper]
}

fn check_two_layers(root: &Path) {
    let read = |name: &str| fs::read_to_string(root.join(name)).unwrap();
    assert_eq!((read("etc/a"), read("etc/b")), ("upper".to_owned(), "stays".to_owned()));
    assert!(!root.join("gone").exists() && !root.join("opaque/old").exists());
    assert_eq!(read("opaque/new"), "y");
    assert_eq!(read("usr/lib/through"), "z");
    assert!(root.join("lib").is_symlink());
    assert_eq!(root.join("hard").metadata().unwrap().ino(), root.join("etc/b").metadata().unwrap().ino());
    let opaque = root.join("opaque").metadata().unwrap();
    assert_eq!((opaque.permissions().mode() & 0o7777, opaque.mtime()), (0o700, 1000));
    assert!(!root.join("dev/sda").exists());
    assert!(!root.join(".wh.gone").exists() && !root.join("opaque/.wh..wh..opq").exists());
}

#[test]
fn an_image_is_the_same_in_every_form_and_unpacked_once() {
    let lab = Lab::new();
    let layers = two_layers();
    let files = layout(&layers);
    write_dir(&lab.path("layout"), &files);
    write_archive(&lab.path("oci.tar"), &files, false);
    write_archive(&lab.path("oci.tar.gz"), &files, true);
    let diffs: Vec<_> = layers.iter().map(|layer| sha256(layer)).collect();
    let config = config(&diffs).to_string().into_bytes();
    let name = format!("{}.json", sha256(&config));
    let manifest =
        json!([{ "Config": name, "RepoTags": ["two:2"], "Layers": ["0/layer.tar", "1/layer.tar"] }]);
    let docker = vec![
        (name, config),
        ("0/layer.tar".to_owned(), layers[0].clone()),
        ("1/layer.tar".to_owned(), layers[1].clone()),
        ("manifest.json".to_owned(), manifest.to_string().into_bytes()),
    ];
    write_archive(&lab.path("docker.tar"), &docker, false);
    let first = lab.unpacked("layout");
    check_two_layers(&first);
    for form in ["oci.tar", "oci.tar.gz", "docker.tar"] {
        let image = lab.prepare(form, None).unwrap();
        assert_eq!(image.root.path(), first, "{form}");
        assert_eq!(image.config.cmd().as_deref(), Some(&["sh".to_owned()][..]));
    }
    assert_eq!(lab.prepare("docker.tar", Some("two:2")).unwrap().name, "two:2");
    assert_eq!(lab.prepare("layout", Some("one:1")).unwrap().name, "one:1");
    let error = lab.prepare("layout", Some("other")).unwrap_err().to_string();
    assert!(error.contains("\"other\"") && error.contains("one:1"), "{error}");
}

#[test]
fn a_tar_and_a_directory_are_root_file_systems() {
    let lab = Lab::new();
    fs::write(lab.path("root.tar"), tar(&[Made::Dir("./", 0o711), Made::File("./a/b/c", b"1")])).unwrap();
    let root = lab.unpacked("root.tar");
    assert_eq!(fs::read(root.join("a/b/c")).unwrap(), b"1");
    assert_eq!(root.metadata().unwrap().permissions().mode() & 0o7777, 0o711);
    fs::create_dir(lab.path("dir")).unwrap();
    assert!(matches!(lab.prepare("dir", None), Err(ImageError::EmptyDir { .. })));
    fs::write(lab.path("dir/file"), "x").unwrap();
    assert!(matches!(lab.prepare("dir", None).unwrap().root, ImageRoot::Dir(_)));
    assert!(matches!(lab.prepare("dir", Some("x")), Err(ImageError::NoChoice { .. })));
    assert!(matches!(lab.prepare("none", None), Err(ImageError::Missing { .. })));
    fs::write(lab.path("text"), "this is no archive, whatever its name says".repeat(50)).unwrap();
    assert!(matches!(lab.prepare("text", None), Err(ImageError::NotAnArchive { .. })));
}

#[test]
fn damage_is_found_before_anything_is_used() {
    for (number, what) in ["manifest", "config", "layer"].iter().enumerate() {
        let lab = Lab::new();
        let mut files = layout(&two_layers());
        // The order of `layout`: the layout file, two layers, the configuration, the manifest.
        let damaged = [4, 3, 1][number];
        let last = files[damaged].1.len() - 1;
        files[damaged].1[last] ^= 1;
        write_dir(&lab.path("layout"), &files);
        let error = lab.refused("layout");
        assert!(error.contains("damaged") && error.contains("blobs/sha256/"), "{what}: {error}");
    }
    let lab = Lab::new();
    let mut files = layout(&two_layers());
    files.remove(1);
    write_dir(&lab.path("layout"), &files);
    assert!(lab.refused("layout").contains("has no file"));
}

#[test]
fn a_hostile_archive_makes_nothing_outside() {
    let lab = Lab::new();
    fs::create_dir(lab.path("outside")).unwrap();
    fs::write(lab.path("outside/file"), "host").unwrap();
    let outside = lab.path("outside").display().to_string();
    let up = "../".repeat(10) + &outside[1..];
    let through_link = [Made::Symlink("out", &outside), Made::File("out/evil", b"x")];
    let through_up = [Made::Symlink("out", &up), Made::File("out/evil", b"x")];
    let over_link = [Made::Symlink("f", "/outside/file"), Made::File("f", b"x")];
    let dir_over_link = [Made::Symlink("d", &outside), Made::Dir("d", 0o755), Made::File("d/evil", b"x")];
    let hard = [Made::Symlink("out", &outside), Made::Hardlink("h", "out/file")];
    for (number, entries) in
        [&through_link[..], &through_up, &over_link, &dir_over_link, &hard].iter().enumerate()
    {
        let name = format!("hostile{number}.tar");
        fs::write(lab.path(&name), tar(entries)).unwrap();
        // What the image's own root has there may be made.
        let _ = lab.prepare(&name, None);
        assert_eq!(fs::read_to_string(lab.path("outside/file")).unwrap(), "host", "{number}");
        assert_eq!(fs::read_dir(lab.path("outside")).unwrap().count(), 1, "{number}");
        assert_eq!(lab.path("outside/file").metadata().unwrap().nlink(), 1, "{number}");
    }
    for name in ["../evil", "a/../../evil"] {
        let lab = Lab::new();
        fs::write(lab.path("up.tar"), tar(&[Made::File(name, b"x")])).unwrap();
        assert!(lab.refused("up.tar").contains("component .."), "{name}");
    }
}

#[test]
fn a_layer_cannot_remove_files_outside() {
    let lab = Lab::new();
    fs::create_dir(lab.path("outside")).unwrap();
    fs::write(lab.path("outside/file"), "host").unwrap();
    let outside = lab.path("outside").display().to_string();
    let lower = tar(&[Made::Symlink("out", &outside), Made::File("f", b"x")]);
    let upper = tar(&[Made::File("out/.wh.file", b""), Made::File("out/.wh..wh..opq", b"")]);
    write_dir(&lab.path("layout"), &layout(&[lower, upper]));
    lab.unpacked("layout");
    assert!(lab.path("outside/file").exists());
    for mark in [".wh...", ".wh..", "f/.wh."] {
        let lab = Lab::new();
        write_dir(&lab.path("layout"), &layout(&[tar(&[Made::File(mark, b"")])]));
        assert!(lab.refused("layout").contains("removes no name"), "{mark}");
    }
}

#[test]
fn an_image_for_another_machine_is_refused_by_name() {
    let lab = Lab::new();
    let mut files = layout(&two_layers());
    let index = files.last_mut().unwrap();
    let mut value: Value = serde_json::from_slice(&index.1).unwrap();
    value["manifests"][0]["platform"] = json!({ "architecture": "s390x", "os": "linux" });
    index.1 = value.to_string().into_bytes();
    write_dir(&lab.path("layout"), &files);
    let error = lab.refused("layout");
    assert!(error.contains("linux/s390x"), "{error}");
}

#[test]
fn images_that_nothing_uses_are_removed() {
    let lab = Lab::new();
    fs::write(lab.path("one.tar"), tar(&[Made::File("a", b"1")])).unwrap();
    fs::write(lab.path("two.tar"), tar(&[Made::File("a", b"2")])).unwrap();
    let (one, two) = (lab.prepare("one.tar", None).unwrap(), lab.prepare("two.tar", None).unwrap());
    let ImageRoot::Cached(used) = &one.root else { panic!("not cached") };
    let in_use = [used.key.clone()].into();
    let (kept, unused) = (one.root.path().to_owned(), two.root.path().to_owned());
    // Not while their containers are being made.
    assert!(lab.cache.prune(&[].into(), std::time::Duration::ZERO, true).unwrap().removed.is_empty());
    drop((one, two));
    fs::create_dir(lab.path("cache/images/new-left")).unwrap();
    let prune = |age, dry_run| {
        let pruned = lab.cache.prune(&in_use, std::time::Duration::from_secs(age), dry_run).unwrap();
        assert!(pruned.failed.is_empty());
        pruned.removed.len()
    };
    // Recently used, but what a killed process has left has no use.
    assert_eq!(prune(3600, true), 1);
    assert_eq!(prune(0, true), 2);
    assert!(unused.exists());
    assert_eq!(prune(0, false), 2);
    assert!(kept.exists() && !unused.exists());
    symlink("/nowhere", lab.path("cache/images/odd")).unwrap();
    assert_eq!(prune(0, false), 0);
}
