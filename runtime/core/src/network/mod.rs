//! The network of a pod: the guest has what the interface of the pod's network namespace has.
//!
//! ```text
//!   host's network ── veth ── eth0 ──(tc: every packet, both ways)── tap ── QEMU ── guest's eth0
//!                             └ namespace that CNI, Docker or the caller has made ┘   same MAC, addresses, routes
//! ```
//! The namespace's interface keeps its addresses, so that tools that look into the namespace agree with the container.
//! Packets that arrive there are redirected before the host's own network code sees them, unless it is to see them
//! ([`routed`]).
//!
//! A client may set the namespace up after the container was created, or change it while the container runs. So the
//! namespace is read when the container is created, again when it is started, and whenever the kernel reports a change.

mod datagrams;
mod egress;
mod error;
mod filter;
#[cfg(fuzzing)]
pub mod fuzzing;
pub(crate) mod localhost;
mod nameservers;
mod namespace;
mod pasta;
mod routed;
mod settings;
mod wiring;

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use machinen_base::{
    error::{ErrorKind, HasKind as _, chain},
    netns::NetnsId,
    sys,
};
use machinen_netlink::{NetlinkSocket, to_message};
use machinen_protocol::api::{ConfigureNetworkRequest, NetworkInterface};
use machinen_vm::{
    BoxedStream, Vm,
    agent::{self, AgentError},
};
use rustix::fs::fstat;
use tokio::{
    sync::{Notify, Semaphore, watch},
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep_until},
};

use egress::Egress;
pub use error::NetworkError;
use localhost::{Dial, OwnAddresses};
pub use machinen_netlink::{InterfaceCounters, Traffic};
use nameservers::ResolvConf;
pub(crate) use namespace::PacketPath;
use namespace::PodNamespace;
pub use namespace::{disconnect_abandoned, same_namespace};
pub use pasta::NAMESERVER;
pub(crate) use pasta::OutsideNetwork;
use pasta::RunningPasta;
use settings::{Reread, Settings};

/// The least time between two streams for the same purpose: a guest may close them at any moment.
const REOPENED_AFTER: Duration = Duration::from_secs(1);
/// When another attempt follows one that has failed.
const TRIED_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// The connection of a VM with a network namespace. It lasts as long as the VM.
#[derive(Debug)]
pub(crate) struct PodNetwork {
    id: NetnsId,
    outside: Option<OutsideNetwork>,
    path: PacketPath,
    guest: Arc<GuestNetwork>,
    follower: tokio::sync::Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct GuestNetwork {
    vm: Vm,
    namespace: Arc<Mutex<PodNamespace>>,
    /// The file of each container that has one.
    resolv_confs: Mutex<Vec<ResolvConf>>,
    /// Acquired while a stream is open that the agent has not claimed.
    unclaimed: Arc<Semaphore>,
    /// The lock keeps the order of changes.
    given: tokio::sync::Mutex<Given>,
    /// The number of the last stream for nameservers that has ended.
    ended: watch::Sender<u64>,
    /// A container of the pod has been started.
    started: Notify,
}

/// What the guest was given last.
#[derive(Debug, Default)]
struct Given {
    interfaces: Vec<NetworkInterface>,
    settings: Settings,
    nameservers: Vec<Ipv4Addr>,
    /// The number of the stream for the nameservers.
    stream: u64,
}

impl PodNetwork {
    /// Connects the VM with a namespace, and the namespace with the `outside`, if there is one to be made. Follows the
    /// namespace until the VM has ended. Returns None if the namespace is the host's own, whose packets are not the
    /// container's.
    ///
    /// # Errors
    /// The kernel refuses, or there is no connection with the outside.
    pub(crate) async fn connect(
        vm: &Vm,
        namespace: OwnedFd,
        outside: Option<OutsideNetwork>,
        path: PacketPath,
        unclaimed: Arc<Semaphore>,
    ) -> Result<Option<Arc<Self>>, NetworkError> {
        let taps = vm.taps().map(|taps| Ok((taps.namespace.try_clone()?, taps.count())));
        let taps = taps.transpose().map_err(NetworkError::Enter)?;
        let connected = spawn_blocking(move || PodNamespace::connect(namespace, taps, path)).await;
        let Some((namespace, changes)) = connected.map_err(NetworkError::Worker)?? else { return Ok(None) };
        let id = namespace.id;
        let pasta = match &outside {
            Some(outside) => Some(outside.connect(&namespace.descriptor()?).await?),
            None => None,
        };
        let guest = Arc::new(GuestNetwork {
            vm: vm.clone(),
            namespace: Arc::new(Mutex::new(namespace)),
            resolv_confs: Mutex::default(),
            unclaimed,
            given: tokio::sync::Mutex::default(),
            ended: watch::Sender::default(),
            started: Notify::new(),
        });
        let follower = tokio::spawn(follow(Arc::clone(&guest), vm.clone(), changes, pasta));
        Ok(Some(Arc::new(Self {
            id,
            outside,
            path,
            guest,
            follower: tokio::sync::Mutex::new(Some(follower)),
        })))
    }

