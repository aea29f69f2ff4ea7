//! Unpacked images, by their content.
//!
//! ```text
//!   DIR/images/KEY/root/    KEY: SHA-256 of the digests of the layers. The directory is renamed when it is complete,
//!                           and never changes afterwards.
//!   DIR/images/KEY.lock     held by those that unpack or remove the image
//!   DIR/images/new-XXXXXX/  being unpacked; without its maker it is removed by `machinen gc`
//! ```

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{Seek as _, SeekFrom},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use machinen::fs::{
    FileError, create_private_dirs, hex, if_exists, lock, lock_within, remove_dir_if_exists, try_lock,
};
use rustix::fs::{Mode, OFlags};
use sha2::{Digest as _, Sha256};

use super::{
    ImageError,
    manifest::Layer,
    reader::{Compression, DigestReader},
    store::BlobStore,
    unpack::UnpackDir,
};

/// Moves when images are unpacked in another way.
const VERSION: &str = "1";
/// Most bytes of a layer, compressed or not.
const MAX_LAYER: u64 = 64 << 30;
/// How long another process may take to unpack the same image.
const UNPACKING: Duration = Duration::from_secs(30 * 60);
/// The beginning of the names of directories that are being filled.
const NEW: &str = "new-";

/// The directory of unpacked images.
#[derive(Debug)]
pub(crate) struct ImageCache {
    dir: PathBuf,
}

/// An unpacked image.
#[derive(Debug)]
pub(crate) struct CachedImage {
    pub(crate) key: String,
    pub(crate) root: PathBuf,
    /// Nobody removes the image until a bundle names it.
    _locked: File,
}

/// What was removed, or would be.
#[derive(Debug, Default)]
pub(crate) struct PrunedImages {
    pub(crate) removed: Vec<PathBuf>,
    pub(crate) failed: Vec<(PathBuf, FileError)>,
}

