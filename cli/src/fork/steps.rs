//! The steps of a fork, and how they are taken back.

use std::{
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use containerd_client::{
    services::v1::{Container, CreateTaskRequest},
    tonic::Code,
    types::Mount,
};
use containerd_shim_protos::shim::oci::{CheckpointOptions, Options};
use machinen::{checkpoint::Manifest, config::Config, error::chain, layer::Twins, pod, pod::rootfs::Plan};
use prost_types::Any;
use tokio::task::spawn_blocking;

use super::{
    ForkArgs,
    containerd::Containerd,
    error::ForkError,
    images::Images,
    signals::Signals,
    source::{self, Source},
    spec::{ForkSpec, Wishes},
};

/// A container that was made.
#[derive(Debug)]
pub(super) struct Forked {
    pub(super) pid: u32,
    pub(super) hostname: Option<String>,
    /// Where the checkpoint is, if it was to be kept.
    pub(super) bundle: Option<PathBuf>,
}

/// What is taken back if a later step fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Made {
    Images,
    Lease,
    Snapshot,
    Container,
    Pause,
    Task,
}

struct Fork<'a> {
    containerd: Containerd,
    args: &'a ForkArgs,
    source: Source,
    spec: ForkSpec,
    images: Images,
    lease: String,
    signals: Signals,
    /// In this order.
    made: Vec<Made>,
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
    // Not the same as one that was killed has left.
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
            fork.take_back().await;
            Err(error)
        }
    }
}

impl Fork<'_> {
    /// Up to a snapshot and images of the same moment. Returns how the snapshot is mounted.
    async fn prepare(&mut self) -> Result<Vec<Mount>, ForkError> {
        let id = self.args.source.as_str();
        let new = self.args.new.as_str();
        self.containerd.take_lease(&self.lease).await?;
        self.made.push(Made::Lease);
        self.signals.check()?;
        let rootfs = self.make_snapshot().await?;
        self.made.push(Made::Snapshot);
        self.signals.check()?;
        let twins = twins(&self.source.rootfs, source::plan(new, &rootfs)?)
            .ok_or_else(|| ForkError::NoSnapshot { id: id.to_owned() })?;
        self.containerd.create_container(self.container(&self.spec.restoring)).await?;
        self.made.push(Made::Container);
        self.signals.check()?;
        let pauses = !self.source.is_paused() && twins.is_live();
        if pauses {
            self.containerd.pause(id).await?;
            self.made.push(Made::Pause);
            self.signals.check()?;
        }
        eprintln!("checkpointing {id}");
        self.containerd.checkpoint(id, &self.checkpoint_options()).await?;
        self.signals.check()?;
        eprintln!("copying what {id} has written");
        let then = Manifest::read(self.images.path())?.layer;
        let copied = spawn_blocking(move || twins.copy(then.as_deref())).await;
        let copied = copied.map_err(ForkError::Worker)?;
        copied.map_err(|source| ForkError::Layer { id: id.to_owned(), source })?;
        if pauses {
            self.containerd.resume(id).await?;
            self.made.retain(|made| *made != Made::Pause);
        }
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
        self.containerd.create_task(request, &options).await?;
        self.made.push(Made::Task);
        self.signals.check()?;
        // The next task of it is none that is restored from this checkpoint.
        self.containerd.update_spec(self.container(&self.spec.lasting)).await?;
        // The VM has a disk with all of the images.
        if !self.images.is_kept() {
            self.images.remove()?;
        }
        self.signals.check()?;
        self.containerd.start(new).await
    }

    /// NEW runs: no failure is one of it any more.
    async fn finish(mut self, pid: u32) -> Forked {
        if let Err(error) = self.containerd.give_back_lease(&self.lease).await {
            eprintln!("machinen: {}; it expires by itself", chain(&error));
        }
        let bundle = self.images.is_kept().then(|| self.images.path().to_owned());
        Forked { pid, hostname: self.spec.hostname, bundle }
    }

    async fn take_back(&mut self) {
        let (source, new) = (&self.args.source, &self.args.new);
        while let Some(made) = self.made.pop() {
            let taken = match made {
                Made::Task => self.containerd.end_task(new).await,
                Made::Pause => self.containerd.resume(source).await,
                Made::Container => self.containerd.delete_container(new).await,
                Made::Snapshot => {
                    self.containerd.remove_snapshot(&self.source.container.snapshotter, new).await
                }
                Made::Lease => self.containerd.give_back_lease(&self.lease).await,
                Made::Images => self.images.remove(),
            };
            if let Err(error) = taken {
                eprintln!("machinen: taking back a fork that failed: {}", chain(&error));
            }
        }
    }

    async fn make_snapshot(&self) -> Result<Vec<Mount>, ForkError> {
        let Source { container, snapshot, .. } = &self.source;
        let made = self.containerd.prepare(&container.snapshotter, &self.args.new, &snapshot.parent).await;
        made.map_err(|error| match error {
            ForkError::Call { status, .. } if status.code() == Code::AlreadyExists => {
                ForkError::Exists { id: format!("a snapshot {}", self.args.new) }
            }
            error => error,
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

    /// The fork has a copy of every file, so locks on them are no hindrance; nor are connections, whatever becomes of them.
    fn checkpoint_options(&self) -> CheckpointOptions {
        CheckpointOptions {
            open_tcp: true,
            file_locks: true,
            image_path: self.images.path().display().to_string(),
            ..Default::default()
        }
    }
}

/// None where the writes of one of them do not get to its snapshot.
fn twins(from: &Plan, to: Plan) -> Option<Twins> {
    match (from.clone(), to) {
        (Plan { target: Some(from), .. }, Plan { target: Some(to), .. }) => {
            Some(Twins::Directories { from, to })
        }
        (Plan { source: None, writable: from, .. }, Plan { source: None, writable: to, .. }) => {
            Some(Twins::Disks { from, to })
        }
        _ => None,
    }
}
