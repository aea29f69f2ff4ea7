//! The steps of a fork.

use std::{
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use containerd_client::{
    services::v1::{Container, CreateTaskRequest},
    types::Mount,
};
use machinen::{config::Config, container_disk::ContainerDiskPlan, error::chain, layer::LayerCopy, pod};
use machinen_task::options;
use prost_types::Any;

use super::{
    ForkArgs,
    checkpoint_dir::CheckpointDir,
    containerd::ContainerdClient,
    error::ForkError,
    signals::Signals,
    source::{self, ForkSource},
    spec::{ForkOptions, ForkSpec},
    undo::{LABEL, Undo},
};
use crate::find::FORKED_FROM;

/// A container that was made.
#[derive(Debug)]
pub(super) struct Forked {
    pub(super) pid: u32,
    pub(super) hostname: Option<String>,
    /// Where the checkpoint is, if the user keeps it.
    pub(super) checkpoint_dir: Option<PathBuf>,
}

pub(super) struct Fork<'a> {
    pub(super) containerd: ContainerdClient,
    pub(super) args: &'a ForkArgs,
    pub(super) source: ForkSource,
    pub(super) spec: ForkSpec,
    pub(super) checkpoint_dir: CheckpointDir,
    pub(super) lease: String,
    pub(super) signals: Signals,
    /// What to undo if a later step fails, in the order in which it was made.
    pub(super) undo: Vec<Undo>,
}

/// # Errors
/// The container cannot be forked. All changes have been undone.
pub(super) async fn fork(
    containerd: ContainerdClient,
    args: &ForkArgs,
    config: &Config,
) -> Result<Forked, ForkError> {
    let source = ForkSource::find(&containerd, &args.source).await?;
    match containerd.container(&args.new).await {
        Ok(_) => return Err(ForkError::Exists { id: args.new.clone() }),
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error),
    }
    let options = ForkOptions {
        source: &args.source,
        new: &args.new,
        hostname: args.hostname.as_deref(),
        tcp: args.tcp,
        volumes: args.volumes,
        lazy: args.lazy,
        netns: args.netns.as_ref(),
        publish: args.publish.as_deref(),
    };
    let configured = source.container.spec.as_ref().map(|spec| spec.value.as_slice()).unwrap_or_default();
    let spec = ForkSpec::new(configured, &options)?;
    pod::admits_one_more(config)?;
    let lock = source.lock()?;
    let signals = Signals::catch()?;
    let checkpoint_dir = CheckpointDir::at(args.checkpoint_dir.as_deref(), &config.rootdisk.dir)?;
    // Never the name of a lease that a killed fork has left.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let lease = format!("machinen-fork-{}-{}", args.new, since.as_nanos());
    let mut fork = Fork {
        containerd,
        args,
        source,
        spec,
        checkpoint_dir,
        lease,
        signals,
        undo: vec![Undo::CheckpointDir],
    };
    let forked = match fork.prepare().await {
        Ok(rootfs) => {
            drop(lock);
            fork.restore(rootfs).await
        }
        Err(error) => Err(error),
    };
    match forked {
        Ok(pid) => Ok(fork.finish(pid).await),
        Err(error) => {
            fork.undo_all(&error).await;
            Err(error)
        }
    }
}

