//! The container that is forked.

use std::{fs::File, path::Path, time::Duration};

use containerd_client::{
    services::v1::{
        Container,
        snapshots::{Info, Kind},
    },
    types::{
        Mount,
        v1::{Process, Status},
    },
};
use machinen::{
    fs::{FileError, lock_within, try_lock},
    pod::rootfs::{self, RootfsMount, RootfsPlan},
};
use oci_spec::runtime::Spec;

use super::{containerd::ContainerdClient, error::ForkError};

/// The runtime's name, and the name of its program, which containerd accepts in its place.
const RUNTIME: &str = "io.machinen.v1";
const PROGRAM: &str = "/containerd-shim-machinen-v1";

/// How long another fork of the same container is waited for.
const LONGEST_FORK: Duration = Duration::from_secs(30 * 60);

/// A container that can be forked.
#[derive(Debug)]
pub(super) struct ForkSource {
    pub(super) container: Container,
    pub(super) task: Process,
    pub(super) snapshot: Info,
    /// Where its root file system is and where its writes go.
    pub(super) rootfs: RootfsPlan,
}

impl ForkSource {
    /// # Errors
    /// There is no such container, or the container cannot be forked.
    pub(super) async fn find(containerd: &ContainerdClient, id: &str) -> Result<Self, ForkError> {
        let id_of = || id.to_owned();
        let container = containerd.container(id).await.map_err(|error| match error.is_not_found() {
            true => ForkError::NoContainer { id: id_of(), namespace: containerd.namespace.clone() },
            false => error,
        })?;
        let runtime = container.runtime.as_ref().map(|runtime| runtime.name.clone()).unwrap_or_default();
        if runtime != RUNTIME && !runtime.ends_with(PROGRAM) {
            return Err(ForkError::Runtime { id: id_of(), runtime });
        }
        let task = containerd.task(id).await.map_err(|error| match error.is_not_found() {
            true => ForkError::NotRunning { id: id_of(), state: "has no task" },
            false => error,
        })?;
        let state = match task.status() {
            Status::Running | Status::Paused => None,
            Status::Created => Some("has not been started"),
            Status::Stopped => Some("has ended"),
            Status::Pausing | Status::Unknown => Some("is in no known state"),
        };
        if let Some(state) = state {
            return Err(ForkError::NotRunning { id: id_of(), state });
        }
        if container.snapshotter.is_empty() || container.snapshot_key.is_empty() {
            return Err(ForkError::NoSnapshot { id: id_of() });
        }
        let snapshot = containerd.snapshot(&container.snapshotter, &container.snapshot_key).await?;
        if snapshot.kind() != Kind::Active {
            return Err(ForkError::NoSnapshot { id: id_of() });
        }
        let mounts = containerd.mounts(&container.snapshotter, &container.snapshot_key).await?;
        let rootfs = plan(id, &mounts)?;
        Ok(Self { container, task, snapshot, rootfs })
    }

    /// Makes other forks of this container wait until the lock is dropped, since each fork exports what the
    /// container has written again. Blocks.
    ///
    /// # Errors
    /// The directory cannot be locked.
    pub(super) fn lock(&self) -> Result<File, ForkError> {
        let path = self.rootfs.disk.snapshot();
        // This directory stays in place while its content is exchanged.
        let home = path.parent().unwrap_or(path);
        let file = File::open(home).map_err(FileError::at("open", home))?;
        if !try_lock(&file).map_err(FileError::at("lock", home))? {
            eprintln!("waiting for another fork of {}", self.container.id);
            lock_within(&file, LONGEST_FORK).map_err(FileError::at("lock", home))?;
        }
        Ok(file)
    }
}

/// The location of the root file system that containerd mounts this way.
///
/// # Errors
/// machinen cannot use this root file system.
pub(super) fn plan(id: &str, mounts: &[Mount]) -> Result<RootfsPlan, ForkError> {
    let mounts: Vec<_> = mounts
        .iter()
        .map(|mount| RootfsMount {
            kind: mount.r#type.clone(),
            source: mount.source.clone().into(),
            options: mount.options.clone(),
        })
        .collect();
    rootfs::plan(&mounts, &Spec::default(), Path::new("/"))
        .map_err(|source| ForkError::Rootfs { id: id.to_owned(), source })
}
