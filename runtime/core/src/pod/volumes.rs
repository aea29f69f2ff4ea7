//! The sources of a container's volumes, opened before anything is changed.

use std::{io, os::fd::OwnedFd, path::Path, sync::Arc};

use rustix::fs::{FileType, Mode, OFlags, fstat, open};

use super::PodError;
use crate::{
    shares::{ShareError, Volume},
    spec::volumes::VolumeMount,
};

/// Opens the sources. A relative one is relative to the bundle. Blocks as long as a file system of the host does not
/// answer.
///
/// # Errors
/// A source does not exist, or is a FIFO or a device.
pub(super) fn open_all(bundle: &Path, mounts: &[VolumeMount]) -> Result<Vec<Volume>, PodError> {
    mounts.iter().map(|mount| open_one(bundle, mount)).collect::<Result<_, _>>().map_err(PodError::Share)
}

fn open_one(bundle: &Path, mount: &VolumeMount) -> Result<Volume, ShareError> {
    let path = bundle.join(&mount.source);
    let opened = open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let opened = opened.map_err(io::Error::from).and_then(|source| Ok((file_type(&source)?, source)));
    let (kind, source) = opened.map_err(|source| ShareError::Source {
        path: path.clone(),
        destination: mount.destination.clone(),
        source,
    })?;
    let is_file = match kind {
        FileType::Directory => false,
        // A socket of the host is a file to which the guest can connect.
        FileType::RegularFile | FileType::Socket => true,
        other => {
            let (destination, kind) = (mount.destination.clone(), name(other));
            return Err(ShareError::SourceKind { path, destination, kind });
        }
    };
    let destination = mount.destination.clone();
    let (options, mappings) = (mount.options, mount.mappings.clone());
    Ok(Volume { path, destination, source: Arc::new(source), is_file, options, mappings })
}

fn file_type(fd: &OwnedFd) -> io::Result<FileType> {
    Ok(FileType::from_raw_mode(fstat(fd)?.st_mode))
}

fn name(kind: FileType) -> &'static str {
    match kind {
        FileType::BlockDevice => "block device",
        FileType::CharacterDevice => "character device",
        FileType::Fifo => "FIFO",
        _ => "file of another type",
    }
}

#[cfg(test)]
mod tests {
    use machinen_base::{error::chain, mounts::TreeOptions};

    use super::*;
    use crate::spec::volumes::MountPart;

    #[test]
    fn only_directories_files_and_sockets_are_sources() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        let open = |source: &str| {
            let options = TreeOptions { recursive: true, read_only: false, follows_host: false };
            let (source, destination) = (source.into(), "/data".into());
            open_all(
                dir.path(),
                &[VolumeMount {
                    mount: 0,
                    source,
                    destination,
                    options,
                    mappings: None,
                    part: MountPart::Whole,
                }],
            )
        };
        assert!(open("file").unwrap()[0].is_file && !open(".").unwrap()[0].is_file);
        assert!(open("socket").unwrap()[0].is_file);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join("fifo"),
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        for (source, words) in [
            ("/dev/null", "/dev/null, the source of the mount /data, is a character device"),
            ("fifo", "is a FIFO: only directories, regular files and sockets can be mounted"),
            ("missing", "the source of the mount /data: No such file or directory"),
        ] {
            let error = chain(&open(source).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }
}
