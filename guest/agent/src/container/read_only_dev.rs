//! Makes the /dev of a container read-only when the devices are in it, as runc does.

use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use rustix::{
    fs::CWD,
    mount::{FsPickFlags, fsconfig_reconfigure, fsconfig_set_flag, fspick},
};

#[derive(Debug, thiserror::Error)]
#[error("cannot make {path} read-only")]
pub(crate) struct ReadOnlyDevError {
    path: PathBuf,
    source: rustix::io::Errno,
}

/// Makes the tmpfs at /dev of a waiting init read-only.
///
/// # Errors
/// The kernel refuses.
pub(super) fn read_only_dev(init: Pid) -> Result<(), ReadOnlyDevError> {
    let path = Path::new("/proc").join(init.to_string()).join("root/dev");
    let make = || {
        let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_SYMLINK_NOFOLLOW;
        let tmpfs = fspick(CWD, &path, flags)?;
        fsconfig_set_flag(&tmpfs, "ro")?;
        fsconfig_reconfigure(&tmpfs)
    };
    make().map_err(|source| ReadOnlyDevError { path: path.clone(), source })
}