    /// The namespace that the VM is connected with.
    pub(crate) fn id(&self) -> NetnsId {
        self.id
    }

    /// The connection with the outside that was made for the namespace.
    pub(crate) fn outside(&self) -> Option<&OutsideNetwork> {
        self.outside.as_ref()
    }

    /// How packets pass between the namespace and the VM.
    pub(crate) fn path(&self) -> PacketPath {
        self.path
    }

    /// Adds the file that a container has as its /etc/resolv.conf: the container reaches the nameservers of the
    /// namespace's loopback interface that the file names.
    pub(crate) fn add_resolv_conf(&self, file: ResolvConf) {
        let identity = |file: &ResolvConf| fstat(file).map(|stat| (stat.st_dev, stat.st_ino)).ok();
        let mut files = self.guest.resolv_confs.lock().unwrap_or_else(PoisonError::into_inner);
        // Containers that follow each other in a pod have the same file.
        if !files.iter().any(|other| identity(other) == identity(&file)) {
            files.push(file);
        }
    }

    /// Reads the namespace and gives the guest what has changed.
    ///
    /// # Errors
    /// The namespace has more interfaces than the VM, or a kernel or the agent refuses.
    pub(crate) async fn update(&self, agent: &agent::Client) -> Result<(), NetworkError> {
        self.guest.update(agent, false, Reread::Settings).await
    }

    /// Reads the namespace as [`PodNetwork::update`] does, and from now on lets packets of the guest leave. The guest
    /// announces its addresses if it had them before.
    ///
    /// # Errors
    /// Those of [`PodNetwork::update`].
    pub(crate) async fn open(&self, agent: &agent::Client) -> Result<(), NetworkError> {
        let open = |namespace: &mut PodNamespace| match namespace.egress {
            Egress::Open => Ok(true),
            Egress::Closed | Egress::Held => namespace.set_egress(Egress::Open).map(|()| false),
        };
        let was_open = self.guest.in_namespace(open).await?;
        self.guest.update(agent, !was_open, Reread::Settings).await
    }

    /// To be called when a container has been started: processes of the namespace reach the guest's localhost soon.
    pub(crate) fn container_started(&self) {
        self.guest.started.notify_one();
    }

    /// Lets no packet of the guest leave any more, because a checkpoint is to have its connections.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) async fn hold(&self) -> Result<(), NetworkError> {
        self.guest.in_namespace(|namespace| namespace.set_egress(Egress::Held)).await
    }

    /// Undoes [`PodNetwork::hold`]: the guest keeps its connections. Does nothing otherwise.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) async fn release(&self) -> Result<(), NetworkError> {
        let open = |namespace: &mut PodNamespace| match namespace.egress {
            Egress::Held => namespace.set_egress(Egress::Open),
            Egress::Closed | Egress::Open => Ok(()),
        };
        self.guest.in_namespace(open).await
    }

    /// Gives the guest of another VM, which is connected with nothing, what this guest has.
    ///
    /// # Errors
    /// The agent refuses.
    pub(crate) async fn copy_to(&self, agent: &agent::Client) -> Result<(), NetworkError> {
        let given = self.guest.given.lock().await;
        let (interfaces, settings) = (given.interfaces.clone(), given.settings.clone().into_iter().collect());
        drop(given);
        let request = ConfigureNetworkRequest { interfaces, settings, ..Default::default() };
        agent.configure_network(request).await.map_err(NetworkError::Guest)
    }

    /// The guest's interfaces with their counts, as the guest sees them.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) async fn counters(&self) -> Result<Vec<(String, InterfaceCounters)>, NetworkError> {
        self.guest.in_namespace(PodNamespace::counters).await
    }

    /// Returns when nothing of the connection is left in the namespace. The VM must have ended.
    pub(crate) async fn ended(&self) {
        if let Some(follower) = self.follower.lock().await.take()
            && let Err(error) = follower.await
        {
            tracing::error!("the end of a VM's network was not handled: {error}");
        }
    }
}

