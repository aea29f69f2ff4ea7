//! From a directory of files to the disk that a guest restores from.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    panic::resume_unwind,
    path::{Path, PathBuf},
    thread,
};

use rustix::fs::{Mode, OFlags};
use sha2::{Digest as _, Sha256};

use super::{
    CheckpointError,
    manifest::{ImageDigest, MANIFEST, Manifest},
};
use crate::rootdisk::RootdiskCache;

const CHUNK: usize = 1 << 20;

/// A disk with the images of the checkpoint in `dir`, which has no name and goes with its last descriptor. Every size and
/// digest was checked. Blocks.
///
/// # Errors
/// An image is missing or not as it was written; no space or no mke2fs.
pub(crate) fn image_disk(
    dir: &Path,
    manifest: &Manifest,
    cache: &RootdiskCache,
    mke2fs: &Path,
) -> Result<File, CheckpointError> {
    let opened = rustix::fs::open(dir, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let opened = opened.map_err(|error| CheckpointError::file("open", dir)(error.into()))?;
    manifest.files.iter().try_for_each(|image| open_image(dir, image).map(drop))?;
    let bytes = manifest.files.iter().map(|file| file.size.next_multiple_of(4096)).sum();
    // Side by side: each reads all of it once.
    let (disk, verified) = thread::scope(|scope| {
        let disk = scope.spawn(|| cache.disk_of_files(opened, manifest.files.len() as u64, bytes, mke2fs));
        let verified = manifest.files.iter().try_for_each(|image| verify_image(dir, image));
        (disk.join().unwrap_or_else(|panic| resume_unwind(panic)), verified)
    });
    verified?;
    Ok(disk?)
}

/// Reads a checkpoint, and compares all of it with what was written. Blocks.
///
/// # Errors
/// It is no checkpoint, or what is different.
pub fn verify(dir: &Path) -> Result<Manifest, CheckpointError> {
    let manifest = Manifest::read(dir)?;
    manifest.files.iter().try_for_each(|image| verify_image(dir, image))?;
    Ok(manifest)
}

/// Removes a checkpoint: the files that its manifest names, and the directory if nothing else is in it. Blocks.
///
/// # Errors
/// It is no checkpoint, or a file cannot be removed; the manifest goes last, so that it can be tried again.
pub fn remove(dir: &Path) -> Result<(), CheckpointError> {
    let manifest = Manifest::read(dir)?;
    for name in manifest.files.iter().map(|file| file.name.as_str()).chain([MANIFEST]) {
        let path = dir.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(CheckpointError::file("remove", path)(error));
            }
            _ => {}
        }
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => {
            Err(CheckpointError::file("remove", dir)(error))
        }
        _ => Ok(()),
    }
}

/// # Errors
/// The image is missing, or not a file of the size that was written.
fn open_image(dir: &Path, image: &ImageDigest) -> Result<(PathBuf, File), CheckpointError> {
    let path = dir.join(&image.name);
    let changed = |what: String| Err(CheckpointError::Changed { path: path.clone(), what });
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(&path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT) => return changed("is missing".to_owned()),
        Err(rustix::io::Errno::LOOP) => return changed("is a link".to_owned()),
        Err(error) => return Err(CheckpointError::file("open", &path)(error.into())),
    };
    let metadata = file.metadata().map_err(CheckpointError::file("read", &path))?;
    if !metadata.is_file() {
        return changed("is not a regular file".to_owned());
    }
    if metadata.len() != image.size {
        return changed(format!("has {} bytes instead of {}", metadata.len(), image.size));
    }
    Ok((path, file))
}

/// # Errors
/// The image is not the one that was written.
fn verify_image(dir: &Path, image: &ImageDigest) -> Result<(), CheckpointError> {
    let (path, file) = open_image(dir, image)?;
    let (mut digest, mut buffer, mut rest) = (Sha256::new(), vec![0; CHUNK], file.take(image.size));
    loop {
        match rest.read(&mut buffer).map_err(CheckpointError::file("read", &path))? {
            0 => break,
            count => digest.update(&buffer[..count]),
        }
    }
    if format!("{:x}", digest.finalize()) != image.sha256 {
        return Err(CheckpointError::Changed { path, what: "has another content".to_owned() });
    }
    Ok(())
}
