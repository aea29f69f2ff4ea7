//! Reads, verifies and removes the directory of a checkpoint, which other programs may have changed.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use machinen_base::fs::remove_if_exists;
use rustix::fs::{Mode, OFlags};

use super::{
    CheckpointError, digest,
    manifest::{CheckpointManifest, ImageDigest},
};

/// Reads a checkpoint and verifies all of its files. Blocks.
///
/// # Errors
/// The directory has no valid checkpoint, or a file was changed.
pub fn verify(dir: &Path) -> Result<CheckpointManifest, CheckpointError> {
    let manifest = CheckpointManifest::read(dir)?;
    for image in &manifest.files {
        let (path, file) = open_image(dir, image)?;
        verify_opened(image, &path, &file)?;
    }
    Ok(manifest)
}

/// Removes the files of a checkpoint: those that its manifest names, and the manifest. Blocks.
///
/// # Errors
/// The directory has no valid checkpoint, or a file cannot be removed. The manifest is removed last, so that
/// the request can be repeated.
pub fn clear(dir: &Path) -> Result<(), CheckpointError> {
    let manifest = CheckpointManifest::read(dir)?;
    for name in manifest.names() {
        let path = dir.join(name);
        remove_if_exists(&path).map_err(CheckpointError::file("remove", path))?;
    }
    Ok(())
}

/// Removes a checkpoint: its files, and the directory if it is empty then. Blocks.
///
/// # Errors
/// The same as for [`clear`].
pub fn remove(dir: &Path) -> Result<(), CheckpointError> {
    clear(dir)?;
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => {
            Err(CheckpointError::file("remove", dir)(error))
        }
        _ => Ok(()),
    }
}

/// # Errors
/// The image is missing, or is not a file of the recorded size.
pub(super) fn open_image(dir: &Path, image: &ImageDigest) -> Result<(PathBuf, File), CheckpointError> {
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
/// The content of the image differs from what was written.
pub(super) fn verify_opened(image: &ImageDigest, path: &Path, file: &File) -> Result<(), CheckpointError> {
    let same = if image.parts.is_empty() {
        digest::of_file(file, image.size).map(|found| found == image.sha256)
    } else {
        digest::parts_are(file, image.size, &image.parts)
    };
    match same.map_err(CheckpointError::file("read", path))? {
        true => Ok(()),
        false => {
            Err(CheckpointError::Changed { path: path.to_owned(), what: "has different content".to_owned() })
        }
    }
}