impl GuestNetwork {
    async fn update(&self, agent: &agent::Client, announce: bool, what: Reread) -> Result<(), NetworkError> {
        let mut given = self.given.lock().await;
        let (connected, settings) = self.in_namespace(move |namespace| namespace.reread(what)).await?;
        let wanted: Vec<_> =
            connected.iter().map(|(device, interface)| to_message(*device, interface)).collect();
        let announce = announce && !given.interfaces.is_empty();
        if given.interfaces != wanted || given.settings != settings || announce {
            // A container's own configuration may have changed the others since.
            let is_new = |(name, value): &(&String, &String)| given.settings.get(*name) != Some(*value);
            let new = settings.iter().filter(is_new).map(|(name, value)| (name.clone(), value.clone()));
            let request = ConfigureNetworkRequest {
                interfaces: wanted.clone(),
                settings: new.collect(),
                announce,
                ..Default::default()
            };
            agent.configure_network(request).await.map_err(NetworkError::Guest)?;
            (given.interfaces, given.settings) = (wanted, settings);
        }
        // Without an interface no nameserver of the namespace reaches any other.
        let nameservers = if !connected.is_empty() { self.nameservers().await? } else { Vec::new() };
        if given.nameservers != nameservers {
            given.stream += 1;
            self.forward(agent, &nameservers, given.stream).await?;
            given.nameservers = nameservers;
        }
        Ok(())
    }

    /// Opens the stream for nameservers again, if the one with this number is still the last one.
    async fn reopen(&self, agent: &agent::Client, ended: u64) -> Result<(), NetworkError> {
        {
            let mut given = self.given.lock().await;
            if given.stream == ended {
                given.nameservers.clear();
            }
        }
        self.update(agent, false, Reread::Interfaces).await
    }

    async fn nameservers(&self) -> Result<Vec<Ipv4Addr>, NetworkError> {
        let files = self.resolv_confs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if files.is_empty() {
            return Ok(Vec::new());
        }
        spawn_blocking(move || nameservers::named_in(&files)).await.map_err(NetworkError::Worker)
    }

    /// Has the guest send queries to these nameservers here, and no others. The stream for them gets this number.
    async fn forward(
        &self,
        agent: &agent::Client,
        nameservers: &[Ipv4Addr],
        number: u64,
    ) -> Result<(), NetworkError> {
        if nameservers.is_empty() {
            return agent.forward_nameservers(&[], 0).await.map_err(NetworkError::Guest);
        }
        let namespace = self.in_namespace(|namespace| namespace.descriptor()).await?;
        let (send, nameservers) = (self.ended.clone(), nameservers.to_vec());
        let stream =
            self.open_stream(async |token| agent.forward_nameservers(&nameservers, token).await).await?;
        // The guest closes the stream with the next such call, or its own end. If it ends before, the number of the last
        // stream is still this one.
        let reopened = Instant::now() + REOPENED_AFTER;
        tokio::spawn(async move {
            nameservers::answer(stream, Arc::new(namespace), nameservers).await;
            sleep_until(reopened).await;
            send.send_if_modified(|last| std::mem::replace(last, number.max(*last)) < number);
        });
        Ok(())
    }

    /// Opens a stream that a call of the agent claims by its token.
    async fn open_stream(
        &self,
        claim: impl AsyncFnOnce(u64) -> Result<(), AgentError>,
    ) -> Result<BoxedStream, NetworkError> {
        let _unclaimed = self.unclaimed.acquire().await.expect("never closed");
        let (token, stream) =
            self.vm.open_stream().await.map_err(|error| NetworkError::Vm(Box::new(error)))?;
        claim(token).await.map_err(NetworkError::Guest)?;
        Ok(stream)
    }

    /// Lets the namespace's localhost lead to the guest's, until the guest does not report its ports any more.
    async fn serve_localhost(self: &Arc<Self>, agent: &agent::Client) -> Result<io::Error, NetworkError> {
        let namespace = self.in_namespace(|namespace| namespace.descriptor()).await?;
        let reports = self.open_stream(async |token| agent.watch_listeners(token).await).await?;
        let (guest, agent) = (Arc::clone(self), agent.clone());
        let dial: Dial = Arc::new(move |port| {
            let (guest, agent) = (Arc::clone(&guest), agent.clone());
            Box::pin(async move {
                let opened = guest.open_stream(async |token| agent.dial_localhost(port, token).await).await;
                opened.map_err(io::Error::other)
            })
        });
        let guest = Arc::clone(self);
        let own: OwnAddresses = Arc::new(move || {
            let guest = Arc::clone(&guest);
            Box::pin(async move { guest.redirected_addresses().await })
        });
        Ok(localhost::serve(reports, Arc::new(namespace), own, dial).await)
    }

