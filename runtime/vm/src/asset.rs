//! Checks of the guest's kernel and image before QEMU starts, because QEMU starts from almost any file and
//! reports little.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use machinen_base::error::{ErrorKind, HasKind};

/// A kind of file that a guest boots from, and how to recognise it.
pub(super) struct Asset {
    name: &'static str,
    /// Offsets, and the bytes that must be found there.
    magic: &'static [(u64, &'static [u8])],
    is: &'static str,
}

/// ELF, 64 bits, little endian, for x86-64 (elf(5)).
pub(super) const KERNEL: Asset = Asset {
    name: "kernel",
    magic: &[(0, b"\x7fELF\x02\x01"), (18, &62_u16.to_le_bytes())],
    is: "an uncompressed x86-64 kernel (vmlinux)",
};

/// The superblock's magic number (linux/fs/erofs/erofs_fs.h).
pub(super) const IMAGE: Asset =
    Asset { name: "image", magic: &[(1024, &0xe0f5_e1e2_u32.to_le_bytes())], is: "an erofs image" };

/// Why a guest cannot be booted from a file.
#[derive(Debug, thiserror::Error)]
pub enum AssetFileError {
    /// The file cannot be opened or read.
    #[error("cannot read the guest {name} {}", path.display())]
    Read {
        /// What the file is: `kernel` or `image`.
        name: &'static str,
        /// Path of the file on the host.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// The file is closed to the user that QEMU runs as.
    #[error(
        "the guest {name} {} is not readable by everyone, and QEMU runs as an unprivileged user; try `chmod a+r`",
        path.display()
    )]
    Mode {
        /// What the file is: `kernel` or `image`.
        name: &'static str,
        /// Path of the file on the host.
        path: PathBuf,
    },
    /// The file has another format.
    #[error(
        "the guest {name} {} is damaged: it is not {is}; build it again with `make kernel guest-image`",
        path.display()
    )]
    Damaged {
        /// What the file is: `kernel` or `image`.
        name: &'static str,
        /// Path of the file on the host.
        path: PathBuf,
        /// The format that the file must have.
        is: &'static str,
    },
}

impl HasKind for AssetFileError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::Read { .. } | Self::Mode { .. } | Self::Damaged { .. } => ErrorKind::FailedPrecondition,
        }
    }
}

impl Asset {
    pub(super) fn open(&self, path: &Path) -> Result<File, AssetFileError> {
        let (name, is, path) = (self.name, self.is, path.to_owned());
        let read = || {
            let file = File::open(&path)?;
            let mode = file.metadata()?.mode();
            Ok((self.fits(&file)?, mode, file))
        };
        match read() {
            Err(source) => Err(AssetFileError::Read { name, path, source }),
            Ok((_, mode, _)) if mode & 0o004 == 0 => Err(AssetFileError::Mode { name, path }),
            Ok((false, ..)) => Err(AssetFileError::Damaged { name, path, is }),
            Ok((true, _, file)) => Ok(file),
        }
    }

    fn fits(&self, file: &File) -> io::Result<bool> {
        for (offset, expected) in self.magic {
            let mut found = vec![0; expected.len()];
            match file.read_exact_at(&mut found, *offset) {
                Ok(()) if found == *expected => {}
                Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error),
                Ok(()) | Err(_) => return Ok(false),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn every_defect_of_a_boot_file_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let checked = |asset: &Asset| asset.open(&path).map_err(|error| error.to_string());
        let write = |bytes: &[u8], mode: u32| {
            fs::write(&path, bytes).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        assert!(checked(&KERNEL).unwrap_err().starts_with("cannot read the guest kernel"));
        let mut kernel = b"\x7fELF\x02\x01".to_vec();
        kernel.resize(18, 0);
        kernel.extend([62, 0]);
        write(&kernel, 0o644);
        checked(&KERNEL).unwrap();
        assert!(checked(&IMAGE).unwrap_err().contains("is damaged: it is not an erofs image"));
        write(&kernel, 0o640);
        assert!(checked(&KERNEL).unwrap_err().contains("not readable by everyone"));
        write(&kernel[..19], 0o644);
        assert!(checked(&KERNEL).unwrap_err().contains("make kernel"));
        let mut image = vec![0; 1024];
        image.extend(0xe0f5_e1e2_u32.to_le_bytes());
        write(&image, 0o644);
        checked(&IMAGE).unwrap();
    }
}
