//! Tests that failures are reported in the user's terms, leave nothing behind, and do not prevent the next
//! try.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use machinen_base::{
    error::{ErrorKind, HasKind as _, chain},
    process::ProcessExit,
    space::DiskReserve,
};

use super::{CacheFixture, cache::process, layer, small, tool};
use crate::rootdisk::{BuildOptions, RootdiskCache, RootdiskError, RootdiskProgress, RootfsSource};

fn make(fixture: &CacheFixture) -> PathBuf {
    let root = fixture.path("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("file"), vec![3; 3 << 20]).unwrap();
    root
}

fn script(path: &Path, text: &str) {
    fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A file system of its own for the cache, so that it can be full.
struct Small(PathBuf);

impl Small {
    fn mount(fixture: &CacheFixture, size: &str) -> Self {
        let dir = fixture.path("small");
        fs::create_dir(&dir).unwrap();
        tool("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", dir.to_str().unwrap()]);
        Self(dir)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Lazily, as a process that another test forks may hold a file in it until it executes something.
        tool("umount", &["-l", self.0.to_str().unwrap()]);
    }
}

#[test]
fn a_killed_build_leaves_nothing_that_matters() {
    let fixture = CacheFixture::new();
    let root = make(&fixture);
    for point in ["Converting", "Hashed", "Finishing"] {
        assert_eq!(process(&fixture, &root, point).exit, ProcessExit::Signal(9), "{point}");
        assert!(fixture.cache.list().unwrap().is_empty(), "{point}");
        assert!(fixture.leftovers().iter().all(|path| path.starts_with(fixture.cache.dir().join("locks"))));
    }
    assert!(!fixture.build(&layer(&root)).unwrap().cached);
    assert_eq!(fixture.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn a_full_file_system_is_reported_beforehand() {
    let fixture = CacheFixture::new();
    let root = make(&fixture);
    let small_fs = Small::mount(&fixture, "2m");
    let cache = RootdiskCache::open(&small_fs.0.join("cache")).unwrap();
    let error = cache.get_or_build(&layer(&root), &small(), &mut |_| ()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("space in {}", cache.dir().display())), "{text}");
    assert!(text.contains("5 MiB needed, 2 MiB free, of which 0 MiB are kept free"), "{text}");
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
}

#[test]
fn a_base_disk_leaves_the_host_what_is_kept_free() {
    let fixture = CacheFixture::new();
    let root = make(&fixture);
    let options = BuildOptions { reserve: DiskReserve::percent(100), ..small() };
    let error = fixture.cache.get_or_build(&layer(&root), &options, &mut |_| ()).unwrap_err();
    assert!(matches!(error, RootdiskError::NoSpace { .. }), "{error}");
    assert!(fixture.cache.list().unwrap().is_empty());
}

#[test]
fn a_file_system_that_fills_up_meanwhile_is_reported_too() {
    let fixture = CacheFixture::new();
    let root = make(&fixture);
    let small_fs = Small::mount(&fixture, "8m");
    let cache = RootdiskCache::open(&small_fs.0.join("cache")).unwrap();
    // It writes to the disk until there is no more space. In its jail it has no other file and no other program.
    let mke2fs = fixture.path("mke2fs");
    script(
        &mke2fs,
        "[ \"$1\" = -V ] && echo 'mke2fs 1.47.0 (5-Feb-2023)' >&2 && exit\nwhile printf %65536s x; do :; done >&3\nexit 1",
    );
    let options = BuildOptions { mke2fs, ..small() };
    let error = cache.get_or_build(&layer(&root), &options, &mut |_| ()).unwrap_err();
    assert!(matches!(error, RootdiskError::NoSpace { .. }), "{}", chain(&error));
    assert!(cache.list().unwrap().is_empty());
    // Nothing of the failed build is left: the disk fits again.
    cache.get_or_build(&layer(&root), &small(), &mut |_| ()).unwrap();
}

#[test]
fn a_missing_or_old_mke2fs_is_named() {
    let fixture = CacheFixture::new();
    let root = make(&fixture);
    let fail = |mke2fs: &Path| {
        let options = BuildOptions { mke2fs: mke2fs.to_owned(), ..small() };
        fixture.cache.get_or_build(&layer(&root), &options, &mut |_| ()).unwrap_err()
    };
    for name in ["/nowhere/mke2fs", "mke2fs-that-is-nowhere"] {
        let error = fail(Path::new(name));
        assert!(
            error.to_string().starts_with(&format!("{name} not found; install the Debian package e2fsprogs"))
        );
    }
    let old = fixture.path("old");
    script(&old, "echo 'mke2fs 1.45.5 (07-Jan-2020)' >&2");
    let text = fail(&old).to_string();
    assert!(text.starts_with(&format!("{} is version 1.45.5, but 1.46 or newer", old.display())), "{text}");
    script(&old, "[ \"$1\" = -V ] && echo 'mke2fs 1.47.0 (5-Feb-2023)' >&2 || { echo broken >&2; exit 3; }");
    let text = chain(&fail(&old));
    assert!(text.ends_with("exited with status 3: broken"), "{text}");
    assert_eq!(fixture.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn a_source_that_changes_is_refused() {
    let fixture = CacheFixture::new();
    let root = make(&fixture);
    let changes: [(&str, &dyn Fn()); 3] = [
        ("/file ", &|| fs::write(root.join("file"), vec![4; 3 << 20]).unwrap()),
        ("/ ", &|| fs::write(root.join("new"), "").unwrap()),
        ("/ ", &|| fs::remove_file(root.join("new")).unwrap()),
    ];
    for (path, change) in changes {
        let error = fixture.build_watched(&RootfsSource::Dir(root.clone()), |progress| {
            if progress == RootdiskProgress::Finishing {
                change();
            }
        });
        let text = chain(&error.unwrap_err());
        assert!(text.contains(&format!("{path}in the root file system changed")), "{path}: {text}");
    }
    assert!(fixture.cache.list().unwrap().is_empty());
    fixture.build(&RootfsSource::Dir(root)).unwrap();
}

#[test]
fn sources_that_are_not_there_are_named() {
    let fixture = CacheFixture::new();
    let (missing, file) = (fixture.path("missing"), fixture.path("file"));
    fs::write(&file, "").unwrap();
    let overlay =
        |lowers: &[&PathBuf]| RootfsSource::Overlay { lowers: lowers.iter().copied().cloned().collect() };
    for source in [RootfsSource::Dir(missing.clone()), layer(&missing), overlay(&[&missing, &missing])] {
        let error = fixture.build(&source).unwrap_err();
        let text = chain(&error);
        assert!(
            text.contains(missing.to_str().unwrap())
                && text.ends_with("No such file or directory (os error 2)"),
            "{text}"
        );
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
    assert!(matches!(fixture.build(&overlay(&[])), Err(RootdiskError::NoLayers)));
    let text = chain(&fixture.build(&layer(&file)).unwrap_err());
    assert!(text.contains(file.to_str().unwrap()), "{text}");
    let text = chain(&fixture.build(&overlay(&[&file, &file])).unwrap_err());
    assert!(text.contains("Not a directory"), "{text}");
}

#[test]
fn a_path_that_cannot_be_reached_is_named() {
    let fixture = CacheFixture::new();
    let root = fixture.path("root");
    fs::create_dir(&root).unwrap();
    let name = "d".repeat(250);
    let script = format!(
        "cd {} && for i in $(seq 17); do mkdir {name} && cd -P {name} || exit 1; done",
        root.display()
    );
    tool("bash", &["-c", &script]);
    let error = fixture.build(&layer(&root)).unwrap_err();
    assert!(error.to_string().ends_with("is longer than 4000 bytes"), "{error}");
    symlink("loop", root.join("loop")).unwrap();
    tool("rm", &["-rf", root.join(&name).to_str().unwrap()]);
    fixture.build(&layer(&root)).unwrap();
}