    /// The addresses of the namespace that are the guest's, and at which only processes of the namespace reach a socket of
    /// the namespace. In the routed mode the namespace itself passes their packets on to the guest.
    async fn redirected_addresses(&self) -> Vec<IpAddr> {
        let path = self.namespace.lock().unwrap_or_else(PoisonError::into_inner).path;
        if path == PacketPath::Routed {
            return Vec::new();
        }
        let given = self.given.lock().await;
        let addresses = given.interfaces.iter().flat_map(|interface| &interface.addresses);
        addresses.filter_map(|address| ip_address(&address.address)).collect()
    }

    async fn in_namespace<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut PodNamespace) -> Result<T, NetworkError> + Send + 'static,
    ) -> Result<T, NetworkError> {
        let namespace = Arc::clone(&self.namespace);
        let work = move || work(&mut namespace.lock().unwrap_or_else(PoisonError::into_inner));
        spawn_blocking(work).await.map_err(NetworkError::Worker)?
    }
}

/// The address of four or sixteen bytes.
fn ip_address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// Gives the guest each change of the namespace until the VM has ended, and then disconnects the namespace.
async fn follow(guest: Arc<GuestNetwork>, vm: Vm, changes: NetlinkSocket, mut pasta: Option<RunningPasta>) {
    let followed = async {
        let error = follow_changes(&guest, &vm, changes).await;
        if !is_end_of_agent(&error) {
            tracing::error!("changes of the network do not reach the guest any more: {}", chain(&error));
        }
    };
    let outside = async {
        if let Some(pasta) = &mut pasta {
            let printed = pasta.ended().await;
            tracing::error!(
                "the container is not connected with the outside any more, because pasta has ended: {printed}"
            );
        }
    };
    let all = async { tokio::join!(followed, keep_localhost(&guest, &vm), outside) };
    tokio::select! {
        biased;
        _ = vm.exited() => {}
        _ = all => {
            vm.exited().await;
        }
    }
    if let Some(pasta) = pasta {
        pasta.end().await;
    }
    if let Err(error) = guest.in_namespace(PodNamespace::disconnect).await {
        tracing::warn!("a VM's network is not completely disconnected: {}", chain(&error));
    }
}

/// Lets the namespace's localhost lead to the guest's from the first start of a container until the end of the VM.
async fn keep_localhost(guest: &Arc<GuestNetwork>, vm: &Vm) {
    guest.started.notified().await;
    // Without an agent the start has failed.
    let Ok(agent) = vm.agent().await else { return };
    loop {
        let again = Instant::now() + REOPENED_AFTER;
        match guest.serve_localhost(&agent).await {
            Ok(error) => tracing::debug!("the guest does not report its ports any more: {error}"),
            Err(error) if is_end_of_agent(&error) => return,
            Err(error) if error.kind() == ErrorKind::FailedPrecondition => {
                let error = chain(&error);
                tracing::warn!(
                    "localhost of the network namespace does not lead into the container: {error}"
                );
                return;
            }
            Err(error) => {
                tracing::warn!("localhost does not lead into the container: {}", chain(&error));
                sleep_until(again + TRIED_AGAIN_AFTER).await;
            }
        }
        sleep_until(again).await;
    }
}

/// The VM is ending.
fn is_end_of_agent(error: &NetworkError) -> bool {
    matches!(error, NetworkError::Guest(AgentError::Closed))
}

async fn follow_changes(guest: &GuestNetwork, vm: &Vm, changes: NetlinkSocket) -> NetworkError {
    let readable = match changes.as_fd().try_clone_to_owned().and_then(sys::async_fd) {
        Ok(readable) => readable,
        Err(error) => return NetworkError::Watch(error),
    };
    let agent = match vm.agent().await {
        Ok(agent) => agent,
        Err(error) => return NetworkError::Vm(Box::new(error)),
    };
    let mut ended = guest.ended.subscribe();
    let mut again = None;
    loop {
        // The namespace may be in the middle of a change that does not fit. The next event brings another attempt.
        let updated = tokio::select! {
            ready = readable.readable() => {
                let drained = ready.and_then(|mut ready| {
                    ready.clear_ready();
                    changes.drain()
                });
                if let Err(error) = drained {
                    return NetworkError::Watch(error);
                }
                guest.update(&agent, false, Reread::Interfaces).await
            }
            changed = ended.changed() => {
                // The sender is the guest's own.
                drop(changed);
                again = Some(Instant::now());
                continue;
            }
            () = sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => {
                let number = *ended.borrow_and_update();
                let reopened = guest.reopen(&agent, number).await;
                again = reopened.is_err().then(|| Instant::now() + TRIED_AGAIN_AFTER);
                reopened
            }
        };
        if let Err(error) = updated {
            if is_end_of_agent(&error) {
                return error;
            }
            tracing::warn!("a change of the network does not reach the guest: {}", chain(&error));
        }
    }
}

#[cfg(test)]
mod tests;