impl ImageCache {
    /// The cache in a directory, which is made.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub(crate) fn open(dir: &Path) -> Result<Self, FileError> {
        let dir = dir.join("images");
        create_private_dirs(&dir).map_err(FileError::at("create the directory", &dir))?;
        Ok(Self { dir })
    }

    /// A file that exists as long as it is open.
    ///
    /// # Errors
    /// The file system refuses.
    pub(super) fn unnamed_file(&self) -> Result<File, FileError> {
        tempfile::tempfile_in(&self.dir).map_err(FileError::at("make a file in", &self.dir))
    }

    /// Unpacks an image, unless it is there.
    ///
    /// # Errors
    /// A layer is damaged, or cannot be unpacked.
    pub(super) fn of_layers(
        &self,
        store: &BlobStore,
        layers: &[Layer],
        report: &mut dyn FnMut(&str),
    ) -> Result<CachedImage, ImageError> {
        let key = key(layers.iter().map(|layer| layer.diff.as_str()));
        self.get_or_unpack(key, |unpack| {
            for (number, layer) in layers.iter().enumerate() {
                report(&format!("unpacking layer {} of {}", number + 1, layers.len()));
                let whiteouts = read_layer(store, layer, |tar| UnpackDir::whiteouts(tar))?;
                unpack.remove(&whiteouts)?;
                read_layer(store, layer, |tar| unpack.apply(tar))?;
            }
            Ok(())
        })
    }

    /// Unpacks the tar of a root file system, unless it is there.
    ///
    /// # Errors
    /// The archive is not understood, or cannot be unpacked.
    pub(super) fn of_tar(
        &self,
        tar: &File,
        path: &Path,
        report: &mut dyn FnMut(&str),
    ) -> Result<CachedImage, ImageError> {
        let failed = |source| ImageError::File(FileError::new("read", path, source));
        let rewound = || -> Result<File, ImageError> {
            let mut tar = tar.try_clone().map_err(failed)?;
            tar.seek(SeekFrom::Start(0)).map_err(failed)?;
            Ok(tar)
        };
        let digest = DigestReader::new(rewound()?, MAX_LAYER).finish().map_err(failed)?;
        self.get_or_unpack(key(["tar", digest.as_str()].into_iter()), |unpack| {
            report("unpacking the root file system");
            let mut reader = DigestReader::new(std::io::BufReader::new(rewound()?), MAX_LAYER);
            unpack.apply(&mut reader)?;
            let found = reader.finish().map_err(failed)?;
            check(&path.display().to_string(), &digest, found)
        })
    }

    fn get_or_unpack(
        &self,
        key: String,
        fill: impl FnOnce(&mut UnpackDir) -> Result<(), ImageError>,
    ) -> Result<CachedImage, ImageError> {
        let image = self.dir.join(&key);
        let locked = self.lock(&key)?;
        // When the image was used, for `prune`.
        locked.set_modified(SystemTime::now()).map_err(FileError::at("write", &image))?;
        let cached = CachedImage { root: image.join("root"), key, _locked: locked };
        if cached.root.is_dir() {
            return Ok(cached);
        }
        let guard = self.guard()?;
        self.sweep()?;
        let staging = tempfile::Builder::new().prefix(NEW).tempdir_in(&self.dir);
        let staging = staging.map_err(FileError::at("create a directory in", &self.dir))?;
        // Tells `prune` that it is being filled.
        let held = File::open(staging.path()).map_err(FileError::at("open", staging.path()))?;
        lock(&held).map_err(FileError::at("lock", staging.path()))?;
        drop(guard);
        let root = staging.path().join("root");
        fs::create_dir(&root).map_err(FileError::at("create the directory", &root))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir: OwnedFd = rustix::fs::open(&root, flags, Mode::empty())
            .map_err(|errno| FileError::new("open", &root, errno))?;
        rustix::fs::fchmod(&dir, Mode::from_raw_mode(0o755))
            .map_err(|errno| FileError::new("set the mode of", &root, errno))?;
        let mut unpack = UnpackDir::new(dir);
        fill(&mut unpack)?;
        unpack.finish()?;
        // Complete on the disk before it has its name.
        rustix::fs::syncfs(&held).map_err(|errno| FileError::new("write", staging.path(), errno))?;
        fs::rename(staging.path(), &image).map_err(FileError::at("rename to", &image))?;
        // The name is gone.
        let _ = staging.keep();
        Ok(cached)
    }

    /// Held while a directory that is to be filled is made and locked, and while directories are removed.
    fn guard(&self) -> Result<File, FileError> {
        let guard = File::open(&self.dir).map_err(FileError::at("open", &self.dir))?;
        lock(&guard).map_err(FileError::at("lock", &self.dir))?;
        Ok(guard)
    }

    /// Removes what processes have left that were killed while they unpacked.
    fn sweep(&self) -> Result<(), FileError> {
        for entry in fs::read_dir(&self.dir).map_err(FileError::at("list", &self.dir))? {
            let path = entry.map_err(FileError::at("list", &self.dir))?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(NEW)) {
                self.prune_one(&path, &BTreeSet::new(), Duration::ZERO, false)?;
            }
        }
        Ok(())
    }

    fn lock(&self, key: &str) -> Result<File, ImageError> {
        let path = self.dir.join(format!("{key}.lock"));
        let file =
            File::options().create(true).append(true).open(&path).map_err(FileError::at("open", &path))?;
        lock_within(&file, UNPACKING).map_err(FileError::at("lock", &path))?;
        Ok(file)
    }

    /// Removes the images that no container uses and that were not used for a time, and what was left by processes that were killed.
    ///
    /// # Errors
    /// The directory cannot be listed.
    pub(crate) fn prune(
        &self,
        in_use: &BTreeSet<String>,
        unused_for: Duration,
        dry_run: bool,
    ) -> Result<PrunedImages, FileError> {
        let _guard = self.guard()?;
        let mut pruned = PrunedImages::default();
        let entries = if_exists(fs::read_dir(&self.dir)).map_err(FileError::at("list", &self.dir))?;
        let mut paths: Vec<_> =
            entries.into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.sort();
        for path in paths.into_iter().filter(|path| path.is_dir()) {
            match self.prune_one(&path, in_use, unused_for, dry_run) {
                Ok(false) => {}
                Ok(true) => pruned.removed.push(path),
                Err(error) => pruned.failed.push((path, error)),
            }
        }
        Ok(pruned)
    }

    fn prune_one(
        &self,
        path: &Path,
        in_use: &BTreeSet<String>,
        unused_for: Duration,
        dry_run: bool,
    ) -> Result<bool, FileError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (lock_path, is_image) = match name.starts_with(NEW) {
            true => (path.to_owned(), false),
            false => (self.dir.join(format!("{name}.lock")), true),
        };
        if is_image && in_use.contains(&name) {
            return Ok(false);
        }
        let file = File::options().read(true).open(&lock_path).map_err(FileError::at("open", &lock_path))?;
        if !try_lock(&file).map_err(FileError::at("lock", &lock_path))? {
            return Ok(false);
        }
        let used = file.metadata().and_then(|metadata| metadata.modified());
        let used = used.map_err(FileError::at("look up", &lock_path))?;
        // A time in the future is that of a clock that was set back.
        if is_image && used.elapsed().unwrap_or_default() < unused_for {
            return Ok(false);
        }
        if !dry_run {
            remove_dir_if_exists(path).map_err(FileError::at("remove", path))?;
        }
        Ok(true)
    }
}

fn key<'a>(parts: impl Iterator<Item = &'a str>) -> String {
    let mut digest = Sha256::new();
    digest.update(VERSION);
    for part in parts {
        digest.update(b"\n");
        digest.update(part);
    }
    hex(&digest.finalize())
}

/// Has `read` read the tar of a layer, and checks both digests.
fn read_layer<T>(
    store: &BlobStore,
    layer: &Layer,
    read: impl FnOnce(&mut dyn std::io::Read) -> Result<T, ImageError>,
) -> Result<T, ImageError> {
    let name = &layer.blob;
    let failed = |source| ImageError::Read { name: name.clone(), source };
    let (mut start, _) = store.open(name)?;
    let mut first = [0; 4];
    let count = std::io::Read::read(&mut start, &mut first).map_err(failed)?;
    let (blob, _) = store.open(name)?;
    let mut blob = DigestReader::new(std::io::BufReader::new(blob), MAX_LAYER);
    let tar = Compression::of(&first[..count]).decode(&mut blob).map_err(failed)?;
    let mut tar = DigestReader::new(tar, MAX_LAYER);
    let outcome = read(&mut tar);
    // Damage explains a failure, so it comes first.
    let diff = tar.finish();
    let digest = blob.finish();
    if let (Some(expected), Ok(found)) = (&layer.digest, digest) {
        check(name, expected, found)?;
    }
    check(name, &layer.diff, diff.map_err(failed)?)?;
    outcome
}

fn check(name: &str, expected: &str, found: String) -> Result<(), ImageError> {
    match found == expected {
        true => Ok(()),
        false => Err(ImageError::Digest { name: name.to_owned(), expected: expected.to_owned(), found }),
    }
}
