//! Finds the guest kernel and the guest image.

use std::{
    env,
    path::{Path, PathBuf},
};

use machinen_base::error::{ErrorKind, HasKind};

/// Takes precedence over every other directory.
pub const DIR_VARIABLE: &str = "MACHINEN_ASSETS_DIR";

const KERNEL: &str = "vmlinux";
const IMAGE: &str = "guest.img";

/// The two files that every VM boots from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assets {
    /// Uncompressed kernel with a PVH entry point.
    pub kernel: PathBuf,
    /// Read-only root file system (erofs) with the agent.
    pub image: PathBuf,
}

/// A file that is in none of the directories.
#[derive(Debug, thiserror::Error)]
#[error(
    "guest {what} {file} is missing; looked in {searched}; build it with `make kernel guest-image`, or set {DIR_VARIABLE}"
)]
pub struct MissingAsset {
    what: &'static str,
    file: &'static str,
    searched: String,
}

impl HasKind for MissingAsset {
    fn kind(&self) -> ErrorKind {
        ErrorKind::NotFound
    }
}

impl Assets {
    /// Looks in `MACHINEN_ASSETS_DIR`, then `configured` (`assets.dir` of the configuration, empty by default), then `../lib/machinen`
    /// and `../share/machinen` relative to the running binary, then `target/guest` of the checkout that the binary was built in. If
    /// the user has named a directory, no other one is searched.
    ///
    /// # Errors
    /// A file is missing. The error names all directories that were searched.
    pub fn find(configured: &Path) -> Result<Self, MissingAsset> {
        let named = env::var_os(DIR_VARIABLE)
            .map(PathBuf::from)
            .or_else(|| Some(configured.to_owned()))
            .filter(|dir| !dir.as_os_str().is_empty());
        match named {
            Some(dir) => Self::in_first_of(&[dir]),
            None => Self::in_first_of(&dirs_of(&env::current_exe().unwrap_or_default())),
        }
    }

    fn in_first_of(dirs: &[PathBuf]) -> Result<Self, MissingAsset> {
        let dir = dirs.iter().find(|dir| dir.join(KERNEL).is_file()).or(dirs.first());
        let find = |what, file| {
            dir.map(|dir| dir.join(file)).filter(|path| path.is_file()).ok_or_else(|| MissingAsset {
                what,
                file,
                searched: dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", "),
            })
        };
        Ok(Self { kernel: find("kernel", KERNEL)?, image: find("image", IMAGE)? })
    }
}

/// The directories that belong to a binary: `PREFIX/lib/machinen` for `PREFIX/bin/x`, `PREFIX/share/machinen`, where
/// version 0.1 has installed them, and
/// `CHECKOUT/target/guest` for `CHECKOUT/target/release/x`.
fn dirs_of(binary: &Path) -> Vec<PathBuf> {
    let parent = binary.parent().unwrap_or(Path::new("/"));
    let mut dirs = vec![parent.join("../lib/machinen"), parent.join("../share/machinen")];
    dirs.extend(binary.ancestors().filter(|dir| dir.ends_with("target")).map(|target| target.join("guest")));
    dirs
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn kernel_and_image_come_from_the_first_directory_with_a_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        fs::create_dir_all(&first).unwrap();
        fs::create_dir_all(&second).unwrap();
        fs::write(second.join(KERNEL), "").unwrap();
        let error = Assets::in_first_of(&[first.clone(), second.clone()]).unwrap_err();
        assert!(error.to_string().contains("guest image guest.img is missing"), "{error}");
        fs::write(second.join(IMAGE), "").unwrap();
        let found = Assets::in_first_of(&[first, second.clone()]).unwrap();
        assert_eq!(found.kernel, second.join(KERNEL));
    }

    #[test]
    fn a_checkout_and_a_prefix_are_known() {
        let dirs = dirs_of(Path::new("/src/target/release/machinen"));
        assert_eq!(dirs[2], Path::new("/src/target/guest"));
        let installed = ["/usr/bin/../lib/machinen", "/usr/bin/../share/machinen"].map(Path::new);
        assert_eq!(dirs_of(Path::new("/usr/bin/machinen")), installed);
    }
}
