//! The files of an image: those of a directory (OCI image layout), or of an archive.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read, Seek as _, SeekFrom},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use machinen::fs::FileError;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::{ImageCache, ImageError, reader::Compression};

/// Most files in an archive of an image.
const MAX_FILES: usize = 100_000;
/// Most bytes of an archive when it is not compressed any more.
const MAX_ARCHIVE: u64 = 64 << 30;
/// Most bytes of a document, such as a manifest.
const MAX_DOCUMENT: u64 = 4 << 20;

/// What a path is.
pub(super) enum Opened {
    /// A directory that is no image layout.
    Directory,
    /// A tar that is no archive of an image, not compressed.
    RootfsTar(File),
    Image(BlobStore),
}

/// Files by their names.
#[derive(Debug)]
pub(super) enum BlobStore {
    Layout(OwnedFd),
    Archive { file: Arc<File>, index: HashMap<PathBuf, Piece> },
}

/// The place of a file in an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    offset: u64,
    size: u64,
}

/// A part of a file, read without moving the file's own position.
#[derive(Debug)]
struct PieceReader {
    file: Arc<File>,
    piece: Piece,
}

impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.piece.size).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.file.read_at(&mut buffer[..most], self.piece.offset)?;
        if count == 0 && most > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.piece.offset += count as u64;
        self.piece.size -= count as u64;
        Ok(count)
    }
}

/// Finds out what a path is. A compressed archive is decompressed into a file without a name.
///
/// # Errors
/// The path cannot be read, or is no archive.
pub(super) fn open(path: &Path, cache: &ImageCache) -> Result<Opened, ImageError> {
    let file = File::open(path).map_err(FileError::at("open", path))?;
    let kind = file.metadata().map_err(FileError::at("look up", path))?;
    if kind.is_dir() {
        let dir = OwnedFd::from(file);
        return Ok(match beneath(&dir, Path::new("oci-layout")) {
            Ok(_) => Opened::Image(BlobStore::Layout(dir)),
            Err(_) => Opened::Directory,
        });
    }
    if !kind.is_file() {
        return Err(ImageError::NotAnArchive { path: path.to_owned() });
    }
    let tar = plain(file, path, cache)?;
    let index = index(&tar, path)?;
    let has = |name: &str| index.contains_key(Path::new(name));
    match (has("oci-layout") && has("index.json")) || has("manifest.json") {
        true => Ok(Opened::Image(BlobStore::Archive { file: Arc::new(tar), index })),
        false => Ok(Opened::RootfsTar(tar)),
    }
}

/// The archive without its compression.
fn plain(mut file: File, path: &Path, cache: &ImageCache) -> Result<File, ImageError> {
    let failed = |action| FileError::at(action, path);
    let mut start = [0; 4];
    let count = file.read_at(&mut start, 0).map_err(failed("read"))?;
    let compression = Compression::of(&start[..count]);
    if compression == Compression::None {
        return Ok(file);
    }
    file.seek(SeekFrom::Start(0)).map_err(failed("read"))?;
    let mut plain = cache.unnamed_file()?;
    let decoded = compression.decode(io::BufReader::new(file)).map_err(failed("decompress"))?;
    let count = io::copy(&mut decoded.take(MAX_ARCHIVE + 1), &mut plain).map_err(failed("decompress"))?;
    if count > MAX_ARCHIVE {
        return Err(ImageError::Bounds { what: "bytes", most: MAX_ARCHIVE });
    }
    plain.seek(SeekFrom::Start(0)).map_err(failed("read"))?;
    Ok(plain)
}

