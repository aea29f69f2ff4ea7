//! The layer that Docker puts between an image and each of its containers.
//!
//! It has mount points and empty files, and is the same for all containers of an image but for its times. If it counted
//! like the layers of an image, each container would have a base disk of its own, as large as the image. So it is
//! recognised by its names and identified by its content, and what is in it has a time of the image's. Source:
//! `daemon/initlayer/setup_unix.go` of moby.

use std::path::Path;

use machinen_base::fs::FileError;
use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, open, statat},
    io::Errno,
};

use super::{
    RootdiskError, hashing, key::RootdiskKey, manifest::Ext4Time, source_mount::SourceMount, tree::SourceTree,
};

/// The empty file that Docker makes for every container, whose image has none.
const MARK: &str = ".dockerenv";

/// All that Docker makes where the image has nothing, and the directories that lead there; the root is the first.
const PATHS: [&[u8]; 13] = [
    b"",
    b".dockerenv",
    b"dev",
    b"dev/console",
    b"dev/pts",
    b"dev/shm",
    b"etc",
    b"etc/hostname",
    b"etc/hosts",
    b"etc/mtab",
    b"etc/resolv.conf",
    b"proc",
    b"sys",
];

/// Docker's layer of one container.
#[derive(Debug)]
pub(super) struct InitLayer {
    /// Equal for layers of equal content.
    pub(super) content: RootdiskKey,
    paths: Vec<Box<[u8]>>,
}

impl InitLayer {
    /// `None` if `dir`, the top layer of a container's image, is not such a layer.
    ///
    /// # Errors
    /// The layer cannot be read.
    pub(super) fn read(dir: &Path) -> Result<Option<Self>, RootdiskError> {
        if !may_be_one(dir)? {
            return Ok(None);
        }
        let mount = SourceMount::of_dir(dir)?;
        let mut tree = SourceTree::walk(&mount)?;
        if tree.entries.iter().any(|entry| !PATHS.contains(&&*entry.path)) {
            return Ok(None);
        }
        tree.entries.iter_mut().for_each(|entry| entry.mtime = Ext4Time::MIN);
        let content = hashing::hash(&mount, &tree, 0, |_| ())?.key;
        Ok(Some(Self { content, paths: tree.entries.into_iter().map(|entry| entry.path).collect() }))
    }

    /// Gives what comes from this layer the time of the newest file of the image. `tree` is the merged one.
    pub(super) fn set_times(&self, tree: &mut SourceTree) {
        let (own, images): (Vec<_>, Vec<_>) =
            tree.entries.iter_mut().partition(|entry| self.paths.contains(&entry.path));
        let newest = images.iter().map(|entry| entry.mtime).max().unwrap_or(Ext4Time::MIN);
        own.into_iter().for_each(|entry| entry.mtime = newest);
    }
}

/// Whether the layer has Docker's mark and no other names at its root, so that the layers of images are not walked.
fn may_be_one(dir: &Path) -> Result<bool, RootdiskError> {
    let failed = |error: Errno| FileError::new("examine", dir, error);
    let root =
        open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    let is_mark =
        |stat: Stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_size == 0;
    match statat(&root, MARK, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if is_mark(stat) => {}
        Ok(_) | Err(Errno::NOENT) => return Ok(false),
        Err(error) => return Err(failed(error).into()),
    }
    for item in Dir::new(root).map_err(failed)? {
        let item = item.map_err(failed)?;
        let name = item.file_name().to_bytes();
        if !matches!(name, b"." | b"..") && !PATHS.contains(&name) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::symlink,
        path::{Path, PathBuf},
    };

    use super::*;
    use crate::rootdisk::{
        RootfsSource,
        tests::{CacheFixture, tree::touch},
    };

    /// A layer as Docker makes it for an image that has only /etc.
    fn init_layer(dir: &Path, seconds: i64) {
        for name in ["dev/pts", "dev/shm", "etc", "proc", "sys"] {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        for name in [MARK, "dev/console", "etc/hosts", "etc/hostname", "etc/resolv.conf"] {
            fs::write(dir.join(name), "").unwrap();
        }
        symlink("/proc/mounts", dir.join("etc/mtab")).unwrap();
        for name in PATHS {
            touch(&dir.join(std::str::from_utf8(name).unwrap()), seconds, 0);
        }
    }

    fn image(dir: &Path) {
        fs::create_dir_all(dir.join("etc")).unwrap();
        for (name, seconds) in [("etc/passwd", 5), ("program", 7)] {
            fs::write(dir.join(name), "text").unwrap();
            touch(&dir.join(name), seconds, 0);
        }
        touch(&dir.join("etc"), 6, 0);
    }

    fn container(fixture: &CacheFixture, name: &str) -> RootfsSource {
        RootfsSource::Overlay { lowers: vec![fixture.path(name), fixture.path("image")] }
    }

    fn key(fixture: &CacheFixture, name: &str) -> (RootdiskKey, Vec<&'static str>) {
        let disk = fixture.build(&container(fixture, name)).unwrap();
        (disk.key, disk.phases.iter().map(|(name, _)| *name).collect())
    }

    #[test]
    fn containers_of_an_image_have_one_disk_that_is_found_without_reading_the_image() {
        let fixture = CacheFixture::new();
        image(&fixture.path("image"));
        init_layer(&fixture.path("one"), 100);
        init_layer(&fixture.path("two"), 200);
        let (first, _) = key(&fixture, "one");
        assert_eq!(key(&fixture, "two"), (first, vec!["identity"]));
        // On another host, with a copy of the image.
        let other = CacheFixture::new();
        image(&other.path("image"));
        init_layer(&other.path("one"), 300);
        assert_eq!(key(&other, "one").0, first);
    }

    #[test]
    fn a_layer_of_other_content_makes_another_disk() {
        let fixture = CacheFixture::new();
        image(&fixture.path("image"));
        let change = |name: &str, change: &dyn Fn(PathBuf)| {
            init_layer(&fixture.path(name), 100);
            change(fixture.path(name));
            key(&fixture, name).0
        };
        let mut keys = vec![
            change("same", &|_| ()),
            change("less", &|dir| fs::remove_file(dir.join("etc/mtab")).unwrap()),
            change("written", &|dir| fs::write(dir.join("etc/hosts"), "127.0.0.1 a").unwrap()),
            change("link", &|dir| {
                fs::remove_file(dir.join("etc/mtab")).unwrap();
                symlink("/etc/passwd", dir.join("etc/mtab")).unwrap();
            }),
        ];
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 4);
    }

    #[test]
    fn a_layer_of_an_image_is_not_taken_for_one() {
        let fixture = CacheFixture::new();
        for (name, path) in [("at_root", "file"), ("below", "etc/shadow"), ("deep", "dev/pts/0")] {
            let dir = fixture.path(name);
            init_layer(&dir, 100);
            assert!(InitLayer::read(&dir).unwrap().is_some(), "{name}");
            fs::write(dir.join(path), "").unwrap();
            assert!(InitLayer::read(&dir).unwrap().is_none(), "{name}");
        }
        let dir = fixture.path("unmarked");
        init_layer(&dir, 100);
        fs::remove_file(dir.join(MARK)).unwrap();
        assert!(InitLayer::read(&dir).unwrap().is_none());
    }
}
