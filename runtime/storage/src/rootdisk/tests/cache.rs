//! Tests that known disks are not built again, and that disks in use are kept.

use std::{fs, path::Path, sync::mpsc, time::Duration};

use machinen_base::process::Spawn;

use super::{CacheFixture, layer, small, tool};
use crate::rootdisk::{
    BuildOptions, DiskState, PruneOptions, Rootdisk, RootdiskCache, RootdiskProgress, RootfsSource,
};

fn phases(disk: &Rootdisk) -> Vec<&'static str> {
    disk.phases.iter().map(|(name, _)| *name).collect()
}

fn make(dir: &Path, text: &str) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("file"), text).unwrap();
    super::tree::touch(&dir.join("file"), 1, 2);
}

#[test]
fn a_known_source_is_not_read() {
    let fixture = CacheFixture::new();
    let root = fixture.path("root");
    make(&root, "text");
    let first = fixture.build(&layer(&root)).unwrap();
    assert!(!first.cached);
    let second = fixture.build(&layer(&root)).unwrap();
    assert_eq!((second.key, second.cached, phases(&second)), (first.key, true, vec!["identity"]));
    assert_eq!(fixture.leftovers(), Vec::<std::path::PathBuf>::new());
    // A larger disk is another one.
    let larger = BuildOptions { min_size: 32 << 20, ..small() };
    let third = fixture.cache.get_or_build(&layer(&root), &larger, &mut |_| ()).unwrap();
    assert!(!third.cached && third.size == 32 << 20 && third.key != first.key);
}

#[test]
fn another_root_of_the_same_image_is_read_but_not_converted() {
    let fixture = CacheFixture::new();
    let (root, copy) = (fixture.path("root"), fixture.path("copy"));
    make(&root, "text");
    tool("cp", &["-a", root.to_str().unwrap(), copy.to_str().unwrap()]);
    let first = fixture.build(&layer(&root)).unwrap();
    let second = fixture.build(&layer(&copy)).unwrap();
    assert_eq!((second.key, second.cached), (first.key, true));
    assert!(!phases(&second).contains(&"mke2fs"));
    // The same shape with other content is another disk.
    make(&copy, "TEXT");
    let third = fixture.build(&RootfsSource::Dir(copy)).unwrap();
    assert!(!third.cached && third.key != first.key);
}

#[test]
fn the_second_waits_for_the_first() {
    let fixture = CacheFixture::new();
    let root = fixture.path("root");
    make(&root, "text");
    let (converting, begun) = mpsc::channel();
    let (waiting, waits) = mpsc::channel();
    std::thread::scope(|scope| {
        let (fixture, source) = (&fixture, layer(&root));
        let other = source.clone();
        let first = scope.spawn(move || {
            fixture.build_watched(&source, |progress| {
                if matches!(progress, RootdiskProgress::Converting { .. }) {
                    converting.send(()).unwrap();
                    waits.recv().unwrap();
                }
            })
        });
        begun.recv().unwrap();
        let second = fixture.build_watched(&other, |progress| {
            assert_eq!(progress, RootdiskProgress::Waiting);
            waiting.send(()).unwrap();
        });
        let (first, second) = (first.join().unwrap().unwrap(), second.unwrap());
        assert_eq!((first.key, first.cached, second.cached), (second.key, false, true));
    });
    assert_eq!(fixture.leftovers(), Vec::<std::path::PathBuf>::new());
}

/// Builds what the environment names, for tests of several processes.
#[test]
#[ignore = "other tests run it in a process of its own"]
fn build_in_a_process() {
    let path = |name| std::path::PathBuf::from(std::env::var_os(name).unwrap());
    let cache = RootdiskCache::open(&path("TEST_CACHE")).unwrap();
    let killed_at = std::env::var("TEST_KILLED_AT").unwrap_or_default();
    let disk = cache.get_or_build(&layer(&path("TEST_ROOT")), &small(), &mut |progress| {
        if !killed_at.is_empty() && format!("{progress:?}").starts_with(&killed_at) {
            nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::SIGKILL).unwrap();
        }
    });
    println!("cached={}", disk.unwrap().cached);
}

