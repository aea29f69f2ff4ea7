//! From the disk that a guest has written CRIU's images on to a directory of files.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    thread,
};

use machinen_protocol::api::{CheckpointFacts, ImageFile};

use super::{
    CheckpointError, digest,
    manifest::{ImageDigest, MANIFEST, Manifest, is_plain},
};

/// CRIU makes a few files for each process; a container has thousands of those at most.
const MAX_FILES: usize = 100_000;

/// What the guest says of its images, and the disk that it says it of.
#[derive(Debug)]
pub(crate) struct Images {
    pub disk: File,
    /// Bytes.
    pub size: u64,
    pub files: Vec<ImageFile>,
    pub facts: CheckpointFacts,
}

/// A checkpoint that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saved {
    pub files: usize,
    /// Bytes of the images, holes included.
    pub bytes: u64,
}

/// Writes the checkpoint into `dir`, which is made unless it is there and empty. Everything is on the medium when this
/// returns. Blocks.
///
/// # Errors
/// Nothing of it is left then.
pub(crate) fn save(images: Images, mut manifest: Manifest, dir: &Path) -> Result<Saved, CheckpointError> {
    check(&images)?;
    let mut written = Written::begin(dir)?;
    let copies = images.files.iter().map(|file| written.image(file, &images.disk));
    manifest.files = finish(copies.collect::<Result<_, _>>()?)?;
    let bytes = images.files.iter().map(|file| file.size).sum();
    let files = images.files.len();
    manifest.take_facts(images.facts);
    written.manifest(&manifest)?;
    written.keep()?;
    Ok(Saved { files, bytes })
}

/// The same checkpoint in another directory, where that can be by links: nobody writes to images. Blocks.
///
/// # Errors
/// Nothing of it is left then.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    let manifest = Manifest::read(from)?;
    let mut written = Written::begin(to)?;
    manifest.files.iter().try_for_each(|image| written.copy(&image.name, &from.join(&image.name)))?;
    written.manifest(&manifest)?;
    written.keep()
}

