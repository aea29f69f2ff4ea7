//! Tests of the whole cache; they need root and mke2fs.

mod bytes;
mod cache;
mod damage;
mod failures;
pub(crate) mod tree;

use std::{
    fs,
    path::{Path, PathBuf},
};

use machinen_base::process;

use super::{BuildOptions, Rootdisk, RootdiskCache, RootdiskError, RootdiskProgress, RootfsSource};

/// A cache in a directory of its own.
pub(crate) struct CacheFixture {
    dir: tempfile::TempDir,
    pub(crate) cache: RootdiskCache,
}

impl CacheFixture {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cache = RootdiskCache::open(&dir.path().join("cache")).unwrap();
        Self { dir, cache }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn build(&self, source: &RootfsSource) -> Result<Rootdisk, RootdiskError> {
        self.build_watched(source, |_| ())
    }

    fn build_watched(
        &self,
        source: &RootfsSource,
        mut watch: impl FnMut(RootdiskProgress),
    ) -> Result<Rootdisk, RootdiskError> {
        self.cache.get_or_build(source, &small(), &mut watch)
    }

    /// Files of the cache's directory, without those of finished disks.
    pub(crate) fn leftovers(&self) -> Vec<PathBuf> {
        let listed = self.cache.list().unwrap();
        let mut found = Vec::new();
        for dir in ["", "locks", "writable"] {
            for entry in fs::read_dir(self.cache.dir().join(dir)).unwrap() {
                let path = entry.unwrap().path();
                let disk = listed.iter().any(|disk| disk.path == path.with_extension("ext4"));
                if path.is_file() && !disk {
                    found.push(path);
                }
            }
        }
        found
    }
}

/// Disks that are quick to make.
fn small() -> BuildOptions {
    BuildOptions { min_size: 16 << 20, ..BuildOptions::default() }
}

fn layer(dir: &Path) -> RootfsSource {
    RootfsSource::Overlay { lowers: vec![dir.to_owned()] }
}

/// Runs a tool that the test needs.
pub(crate) fn tool(program: &str, args: &[&str]) {
    process::run(program, args, &[]).unwrap();
}