pub(super) fn process(
    fixture: &CacheFixture,
    root: &Path,
    killed_at: &str,
) -> machinen_base::process::ToolOutput {
    let name = "rootdisk::tests::cache::build_in_a_process";
    Spawn::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", name])
        .env("TEST_CACHE", fixture.cache.dir())
        .env("TEST_ROOT", root)
        .env("TEST_KILLED_AT", killed_at)
        .run()
        .unwrap()
}

#[test]
fn processes_share_the_work() {
    let fixture = CacheFixture::new();
    // Two roots of the same image: their identities differ, their shape does not.
    let roots = [fixture.path("root"), fixture.path("copy")];
    make(&roots[0], "text");
    tool("cp", &["-a", roots[0].to_str().unwrap(), roots[1].to_str().unwrap()]);
    let outputs: Vec<String> = std::thread::scope(|scope| {
        let started: Vec<_> = (0..6)
            .map(|n| {
                let (fixture, root) = (&fixture, &roots[n % 2]);
                scope.spawn(move || process(fixture, root, "").success().unwrap().stdout)
            })
            .collect();
        started.into_iter().map(|thread| String::from_utf8(thread.join().unwrap()).unwrap()).collect()
    });
    let count = |text: &str| outputs.iter().filter(|output| output.contains(text)).count();
    assert_eq!((count("cached=false"), count("cached=true")), (1, 5), "{outputs:?}");
    assert_eq!(fixture.leftovers(), Vec::<std::path::PathBuf>::new());
}

/// Ends the use of a disk at once. Without this, a process that another test starts would keep its copy of the disk's
/// descriptor, and so the lock, until it executes its program.
fn release(disk: Rootdisk) {
    disk.file.unlock().unwrap();
}

#[test]
fn what_is_in_use_is_not_pruned() {
    let fixture = CacheFixture::new();
    let (used, unused) = (fixture.path("used"), fixture.path("unused"));
    make(&used, "used");
    make(&unused, "unused");
    let disk = fixture.build(&layer(&used)).unwrap();
    release(fixture.build(&layer(&unused)).unwrap());
    let listed = fixture.cache.list().unwrap();
    let users: Vec<_> = listed.iter().map(|listed| (listed.key == disk.key, listed.users.clone())).collect();
    assert_eq!(users, [(false, vec![]), (true, vec![std::process::id()])]);
    assert!(listed.iter().all(|listed| listed.state == DiskState::Ready && listed.allocated < listed.size));

    let recent = PruneOptions { older_than: Some(Duration::from_secs(3600)), ..PruneOptions::default() };
    assert!(fixture.cache.prune(&recent).unwrap().removed.is_empty());
    let all: u64 = listed.iter().map(|listed| listed.allocated).sum();
    let budget = PruneOptions { keep_bytes: Some(all), ..PruneOptions::default() };
    assert!(fixture.cache.prune(&budget).unwrap().removed.is_empty());
    let dry = PruneOptions { dry_run: true, ..PruneOptions::default() };
    assert_eq!(fixture.cache.prune(&dry).unwrap().removed.len(), 1);

    let tight = PruneOptions { keep_bytes: Some(all - 1), ..PruneOptions::default() };
    let pruned = fixture.cache.prune(&tight).unwrap();
    assert_eq!((pruned.removed.len(), pruned.in_use.len()), (1, 1));
    assert_eq!(pruned.in_use[0].key, disk.key);
    let again = fixture.build(&layer(&used)).unwrap();
    assert!(again.cached);
    release(again);
    release(disk);
    assert_eq!(fixture.cache.prune(&PruneOptions::default()).unwrap().removed.len(), 1);
    assert_eq!(fs::read_dir(fixture.cache.dir().join("index")).unwrap().count(), 0);
    assert!(!fixture.build(&layer(&used)).unwrap().cached);
}