/// CRIU's own reports on a checkpoint, in a directory that may have others. Blocks.
///
/// # Errors
/// The directory cannot be made or written.
pub(crate) fn copy_reports(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    fs::create_dir_all(to).map_err(CheckpointError::file("create", to))?;
    for name in ["dump.log", "stats-dump"] {
        let (from, to) = (from.join(name), to.join(name));
        match fs::copy(&from, &to) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(CheckpointError::file("write", to)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The guest may say what it likes.
fn check(images: &Images) -> Result<(), CheckpointError> {
    let wrong = |what: String| Err(CheckpointError::Guest { what });
    if images.files.is_empty() || images.files.len() > MAX_FILES {
        return wrong(format!("{} images", images.files.len()));
    }
    let mut names = std::collections::HashSet::new();
    let mut total: u64 = 0;
    for file in &images.files {
        let name = file.name.escape_debug();
        if !is_plain(&file.name) || !names.insert(&file.name) {
            return wrong(format!("an image is named \"{:.64}\"", name.to_string()));
        }
        if file.size > images.size {
            return wrong(format!("{name} has {} bytes on a disk of {}", file.size, images.size));
        }
        let mut end = 0;
        for piece in &file.extents {
            let within = |from: u64, limit: u64| from.checked_add(piece.length).filter(|&end| end <= limit);
            let fits = within(piece.physical, images.size).is_some();
            match within(piece.logical, file.size) {
                Some(next) if fits && piece.logical >= end => end = next,
                _ => return wrong(format!("a piece of {name} is nowhere")),
            }
            total = total.saturating_add(piece.length);
        }
    }
    // Pieces that overlap on the disk would make the copy larger than the disk.
    if total > images.size {
        return wrong(format!("images of {total} bytes on a disk of {}", images.size));
    }
    Ok(())
}

/// Files that go again unless they are kept.
#[derive(Debug)]
struct Written {
    dir: PathBuf,
    made_dir: bool,
    files: Vec<PathBuf>,
    kept: bool,
}

impl Written {
    fn begin(dir: &Path) -> Result<Self, CheckpointError> {
        let made_dir = match DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(CheckpointError::file("create", dir)(error)),
        };
        let this = Self { dir: dir.to_owned(), made_dir, files: Vec::new(), kept: false };
        if fs::read_dir(dir).map_err(CheckpointError::file("read", dir))?.next().is_some() {
            return Err(CheckpointError::NotEmpty { path: dir.to_owned() });
        }
        Ok(this)
    }

    fn create(&mut self, name: &str) -> Result<(File, PathBuf), CheckpointError> {
        let path = self.dir.join(name);
        let file = File::options().write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(CheckpointError::file("create", &path))?;
        self.files.push(path.clone());
        Ok((file, path))
    }

    /// Copies an image from the disk.
    fn image(&mut self, image: &ImageFile, disk: &File) -> Result<Copied, CheckpointError> {
        let (file, path) = self.create(&image.name)?;
        copy_pieces(image, disk, &file).map_err(CheckpointError::file("write", &path))?;
        Ok(Copied { name: image.name.clone(), size: image.size, path })
    }

    /// A file that has reached the medium, under another name.
    fn copy(&mut self, name: &str, source: &Path) -> Result<(), CheckpointError> {
        let path = self.dir.join(name);
        if fs::hard_link(source, &path).is_ok() {
            self.files.push(path);
            return Ok(());
        }
        // Another file system.
        let (mut file, path) = self.create(name)?;
        let mut source = File::open(source).map_err(CheckpointError::file("open", source))?;
        let copied = io::copy(&mut source, &mut file).and_then(|_| file.sync_all());
        copied.map_err(CheckpointError::file("write", &path))
    }

    fn manifest(&mut self, manifest: &Manifest) -> Result<(), CheckpointError> {
        let (mut file, path) = self.create(MANIFEST)?;
        let mut text = serde_json::to_vec_pretty(manifest)
            .map_err(|source| CheckpointError::Manifest { path: path.clone(), source })?;
        text.push(b'\n');
        let written = file.write_all(&text).and_then(|()| file.sync_all());
        written.map_err(CheckpointError::file("write", &path))
    }

    fn keep(mut self) -> Result<(), CheckpointError> {
        let sync = |dir: &Path| File::open(dir).and_then(|dir| dir.sync_all());
        sync(&self.dir).map_err(CheckpointError::file("write", &self.dir))?;
        if self.made_dir
            && let Some(parent) = self.dir.parent()
        {
            sync(parent).map_err(CheckpointError::file("write", parent))?;
        }
        self.kept = true;
        Ok(())
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let mut removed: Vec<_> = self.files.iter().map(fs::remove_file).collect();
        if self.made_dir {
            removed.push(fs::remove_dir(&self.dir));
        }
        for error in removed.into_iter().filter_map(Result::err) {
            tracing::warn!(dir = %self.dir.display(), "cannot remove a part of a checkpoint that failed: {error}");
        }
    }
}

/// What no piece covers is a hole, in the copy too. Where the file system can, the copy shares the disk's blocks.
fn copy_pieces(image: &ImageFile, mut disk: &File, mut to: &File) -> io::Result<()> {
    to.set_len(image.size)?;
    for piece in &image.extents {
        disk.seek(SeekFrom::Start(piece.physical))?;
        to.seek(SeekFrom::Start(piece.logical))?;
        if io::copy(&mut disk.take(piece.length), &mut to)? != piece.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// An image that has its name and is not on the medium yet.
#[derive(Debug)]
struct Copied {
    name: String,
    size: u64,
    path: PathBuf,
}

impl Copied {
    fn with<T>(&self, work: impl FnOnce(&File) -> io::Result<T>) -> Result<T, CheckpointError> {
        File::open(&self.path)
            .and_then(|file| work(&file))
            .map_err(CheckpointError::file("write", &self.path))
    }
}

/// Brings the copies to the medium, and reads them for their digests meanwhile.
fn finish(copies: Vec<Copied>) -> Result<Vec<ImageDigest>, CheckpointError> {
    let sync = || copies.iter().try_for_each(|copy| copy.with(File::sync_all));
    let whole = |copy: &Copied| copy.with(|file| digest::of_file(file, copy.size));
    let parts = |copy: &Copied| match copy.size {
        ..=digest::PART => Ok(Vec::new()),
        size => copy.with(|file| digest::of_parts(file, size)),
    };
    let (synced, wholes, parts) = thread::scope(|scope| {
        let synced = scope.spawn(sync);
        let parts = scope.spawn(|| copies.iter().map(parts).collect::<Result<Vec<_>, _>>());
        let wholes = copies.iter().map(whole).collect::<Result<Vec<_>, _>>();
        let no_panic = "the thread does not panic";
        (synced.join().expect(no_panic), wholes, parts.join().expect(no_panic))
    });
    synced?;
    let digests = copies.into_iter().zip(wholes?).zip(parts?);
    let digests = digests.map(|((copy, sha256), parts)| ImageDigest {
        name: copy.name,
        size: copy.size,
        sha256,
        parts,
    });
    Ok(digests.collect())
}

#[cfg(test)]
mod tests {
    use machinen_protocol::api::Extent;

    use super::*;

    fn manifest() -> Manifest {
        let arch = std::env::consts::ARCH.into();
        Manifest { format: super::super::FORMAT, arch, ..Manifest::default() }
    }

    fn file(name: &str, size: u64, extents: &[(u64, u64, u64)]) -> ImageFile {
        let extents = extents.iter().map(|&(logical, physical, length)| Extent {
            logical,
            physical,
            length,
            ..Default::default()
        });
        ImageFile { name: name.into(), size, extents: extents.collect(), ..Default::default() }
    }

    fn images(files: Vec<ImageFile>) -> Images {
        let mut disk = tempfile::tempfile().unwrap();
        disk.write_all(&(0..=255).cycle().take(64 << 10).collect::<Vec<u8>>()).unwrap();
        Images { disk, size: 64 << 10, files, facts: CheckpointFacts::default() }
    }

    #[test]
    fn pieces_and_holes_become_a_file_with_its_digest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let image = file("pages-1.img", 10, &[(2, 256, 3), (6, 515, 2)]);
        let saved = save(images(vec![image]), manifest(), &path).unwrap();
        assert_eq!(saved, Saved { files: 1, bytes: 10 });
        let content = [0, 0, 0, 1, 2, 0, 3, 4, 0, 0];
        assert_eq!(fs::read(path.join("pages-1.img")).unwrap(), content);
        let manifest = Manifest::read(&path).unwrap();
        assert_eq!(manifest.files[0].sha256, digest::of(&content));
    }

    #[test]
    fn what_a_hostile_guest_says_is_refused_and_nothing_is_left() {
        let cases = [
            vec![],
            vec![file("../x", 1, &[])],
            vec![file("a", 1, &[]), file("a", 1, &[])],
            vec![file("a", 1 << 40, &[])],
            vec![file("a", 10, &[(0, 64 << 10, 10)])],
            vec![file("a", 10, &[(0, u64::MAX - 3, 10)])],
            vec![file("a", 10, &[(5, 0, 6)])],
            vec![file("a", 10, &[(5, 0, 2), (4, 0, 1)])],
            (0..9).map(|n| file(&format!("f{n}"), 60 << 10, &[(0, 0, 60 << 10)])).collect(),
        ];
        for files in cases {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("new");
            let said = format!("{files:?}");
            let error = save(images(files), manifest(), &path).unwrap_err();
            assert!(matches!(error, CheckpointError::Guest { .. }), "{said}: {error}");
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_directory_in_use_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("mine"), "x").unwrap();
        let error = save(images(vec![file("a", 1, &[])]), manifest(), dir.path()).unwrap_err();
        assert!(matches!(error, CheckpointError::NotEmpty { .. }), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_half_way_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let mut images =
            images(vec![file("a", 1, &[(0, 0, 1)]), file("b", 1 << 15, &[(0, 1 << 15, 1 << 15)])]);
        // Shorter than the guest was told it is.
        images.disk.set_len(40 << 10).unwrap();
        images.size = 64 << 10;
        assert!(save(images, manifest(), &path).is_err());
        assert!(!path.exists());
    }
}
