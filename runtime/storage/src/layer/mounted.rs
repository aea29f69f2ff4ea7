//! An overlay that is mounted while its upper directory gets another content.

use std::{os::fd::AsFd as _, path::Path};

use rustix::{
    fs::CWD,
    io::Errno,
    mount::{FsPickFlags, fsconfig_reconfigure, fspick},
};

/// Makes an overlay look names up again in its directories. The kernel keeps what it has looked up, and does not expect
/// the upper directory to change (overlayfs.rst, "Changes to underlying filesystems"). A reconfiguration without any
/// change drops all names that are not in use.
///
/// A failure is logged: the names are also dropped when the overlay is mounted the next time.
pub(super) fn forget_names(mount: &Path) {
    let reconfigure = || -> Result<(), Errno> {
        let overlay = fspick(CWD, mount, FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_SYMLINK_NOFOLLOW)?;
        fsconfig_reconfigure(overlay.as_fd())
    };
    match reconfigure() {
        // It was unmounted meanwhile.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(error) => {
            tracing::warn!(
                mount = %mount.display(),
                "the mounted overlay may not show the container's changes until it is mounted again: {error}"
            );
        }
    }
}
