//! The copy mounts of a checkpointed container: what the manifest records of them, and which copies of a new container take
//! their places.
//!
//! What the container had written to a copy is an image of the checkpoint. What it was a copy of is not: the base disk is in the
//! cache, or is made again of a directory that has not changed.

use std::{
    fs::File,
    io::Seek as _,
    path::{Path, PathBuf},
};

use machinen_base::text::printable;
use machinen_protocol::copies;
use machinen_storage::rootdisk::RootdiskKey;
use serde::{Deserialize, Serialize};

use super::{
    CheckpointError, CheckpointManifest,
    files::{open_image, verify_opened},
};
use crate::config::copies::CopyMount;

/// A copy mount of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestCopy {
    /// The path in the container's configuration.
    pub destination: PathBuf,
    /// `RootdiskKey` of the disk with the copied files.
    pub rootdisk: String,
}

/// Puts the copies of a new container into the order of the checkpoint.
///
/// # Errors
/// The first copy that is missing, or is not in the checkpoint.
pub(crate) fn arrange(
    recorded: &[ManifestCopy],
    configured: &[CopyMount],
) -> Result<Vec<CopyMount>, CheckpointError> {
    let is_recorded = |copy: &&CopyMount| recorded.iter().any(|old| old.destination == copy.destination);
    if let Some(new) = configured.iter().find(|copy| !is_recorded(copy)) {
        return Err(CheckpointError::NewCopy { destination: new.destination.clone() });
    }
    let find = |old: &ManifestCopy| {
        let found = configured.iter().find(|copy| copy.destination == old.destination);
        found.cloned().ok_or_else(|| CheckpointError::NoCopy {
            destination: printable(&old.destination.to_string_lossy()),
        })
    };
    recorded.iter().map(find).collect()
}

/// Checks that a copy is one of the same files as in the checkpoint.
///
/// # Errors
/// The files differ.
pub(crate) fn check_base(recorded: &ManifestCopy, ours: RootdiskKey) -> Result<(), CheckpointError> {
    match recorded.rootdisk == ours.to_string() {
        true => Ok(()),
        false => Err(CheckpointError::CopyBase {
            destination: printable(&recorded.destination.to_string_lossy()),
            theirs: printable(&recorded.rootdisk),
            ours,
        }),
    }
}

/// Opens what the container had written to the copy of this number. Blocks.
///
/// # Errors
/// The image is missing or was changed.
pub(crate) fn open_written(
    dir: &Path,
    manifest: &CheckpointManifest,
    number: usize,
) -> Result<File, CheckpointError> {
    let name = copies::image(number);
    let image = manifest.files.iter().find(|image| image.name == name);
    let image = image
        .ok_or_else(|| CheckpointError::Changed { path: dir.join(&name), what: "is missing".to_owned() })?;
    let (path, mut file) = open_image(dir, image)?;
    verify_opened(image, &path, &file)?;
    file.rewind().map_err(CheckpointError::file("read", path))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(destination: &str) -> ManifestCopy {
        ManifestCopy { destination: destination.into(), rootdisk: "0".repeat(64) }
    }

    fn configured(destination: &str) -> CopyMount {
        CopyMount { source: "/srv".into(), destination: destination.into() }
    }

    #[test]
    fn copies_are_those_of_the_checkpoint() {
        let old = [recorded("/a"), recorded("/b")];
        let arranged = arrange(&old, &[configured("/b"), configured("/a")]).unwrap();
        assert_eq!(arranged, [configured("/a"), configured("/b")]);
        let missing = arrange(&old, &[configured("/a")]).unwrap_err().to_string();
        assert!(missing.contains("a copy mount at /b"), "{missing}");
        let new = [configured("/a"), configured("/b"), configured("/c")];
        let new = arrange(&old, &new).unwrap_err().to_string();
        assert!(new.contains("a copy mount at /c, which"), "{new}");
    }

    #[test]
    fn other_files_are_refused() {
        let key = |byte| RootdiskKey::new([byte; 32]);
        assert!(check_base(&recorded("/a"), key(0)).is_ok());
        let error = check_base(&recorded("/a"), key(1)).unwrap_err().to_string();
        assert!(error.contains("/a") && error.contains(&"01".repeat(32)), "{error}");
    }

    #[test]
    fn the_manifest_keeps_its_words() {
        let text = format!(r#"{{"destination":"/a","rootdisk":"{}"}}"#, "0".repeat(64));
        assert_eq!(serde_json::from_str::<ManifestCopy>(&text).unwrap(), recorded("/a"));
        assert_eq!(serde_json::to_string(&recorded("/a")).unwrap(), text);
    }
}
