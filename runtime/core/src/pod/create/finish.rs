//! The third phase of a container's creation: attached. Its step creates the container in the guest.

use std::sync::Arc;

use machinen_base::error::chain;
use machinen_protocol::{
    api::{CreateContainerRequest, InjectedFile, JoinedNamespace, Stdio},
    process::ProcessRef,
};
use machinen_storage::container_disk::ContainerDiskPlan;
use machinen_vm::{DiskAddress, Vm, agent};
use protobuf::MessageField;

use super::{
    disks::{self, ContainerDisks},
    undo::{CreateJob, Held},
};
use crate::{
    network::PodNetwork,
    pod::{
        Container, PodError,
        container::{ContainerGuest, ContainerStorage},
        cover::{COVERS_DIR, Cover},
        layer::WritableLayer,
        restore::RestoreDisk,
        sandbox::VmOrigin,
        stdio::HostStdio,
        streams::{self, Outputs, ProcessStreams},
    },
    shares::{ContainerShares, ShareError, ShareGuest},
    spec::{self, volumes},
    view::ViewGuest,
};

/// The VM has the container's disks, and its agent answers.
#[derive(Debug)]
pub(super) struct Attached<'a> {
    pub(super) job: CreateJob<'a>,
    pub(super) stdio: HostStdio,
    pub(super) injected: Vec<InjectedFile>,
    pub(super) held: Held,
    pub(super) addresses: ContainerDisks<DiskAddress>,
    pub(super) agent: agent::Client,
    /// The connection with the container's network, if it has one.
    pub(super) network: Option<Arc<PodNetwork>>,
}

/// The container's init waits in the guest.
pub(super) struct Created {
    pub(super) container: Arc<Container>,
    pub(super) origin: VmOrigin,
    pub(super) watch: ContainerWatch,
}

/// What the watcher of a container needs.
pub(super) struct ContainerWatch {
    pub(super) agent: agent::Client,
    pub(super) vm: Vm,
    pub(super) outputs: Outputs,
}

impl Attached<'_> {
    /// Connects the streams and creates the container in the guest.
    ///
    /// # Errors
    /// The guest refuses the container, the host refuses a limit, the anchor cannot enter its root, or a hook fails.
    /// Nothing is left then.
    pub(super) async fn create(self) -> Result<Created, PodError> {
        let Self { job, stdio, injected, mut held, addresses, agent, network } = self;
        // Neither waits for the guest longer because of the other.
        let (shares, configured) = tokio::join!(
            job.phases.time("volumes", job.share(&held, &agent)),
            job.configure_network(network.as_deref(), &agent),
        );
        match shares {
            Ok(shares) => held.shares = shares,
            Err(error) => {
                job.undo(held, None).await;
                return Err(error.into());
            }
        }
        let created = async {
            configured?;
            job.create_in_guest(&held, &agent, &addresses, stdio, injected).await
        };
        let (streams, entered) = match created.await {
            Ok(created) => created,
            Err(error) => {
                job.undo(held, None).await;
                return Err(error);
            }
        };
        let completed = async {
            entered?;
            job.complete_on_host(&mut held, &agent).await
        };
        if let Err(error) = completed.await {
            job.undo(held, Some(&agent)).await;
            return Err(error);
        }
        Ok(job.finish(held, agent, network, addresses.checkpoint, streams))
    }
}

