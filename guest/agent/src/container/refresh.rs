//! What the guest knows of the host's files, at the start of a container.
//!
//! The kernel keeps the attributes of a volume's file for a second. Podman fills the container's /etc/hosts and
//! /etc/resolv.conf after it has created the container, and a command that reads them right after its start must not find
//! them empty.

use std::path::PathBuf;

use rustix::{
    fs::{AtFlags, CWD, StatxFlags, statx},
    io::Errno,
};
use tokio::task::{JoinError, spawn_blocking};

#[derive(Debug, thiserror::Error)]
pub(crate) enum RefreshError {
    #[error("cannot examine the volume {path}")]
    Examine { path: PathBuf, source: Errno },
    #[error("a thread that examines the volumes has ended early")]
    Thread(#[source] JoinError),
}

/// Has the kernel ask the host for the attributes of these volumes. In a thread, since the agent itself passes the
/// requests on.
///
/// # Errors
/// The host does not answer for a volume.
pub(super) async fn refresh(volumes: Vec<PathBuf>) -> Result<(), RefreshError> {
    if volumes.is_empty() {
        return Ok(());
    }
    let ask = move || {
        let flags = AtFlags::STATX_FORCE_SYNC | AtFlags::SYMLINK_NOFOLLOW;
        volumes.into_iter().try_for_each(|path| match statx(CWD, &path, flags, StatxFlags::SIZE) {
            Ok(_) => Ok(()),
            Err(source) => Err(RefreshError::Examine { path, source }),
        })
    };
    spawn_blocking(ask).await.map_err(RefreshError::Thread)?
}
