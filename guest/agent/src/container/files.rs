//! Small files of the host (such as /etc/hosts) that are mounted in a container.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use machinen_protocol::api;

use crate::engine::FileMount;

#[derive(Debug, thiserror::Error)]
pub(crate) enum FilesError {
    #[error("cannot write the file for {destination}")]
    Write { destination: String, source: io::Error },
    #[error("the destination {destination} of a file is not an absolute path")]
    NotAbsolute { destination: String },
}

/// Writes the files below `dir`, the agent's directory of the container.
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
    // Not with open(2), to which the agent's umask would apply.
    out.set_permissions(fs::Permissions::from_mode(file.mode & 0o7777))
}
