//! The process that owns a pod's VM, and serves the Task API in the pod's directory.
//!
//! The verb that creates the pod's first container starts it and goes away. It ends when the last container was deleted, or
//! when that verb has ended without having created one.

use std::{
    fs,
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt as _, net::UnixListener},
    },
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use containerd_shim_protos::ttrpc::r#async::{Server, transport::Listener};
use machinen::{
    config::{Config, MetricsFormat},
    error::chain,
    fs::FileError,
    owner,
    pod::{ContainerId, Lifetime, Pod, PodSettings},
    pool::{self, Member, Pool, WarmVm},
    process::foreign_end,
    reexec::EntryPoint,
    sys,
};
use serde::{Deserialize, Serialize};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, mpsc},
    time::timeout,
};

use super::{
    error::OciError,
    global::LogArgs,
    pod::{PodDir, SOCKET},
    state::HostProcess,
};

/// The first argument of a monitor. Its parameters follow.
pub(crate) const NAME: &str = "container-monitor";
/// The owner of a pod's VM.
pub(crate) const ENTRY_POINT: EntryPoint = EntryPoint { name: NAME, main };

/// A monitor that waits in the warm pool, with a VM that is ready.
pub(crate) const POOL_ENTRY_POINT: EntryPoint =
    EntryPoint { name: pool::MEMBER, main: |args| report(wait_in_pool(&args)) };

const LISTENER_FD: i32 = 3;

/// The namespace of containerd that a logging program would get. Streams of the command line lead to none.
const NAMESPACE: &str = "oci";

/// The cgroup on the host with the groups of pods whose configuration names none. runc makes a group with the container's id.
const CGROUPS: &str = "/machinen";

/// How long answers in flight may take to arrive at the end.
const ANSWERS_GRACE: Duration = Duration::from_secs(2);

#[derive(Debug, Serialize, Deserialize)]
struct MonitorParams {
    id: String,
    pod: PodDir,
    log: LogArgs,
    /// The verb that creates the container.
    creator: HostProcess,
}

/// Starts the monitor of a pod, whose first container is to be created as `id`, or finds one in the warm
/// pool. It ends if this process ends before the container exists.
///
/// # Errors
/// The socket cannot be made, or the process cannot be started.
pub(super) fn start(id: &ContainerId, pod: &PodDir, log: &LogArgs) -> Result<HostProcess, OciError> {
    let failed = |source| OciError::Spawn { purpose: "owns the container's VM", source };
    let socket = pod.path.join(SOCKET);
    let listener = pod.with_socket(|path| {
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    });
    let listener = OwnedFd::from(listener.map_err(FileError::at("listen on", socket))?);
    let (log, creator) = (log.absolute()?, HostProcess::of(std::process::id())?);
    let params = MonitorParams { id: id.to_string(), pod: pod.clone(), log, creator };
    let params = serde_json::to_string(&params).map_err(OciError::Encode)?;
    if let Some(pid) = taken_from_pool(&params, &listener)? {
        return HostProcess::of(pid);
    }
    let pid = ENTRY_POINT.spawn().args([params]).dir("/").fd(listener, LISTENER_FD).detach();
    HostProcess::of(pid.map_err(failed)?)
}

/// Returns the pid of the member of the warm pool that has accepted the work.
fn taken_from_pool(params: &str, listener: &OwnedFd) -> Result<Option<u32>, OciError> {
    match Pool::of(&monitor_config()?) {
        Ok(pool) => Ok(pool.and_then(|pool| pool.hand_over(params.as_bytes(), listener))),
        Err(error) => {
            tracing::warn!("the warm pool is not used: {}", chain(&error));
            Ok(None)
        }
    }
}

/// The configuration of all monitors.
fn monitor_config() -> Result<Config, OciError> {
    let mut config = Config::load()?;
    // The verbs decode one format only.
    config.task.metrics = MetricsFormat::Cgroup2;
    Ok(config)
}

fn main(args: Vec<String>) -> ExitCode {
    report(args.first().ok_or(OciError::NoParams).and_then(|params| run(params)))
}