impl Fork<'_> {
    /// Prepares a snapshot and a checkpoint of the same moment. Returns how the snapshot is mounted.
    async fn prepare(&mut self) -> Result<Vec<Mount>, ForkError> {
        let new = self.args.new.as_str();
        let leased = self.containerd.take_lease(&self.lease).await;
        self.record(Undo::Lease, leased)?;
        self.signals.check()?;
        let rootfs = self.make_snapshot().await;
        let rootfs = self.record(Undo::Snapshot, rootfs)?;
        self.signals.check()?;
        let layer_copy = layer_copy(&self.source.rootfs.disk, &source::plan(new, &rootfs)?.disk)
            .ok_or_else(|| ForkError::NoSnapshot { id: self.args.source.clone() })?;
        let created = self.containerd.create_container(self.container(&self.spec.restoring)).await;
        let created = created.map_err(|error| match error.is_already_exists() {
            true => ForkError::Exists { id: new.to_owned() },
            false => error,
        });
        self.record(Undo::Container, created)?;
        self.signals.check()?;
        self.capture(&layer_copy).await?;
        self.signals.check()?;
        Ok(rootfs)
    }

    /// Restores NEW from the checkpoint, and starts it.
    async fn restore(&mut self, rootfs: Vec<Mount>) -> Result<u32, ForkError> {
        let new = self.args.new.as_str();
        eprintln!("restoring {new}");
        let checkpoint_dir = self.checkpoint_dir.path().display().to_string();
        let runtime = self.source.container.runtime.as_ref().and_then(|runtime| runtime.options.as_ref());
        let runtime = runtime.map(|options| (options.type_url.as_str(), &*options.value));
        let options = options::restoring(runtime, &checkpoint_dir).map_err(ForkError::Options)?;
        let options = Some(Any { type_url: options.type_url, value: options.value });
        let terminal = self.source.task.terminal;
        let request = CreateTaskRequest {
            container_id: new.to_owned(),
            rootfs,
            terminal,
            options,
            ..Default::default()
        };
        let created = self.containerd.create_task(request).await;
        self.record(Undo::Task, created)?;
        self.signals.check()?;
        // The next task of NEW must not be restored from this checkpoint.
        self.containerd.update_spec(self.container(&self.spec.lasting)).await?;
        // The VM has the images as a disk, which stays readable.
        if !self.checkpoint_dir.is_kept() {
            self.checkpoint_dir.remove()?;
        }
        self.signals.check()?;
        self.containerd.start(new).await
    }

    /// Gives the lease back. NEW runs, so a failure here is not a failure of the fork.
    async fn finish(mut self, pid: u32) -> Forked {
        match self.containerd.give_back_lease(&self.lease).await {
            Err(error) if !error.is_not_found() => {
                eprintln!("machinen: {}; it expires by itself", chain(&error));
            }
            _ => {}
        }
        let checkpoint_dir = self.checkpoint_dir.is_kept().then(|| self.checkpoint_dir.path().to_owned());
        Forked { pid, hostname: self.spec.hostname, checkpoint_dir }
    }

    async fn make_snapshot(&self) -> Result<Vec<Mount>, ForkError> {
        let ForkSource { container, snapshot, .. } = &self.source;
        let labels = [(LABEL.to_owned(), self.lease.clone())].into();
        let new = self.args.new.as_str();
        let created = self.containerd.prepare(&container.snapshotter, new, &snapshot.parent, labels).await;
        created.map_err(|error| match error.is_already_exists() {
            true => ForkError::SnapshotExists { id: new.to_owned() },
            false => error,
        })
    }

    /// The description of NEW for containerd.
    fn container(&self, spec: &[u8]) -> Container {
        let source = &self.source.container;
        let kind = source.spec.as_ref().map(|spec| spec.type_url.clone()).unwrap_or_default();
        let mut labels = source.labels.clone();
        // `machinen ls` shows it.
        labels.insert(FORKED_FROM.to_owned(), self.args.source.clone());
        Container {
            id: self.args.new.clone(),
            labels,
            image: source.image.clone(),
            runtime: source.runtime.clone(),
            spec: Some(Any { type_url: kind, value: spec.to_owned() }),
            snapshotter: source.snapshotter.clone(),
            snapshot_key: self.args.new.clone(),
            ..Default::default()
        }
    }
}

/// None if the writes of one of the containers do not reach its snapshot.
fn layer_copy(from: &ContainerDiskPlan, to: &ContainerDiskPlan) -> Option<LayerCopy> {
    match (from, to) {
        (ContainerDiskPlan::Existing { path: from, .. }, ContainerDiskPlan::Existing { path: to, .. }) => {
            Some(LayerCopy::Disks { from: from.clone(), to: to.clone() })
        }
        (from, to) => Some(LayerCopy::Directories { from: from.target()?, to: to.target()? }),
    }
}
