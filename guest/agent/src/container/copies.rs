//! Copies of the host's directories in a container.
//!
//! ```text
//!   <dir>/copies/N/base    the copied files: ext4, read-only, shared with other VMs
//!   <dir>/copies/N/rw      what the container writes: ext4 of its own
//!   <dir>/copies/N/rootfs  overlay of both, which the container gets a bind mount of
//! ```

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use machinen_protocol::{
    api,
    disks::RootDisks,
    error::{ErrorKind, HasKind},
};
use serde_json::{Value, json};

use super::rootfs::{Rootfs, RootfsError};
use crate::{
    console,
    disk::{DiskSource, ScsiAddress},
};

/// The directory below the agent's directory of a container.
pub(crate) const DIR: &str = "copies";

#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error("the copy mount {destination} does not have two disks")]
    NoDisks { destination: String },
    #[error("cannot {action} {path}")]
    Dir { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot mount the copy {destination}")]
    Mount { destination: String, source: RootfsError },
    #[error("cannot unmount a copy")]
    Unmount(#[source] RootfsError),
    #[error("the configuration is not JSON")]
    Config(#[from] serde_json::Error),
}

impl HasKind for CopyError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoDisks { .. } | Self::Config(_) => ErrorKind::InvalidArgument,
            Self::Mount { .. } => ErrorKind::NotFound,
            Self::Dir { .. } | Self::Unmount(_) => ErrorKind::Internal,
        }
    }
}

/// The copies of a container, in the order of the request. They are unmounted when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Copies {
    dir: PathBuf,
    mounted: Vec<Rootfs>,
}

impl Copies {
    /// Mounts the copies of the request below `dir`, and adds them to its configuration.
    ///
    /// # Errors
    /// A disk does not appear or cannot be mounted.
    pub(super) async fn mount(
        source: &DiskSource,
        dir: &Path,
        request: &mut api::CreateContainerRequest,
    ) -> Result<Self, CopyError> {
        let mut copies = Self { dir: dir.join(DIR), mounted: Vec::new() };
        if request.copies.is_empty() {
            return Ok(copies);
        }
        let mut config: Value = serde_json::from_slice(&request.oci_config)?;
        for (number, copy) in std::mem::take(&mut request.copies).into_iter().enumerate() {
            let destination = copy.destination;
            let disks = copy.rootfs.into_option().and_then(RootDisks::of_message);
            let Some(disks @ RootDisks::Overlay { .. }) = disks else {
                return Err(CopyError::NoDisks { destination });
            };
            let failed = |source| CopyError::Mount { destination: destination.clone(), source };
            let disks = source.find(disks.map(|disk| ScsiAddress::from(&disk))).await;
            let disks = disks.map_err(|error| failed(error.into()))?;
            let at = copies.dir.join(number.to_string());
            fs::create_dir_all(&at).map_err(|source| CopyError::Dir {
                action: "create",
                path: at.clone(),
                source,
            })?;
            let rootfs = Rootfs::mount(&at, &disks, None).await.map_err(failed)?;
            add(&mut config, &destination, rootfs.path());
            copies.mounted.push(rootfs);
        }
        request.oci_config = serde_json::to_vec(&config)?;
        Ok(copies)
    }

    /// Where the copies are mounted.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.mounted.iter().map(|copy| copy.path().to_owned()).collect()
    }

    /// The directories with what the container has written.
    pub(super) fn written(&self) -> Vec<PathBuf> {
        self.mounted.iter().filter_map(Rootfs::upper).collect()
    }

    /// Unmounts the copies. May be called again.
    ///
    /// # Errors
    /// A copy is still in use.
    pub(super) fn unmount(&self) -> Result<(), CopyError> {
        self.mounted.iter().try_for_each(Rootfs::unmount).map_err(CopyError::Unmount)?;
        match fs::remove_dir_all(&self.dir) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(CopyError::Dir { action: "remove", path: self.dir.clone(), source })
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.unmount().unwrap_or_else(|err| console::report(&err));
    }
}

/// Adds the mount of a copy, before those of the configuration that are below it.
fn add(config: &mut Value, destination: &str, source: &Path) {
    let mount = json!({
        "destination": destination,
        "type": "bind",
        "source": source.display().to_string(),
        "options": ["rbind", "rw"],
    });
    let mounts = &mut config["mounts"];
    if !mounts.is_array() {
        *mounts = json!([]);
    }
    let Some(mounts) = mounts.as_array_mut() else { return };
    let is_below = |entry: &Value| {
        let at = entry["destination"].as_str().unwrap_or_default();
        Path::new(at).starts_with(destination) && Path::new(at) != Path::new(destination)
    };
    let place = mounts.iter().position(is_below).unwrap_or(mounts.len());
    mounts.insert(place, mount);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_below_a_copy_cover_it() {
        let mut config = json!({"mounts": [
            {"destination": "/proc"}, {"destination": "/database"}, {"destination": "/data/sub"}, {"destination": "/x"},
        ]});
        add(&mut config, "/data", Path::new("/run/c/copies/0/rootfs"));
        add(&mut config, "/y", Path::new("/run/c/copies/1/rootfs"));
        let mounts = config["mounts"].as_array().unwrap();
        let order: Vec<_> = mounts.iter().map(|mount| mount["destination"].as_str().unwrap()).collect();
        assert_eq!(order, ["/proc", "/database", "/data", "/data/sub", "/x", "/y"]);
        assert_eq!(mounts[2]["source"], "/run/c/copies/0/rootfs");
        let mut empty = json!({});
        add(&mut empty, "/data", Path::new("/run/c/copies/0/rootfs"));
        assert_eq!(empty["mounts"][0]["type"], "bind");
    }
}