impl CreateJob<'_> {
    /// Makes the volumes visible in the guest.
    async fn share(&self, held: &Held, agent: &agent::Client) -> Result<ContainerShares, ShareError> {
        let unclaimed = &self.pod.shared.starting;
        let guest = ShareGuest { vm: &held.vm.vm, agent, unclaimed };
        self.pod.shared.shares.add(&guest, &self.plan.volumes).await
    }

    /// Gives the guest the container's network. A process that is restored has it when it continues, and nothing is sent
    /// before.
    async fn configure_network(
        &self,
        network: Option<&PodNetwork>,
        agent: &agent::Client,
    ) -> Result<(), PodError> {
        let Some(network) = network else { return Ok(()) };
        let configured = async {
            match self.plan.restore {
                Some(_) => network.update(agent).await,
                None => network.open(agent).await,
            }
        };
        self.phases.time("network", configured).await.map_err(PodError::Network)
    }

    /// Creates the container in the guest. This process enters the pod's cgroup meanwhile, when it makes no processes and waits
    /// for the guest; whether that has succeeded is in the result.
    async fn create_in_guest(
        &self,
        held: &Held,
        agent: &agent::Client,
        addresses: &ContainerDisks<DiskAddress>,
        stdio: HostStdio,
        injected: Vec<InjectedFile>,
    ) -> Result<(ProcessStreams, Result<(), PodError>), PodError> {
        let (vm, phases) = (&held.vm.vm, self.phases);
        let _starting = self.pod.shared.starting.acquire().await.expect("never closed");
        let (stdio, streams) = phases.time("streams", streams::connect(vm, stdio)).await?;
        let request = self.guest_request(held, addresses, stdio, injected)?;
        let created = phases.time("guest-create", agent.create_container(request));
        let (created, entered) = tokio::join!(created, self.enter_cgroup(held.vm.origin.is_clone()));
        let created = created.map_err(|source| match (&self.plan.restore, &held.disks.open.checkpoint) {
            (Some(restore), Some(disk)) => restore.refused(disk, source),
            _ => PodError::guest("create", &self.request.id, source),
        })?;
        phases.record_guest(&created);
        vm.record_working_set().await;
        Ok((streams, entered))
    }

    /// Does what is left to do on the host once the container exists in the guest. Nothing of the user's runs
    /// before.
    async fn complete_on_host(&self, held: &mut Held, agent: &agent::Client) -> Result<(), PodError> {
        let limits = self.pod.limit_on_host(&self.request.id, &self.plan, &held.vm);
        self.phases.time("limits", limits).await?;
        // The anchor has long entered its root by now; its pid must not be passed to clients or hooks before.
        self.phases.time("anchor", held.anchor.wait_for_root()).await?;
        held.anchor.attach(self.view_guest(held, agent, false));
        let hooks = self.pod.run_create_hooks(&self.plan.hooks, held.anchor.pid());
        self.phases.time("hooks", hooks).await?;
        self.cover_mounted_root(held, agent).await;
        Ok(())
    }

    fn view_guest(&self, held: &Held, agent: &agent::Client, without_mounts: bool) -> ViewGuest {
        ViewGuest {
            vm: held.vm.vm.clone(),
            agent: agent.clone(),
            container: self.request.id.to_string(),
            unclaimed: Arc::clone(&self.pod.shared.starting),
            without_mounts,
        }
    }

    /// A caller that has mounted the root file system itself finds the container's files there. A failure is logged: then it
    /// finds them as they were before the start.
    async fn cover_mounted_root(&self, held: &mut Held, agent: &agent::Client) {
        let ContainerDiskPlan::Upper { mount: Some(mount), .. } = &self.plan.rootfs.disk else { return };
        let id = self.request.id.as_str();
        let record = self.pod.shared.state_dir.join(COVERS_DIR).join(id);
        match Cover::make(self.view_guest(held, agent, true), mount.clone(), record).await {
            Ok(cover) => held.anchor.keep(cover),
            Err(error) => {
                tracing::warn!(
                    id,
                    "the mounted root file system does not show the container's files: {}",
                    chain(&error)
                );
            }
        }
    }

    fn guest_request(
        &self,
        held: &Held,
        addresses: &ContainerDisks<DiskAddress>,
        stdio: Stdio,
        injected: Vec<InjectedFile>,
    ) -> Result<CreateContainerRequest, PodError> {
        let vcpus = held.vm.vm.spec().vcpus;
        let mut spec = self.plan.guest.for_vm(vcpus);
        self.plan.namespaces.add_new(&mut spec);
        volumes::set_sources(&mut spec, &self.plan.guest.volumes, held.shares.entries());
        let mounted = self.plan.host_disks.iter();
        let mounted =
            mounted.flat_map(|disk| disk.mounts.iter().map(|&mount| (mount, disk.major, disk.minor)));
        spec::disks::set_sources(&mut spec, mounted);
        let mut request =
            disks::request(&self.request.id, &spec, addresses, self.plan.rootfs.mapped, stdio, injected)?;
        if let Some(restore) = &self.plan.restore {
            let (config, shared) = (&self.plan.config.restore, held.shares.volumes());
            let from = restore.request(addresses.checkpoint, config, shared, &spec, vcpus);
            request.checkpoint = MessageField::some(from);
        }
        let joined = self.plan.namespaces.joined().map(|(kind, container)| JoinedNamespace {
            type_: kind.to_string(),
            container_id: container.to_string(),
            ..Default::default()
        });
        request.namespaces = joined.collect();
        request.hook_state = self.plan.hooks.state_for_guest()?;
        Ok(request)
    }

    /// Records the container, which owns what was held from now on.
    fn finish(
        self,
        held: Held,
        agent: agent::Client,
        network: Option<Arc<PodNetwork>>,
        checkpoint: Option<DiskAddress>,
        mut streams: ProcessStreams,
    ) -> Created {
        let Self { request: create, plan, .. } = self;
        let Held { vm: acquired, disks, anchor, attachments, shares } = held;
        let (vm, origin) = (acquired.vm.clone(), acquired.origin);
        let checkpoint = checkpoint.zip(disks.open.checkpoint).map(|(address, disk)| {
            attachments.hand_over(address);
            RestoreDisk { address, disk }
        });
        let storage = ContainerStorage {
            layer: WritableLayer::new(disks.writable.keep(disks.base), &plan.config),
            attachments,
            shares,
            base: disks.base.filter(|_| plan.rootfs.is_overlaid()),
            checkpoint,
            checkpoint_config: plan.config.checkpoint,
            rootfs: create.rootfs,
            copies: disks.copies,
            host_disk: plan.host_disks.first().map(|disk| disk.path.clone()),
        };
        let namespaces = plan.namespaces.identities(anchor.pid());
        let stdin = streams.take_input(&agent, &create.id, ProcessRef::Init);
        let container = Container::new(
            create.id,
            create.bundle,
            create.stdio.names(),
            anchor,
            ContainerGuest { vm: vm.clone(), network, namespaces },
            storage,
            plan.hooks,
        );
        container.init.connect_stdin(stdin);
        let watch = ContainerWatch { agent, vm, outputs: streams.outputs };
        Created { container: Arc::new(container), origin, watch }
    }
}
