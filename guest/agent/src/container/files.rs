//! Small host files (/etc/hosts and its like) that a container sees at a path of its own.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use machinen_protocol::api;

/// A file of the agent's that the engine mounts into the container.
#[derive(Debug, Clone)]
pub(crate) struct FileMount {
    pub(crate) source: PathBuf,
    pub(crate) destination: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum FilesError {
    #[error("cannot place a file for {destination}")]
    Write { destination: String, source: io::Error },
    #[error("the destination {destination} of a file is not an absolute path")]
    NotAbsolute { destination: String },
}

/// Writes the files below `dir`, which is the agent's own.
///
/// # Errors
/// The guest's memory is full.
pub(crate) fn write(dir: &Path, files: &[api::InjectedFile]) -> Result<Vec<FileMount>, FilesError> {
    files
        .iter()
        .enumerate()
        .map(|(number, file)| {
            let destination = PathBuf::from(&file.destination);
            if !destination.is_absolute() {
                return Err(FilesError::NotAbsolute { destination: file.destination.clone() });
            }
            let source = dir.join(number.to_string());
            write_one(dir, &source, file)
                .map_err(|source| FilesError::Write { destination: file.destination.clone(), source })?;
            Ok(FileMount { source, destination })
        })
        .collect()
}

fn write_one(dir: &Path, path: &Path, file: &api::InjectedFile) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let mut out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    out.write_all(&file.content)?;
    // Not by open: the agent's umask is not the host's wish.
    out.set_permissions(fs::Permissions::from_mode(file.mode & 0o7777))
}