fn report(result: Result<(), OciError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            // A member of the warm pool has no log yet: its errors are in a file of the pool.
            eprintln!("machinen: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(params: &str) -> Result<(), OciError> {
    // This comes before other descriptors are opened.
    let listener = sys::inherit::take(LISTENER_FD).map_err(OciError::io("find the inherited listener"))?;
    let params = serde_json::from_str(params).map_err(OciError::Params)?;
    let config = monitor_config()?;
    in_event_loop(serve(params, config, listener.into(), None))
}

/// Waits in the slot whose number is the first argument, and becomes the monitor of the pod that takes it.
fn wait_in_pool(args: &[String]) -> Result<(), OciError> {
    // This comes before other descriptors are opened.
    let slot = sys::inherit::take(pool::SLOT_FD).map_err(OciError::io("find the slot of the warm pool"))?;
    let number = args.first().and_then(|number| number.parse().ok()).ok_or(OciError::NoParams)?;
    let request = serde_json::from_reader(std::io::stdin().lock()).map_err(OciError::Params)?;
    let config = monitor_config()?;
    in_event_loop(async {
        let Some(member) = Member::join(&config, number, slot, request).await? else { return Ok(()) };
        let Some(taken) = member.taken().await? else { return Ok(()) };
        let params = serde_json::from_slice(&taken.message).map_err(OciError::Params)?;
        let (listener, warm_vm) = taken.accept().await?;
        serve(params, config, listener, Some(warm_vm)).await
    })
}

fn in_event_loop(work: impl Future<Output = Result<(), OciError>>) -> Result<(), OciError> {
    // Children die with the thread that started them, so there is one thread.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(OciError::io("start the event loop"))?;
    let result = runtime.block_on(work);
    // Image conversions that are no longer needed may still run in threads. They can be stopped at any point.
    runtime.shutdown_background();
    result
}

async fn serve(
    params: MonitorParams,
    config: Config,
    listener: UnixListener,
    warm_vm: Option<WarmVm>,
) -> Result<(), OciError> {
    params.log.follow(&config)?;
    let (events, mut happened) = mpsc::unbounded_channel();
    let settings = PodSettings {
        config,
        namespace: NAMESPACE.to_owned(),
        name: params.id.clone(),
        state_dir: params.pod.path.clone(),
        lifetime: Lifetime::Containers,
        // An ordinary user has no cgroups but those that are delegated to it.
        default_cgroup: owner::user().is_none().then(|| Path::new(CGROUPS).join(&params.id)),
        containerd: None,
    };
    let pod = Pod::new(settings, warm_vm, events);
    // The verbs ask for what they want to know, so the events are for the log only.
    tokio::spawn(async move {
        while let Some(event) = happened.recv().await {
            tracing::debug!(?event, "container event");
        }
    });
    let ended = Arc::new(Notify::new());
    let services = machinen_task::services(pod.clone(), Arc::clone(&ended));
    let listener =
        Listener::try_from(listener).map_err(FileError::at("listen on", params.pod.path.join(SOCKET)))?;
    let mut server = Server::new().add_listener(listener).register_service(services);
    server.start().await.map_err(OciError::Task)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(OciError::io("watch signals"))?;
    tokio::select! {
        () = ended.notified() => {}
        () = abandoned(&pod, params.creator) => tracing::warn!("the creation was abandoned"),
        _ = terminate.recv() => tracing::info!("ending on SIGTERM"),
    }
    pod.end().await;
    // A connection that stays open delays the end by a limited time.
    let _ = timeout(ANSWERS_GRACE, server.shutdown()).await;
    Ok(())
}

/// Resolves if the verb that creates the container ends without having made one.
async fn abandoned(pod: &Pod, creator: HostProcess) {
    if let Err(error) = foreign_end(creator.pid, || creator.exists()).await {
        tracing::warn!("cannot watch the verb that creates the container: {error}");
    }
    if !pod.is_empty() {
        std::future::pending::<()>().await;
    }
}
