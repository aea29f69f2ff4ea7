//! The steps of a fork.

use std::{
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use containerd_client::{
    services::v1::{Container, CreateTaskRequest},
    types::Mount,
};
use containerd_shim_protos::shim::oci::Options;
use machinen::{config::Config, error::chain, layer::Twins, pod, pod::rootfs::RootfsPlan};
use prost_types::Any;

use super::{
    ForkArgs,
    containerd::Containerd,
    error::ForkError,
    images::Images,
    signals::Signals,
    source::{self, Source},
    spec::{ForkSpec, Wishes},
    undo::{LABEL, Made},
};

/// A container that was made.
#[derive(Debug)]
pub(super) struct Forked {
    pub(super) pid: u32,
    pub(super) hostname: Option<String>,
    /// Where the checkpoint is, if it was to be kept.
    pub(super) bundle: Option<PathBuf>,
}

pub(super) struct Fork<'a> {
    pub(super) containerd: Containerd,
    pub(super) args: &'a ForkArgs,
    pub(super) source: Source,
    pub(super) spec: ForkSpec,
    pub(super) images: Images,
    pub(super) lease: String,
    pub(super) signals: Signals,
    /// In this order.
    pub(super) made: Vec<Made>,
}

/// # Errors
/// Nothing has changed then.
pub(super) async fn fork(
    containerd: Containerd,
    args: &ForkArgs,
    config: &Config,
) -> Result<Forked, ForkError> {
    let source = Source::find(&containerd, &args.source).await?;
    match containerd.container(&args.new).await {
        Ok(_) => return Err(ForkError::Exists { id: args.new.clone() }),
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error),
    }
    let wishes = Wishes {
        source: &args.source,
        new: &args.new,
        hostname: args.hostname.as_deref(),
        tcp: args.tcp,
        lazy: args.lazy,
    };
    let configured = source.container.spec.as_ref().map(|spec| spec.value.as_slice()).unwrap_or_default();
    let spec = ForkSpec::new(configured, &wishes)?;
    pod::admits_one_more(config)?;
    let lock = source.lock()?;
    let signals = Signals::catch()?;
    let images = Images::at(args.bundle.as_deref(), &config.rootdisk.dir)?;
    // Not the name of a lease that a killed fork has left.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let lease = format!("machinen-fork-{}-{}", args.new, since.as_nanos());
    let mut fork = Fork { containerd, args, source, spec, images, lease, signals, made: vec![Made::Images] };
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
            fork.take_back(&error).await;
            Err(error)
        }
    }
}

impl Fork<'_> {
    /// Up to a snapshot and images of the same moment. Returns how the snapshot is mounted.
    async fn prepare(&mut self) -> Result<Vec<Mount>, ForkError> {
        let new = self.args.new.as_str();
        let leased = self.containerd.take_lease(&self.lease).await;
        self.note(Made::Lease, leased)?;
        self.signals.check()?;
        let rootfs = self.make_snapshot().await;
        let rootfs = self.note(Made::Snapshot, rootfs)?;
        self.signals.check()?;
        let twins = twins(&self.source.rootfs, source::plan(new, &rootfs)?)
            .ok_or_else(|| ForkError::NoSnapshot { id: self.args.source.clone() })?;
        let created = self.containerd.create_container(self.container(&self.spec.restoring)).await;
        let created = created.map_err(|error| match error.is_already_exists() {
            true => ForkError::Exists { id: new.to_owned() },
            false => error,
        });
        self.note(Made::Container, created)?;
        self.signals.check()?;
        self.capture(&twins).await?;
        self.signals.check()?;
        Ok(rootfs)
    }

    /// From there to a container that runs.
    async fn restore(&mut self, rootfs: Vec<Mount>) -> Result<u32, ForkError> {
        let new = self.args.new.as_str();
        eprintln!("restoring {new}");
        let images = self.images.path().display().to_string();
        let options = Options { criu_image_path: images, ..Default::default() };
        let terminal = self.source.task.terminal;
        let request =
            CreateTaskRequest { container_id: new.to_owned(), rootfs, terminal, ..Default::default() };
        let created = self.containerd.create_task(request, &options).await;
        self.note(Made::Task, created)?;
        self.signals.check()?;
        // The next task of it is not restored from this checkpoint.
        self.containerd.update_spec(self.container(&self.spec.lasting)).await?;
        // The VM has a disk with all of the images.
        if !self.images.is_kept() {
            self.images.remove()?;
        }
        self.signals.check()?;
        self.containerd.start(new).await
    }

    /// NEW runs: what fails from now on is no failure of the fork.
    async fn finish(mut self, pid: u32) -> Forked {
        match self.containerd.give_back_lease(&self.lease).await {
            Err(error) if !error.is_not_found() => {
                eprintln!("machinen: {}; it expires by itself", chain(&error));
            }
            _ => {}
        }
        let bundle = self.images.is_kept().then(|| self.images.path().to_owned());
        Forked { pid, hostname: self.spec.hostname, bundle }
    }

    async fn make_snapshot(&self) -> Result<Vec<Mount>, ForkError> {
        let Source { container, snapshot, .. } = &self.source;
        let labels = [(LABEL.to_owned(), self.lease.clone())].into();
        let new = self.args.new.as_str();
        let made = self.containerd.prepare(&container.snapshotter, new, &snapshot.parent, labels).await;
        made.map_err(|error| match error.is_already_exists() {
            true => ForkError::SnapshotExists { id: new.to_owned() },
            false => error,
        })
    }

    /// NEW, as containerd knows it.
    fn container(&self, spec: &[u8]) -> Container {
        let source = &self.source.container;
        let kind = source.spec.as_ref().map(|spec| spec.type_url.clone()).unwrap_or_default();
        Container {
            id: self.args.new.clone(),
            labels: source.labels.clone(),
            image: source.image.clone(),
            runtime: source.runtime.clone(),
            spec: Some(Any { type_url: kind, value: spec.to_owned() }),
            snapshotter: source.snapshotter.clone(),
            snapshot_key: self.args.new.clone(),
            ..Default::default()
        }
    }
}

/// None where the writes of one of them do not get to its snapshot.
fn twins(from: &RootfsPlan, to: RootfsPlan) -> Option<Twins> {
    match (from.clone(), to) {
        (RootfsPlan { target: Some(from), .. }, RootfsPlan { target: Some(to), .. }) => {
            Some(Twins::Directories { from, to })
        }
        (RootfsPlan { source: None, writable: from, .. }, RootfsPlan { source: None, writable: to, .. }) => {
            Some(Twins::Disks { from, to })
        }
        _ => None,
    }
}