/// The files of an archive. docker's older archives have links to layers that they have already.
fn index(tar: &File, path: &Path) -> Result<HashMap<PathBuf, Piece>, ImageError> {
    let not_a_tar = |_| ImageError::NotAnArchive { path: path.to_owned() };
    let (mut files, mut links) = (HashMap::new(), Vec::new());
    let mut archive = tar::Archive::new(io::BufReader::new(tar));
    for entry in archive.entries_with_seek().map_err(not_a_tar)? {
        let entry = entry.map_err(not_a_tar)?;
        let Some(name) = entry.path().ok().and_then(|name| normal(&name)) else { continue };
        match entry.header().entry_type() {
            tar::EntryType::Regular => {
                files.insert(name, Piece { offset: entry.raw_file_position(), size: entry.size() });
            }
            tar::EntryType::Symlink => {
                let target = entry.link_name().ok().flatten();
                let target = target.and_then(|target| normal(&name.parent()?.join(target)));
                links.extend(target.map(|target| (name, target)));
            }
            _ => {}
        }
        if files.len() + links.len() > MAX_FILES {
            // No archive of an image has so many, and the files of a root file system need no index.
            return Ok(HashMap::new());
        }
    }
    for (name, target) in links {
        if let Some(piece) = files.get(&target).copied() {
            files.insert(name, piece);
        }
    }
    Ok(files)
}

/// A relative path without `.` and with `..` resolved; None if it leads out.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir => {
                if !normal.pop() {
                    return None;
                }
            }
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(normal)
}

fn beneath(dir: &OwnedFd, name: &Path) -> io::Result<File> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    // A fifo would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(openat2(dir.as_fd(), name, flags, Mode::empty(), resolve)?);
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")),
    }
}

impl BlobStore {
    /// Opens a file for reading; returns its size, too.
    ///
    /// # Errors
    /// The image does not have it, or it cannot be read.
    pub(super) fn open(&self, name: &str) -> Result<(Box<dyn Read>, u64), ImageError> {
        let missing = || ImageError::NoFile { name: name.to_owned() };
        let path = normal(Path::new(name)).ok_or_else(missing)?;
        match self {
            Self::Archive { file, index } => {
                let piece = *index.get(&path).ok_or_else(missing)?;
                Ok((Box::new(PieceReader { file: Arc::clone(file), piece }), piece.size))
            }
            Self::Layout(dir) => {
                let failed = |source: io::Error| match source.kind() {
                    io::ErrorKind::NotFound => missing(),
                    _ => ImageError::Read { name: name.to_owned(), source },
                };
                let file = beneath(dir, &path).map_err(failed)?;
                let size = file.metadata().map_err(failed)?.len();
                Ok((Box::new(file), size))
            }
        }
    }

    /// Whether there is a file with this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.open(name).is_ok()
    }

    /// Reads a document as a whole.
    ///
    /// # Errors
    /// The image does not have it, it is too large, or it cannot be read.
    pub(super) fn read(&self, name: &str) -> Result<Vec<u8>, ImageError> {
        let (reader, size) = self.open(name)?;
        let too_large = |size| ImageError::TooLarge { name: name.to_owned(), size, most: MAX_DOCUMENT };
        if size > MAX_DOCUMENT {
            return Err(too_large(size));
        }
        let mut bytes = Vec::new();
        let read = reader.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes);
        read.map_err(|source| ImageError::Read { name: name.to_owned(), source })?;
        match bytes.len() as u64 {
            size if size > MAX_DOCUMENT => Err(too_large(size)),
            _ => Ok(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_leads_out_is_none() {
        assert_eq!(normal(Path::new("./a/../b")), Some("b".into()));
        for path in ["../a", "/a", "a/../../b"] {
            assert_eq!(normal(Path::new(path)), None, "{path}");
        }
    }

    #[test]
    fn a_layout_gives_nothing_from_outside() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("index.json")).unwrap();
        std::fs::write(dir.path().join("file"), "x").unwrap();
        let store = BlobStore::Layout(File::open(dir.path()).unwrap().into());
        assert_eq!(store.read("file").unwrap(), b"x");
        for name in ["index.json", "../etc/passwd", "/etc/passwd", "none"] {
            assert!(store.read(name).is_err(), "{name}");
        }
    }
}
