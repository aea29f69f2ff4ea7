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
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use containerd_shim_protos::ttrpc::r#async::{Server, transport::Listener};
use machinen::{
    config::{Config, MetricsFormat},
    error::chain,
    fs::FileError,
    pod::{ContainerId, Lifetime, Pod, PodSettings},
    reexec::EntryPoint,
    sys,
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::AsyncReadExt as _,
    net::unix::pipe,
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

/// The owner of a pod's VM.
pub(crate) const ENTRY_POINT: EntryPoint = EntryPoint { name: "container-monitor", main };

const LISTENER_FD: i32 = 3;
/// The descriptor that is closed when the verb that creates the container has ended.
const CREATOR_FD: i32 = 4;

/// The namespace of containerd that a logging program would get. Streams of the command line lead to none.
const NAMESPACE: &str = "oci";

/// How long answers in flight may take to arrive at the end.
const ANSWERS_GRACE: Duration = Duration::from_secs(2);

#[derive(Debug, Serialize, Deserialize)]
struct MonitorParams {
    id: String,
    pod: PodDir,
    bundle: PathBuf,
    log: LogArgs,
}

/// Starts the monitor of a pod, whose first container is to be created as `id` from `bundle`. It ends if the returned descriptor is closed before the
/// container exists.
///
/// # Errors
/// The socket cannot be made, or the process cannot be started.
pub(super) fn start(
    id: &ContainerId,
    pod: &PodDir,
    bundle: PathBuf,
    log: &LogArgs,
) -> Result<(HostProcess, OwnedFd), OciError> {
    let failed = |source| OciError::Spawn { purpose: "owns the container's VM", source };
    let socket = pod.path.join(SOCKET);
    let listener = pod.with_socket(|path| {
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    });
    let listener = listener.map_err(FileError::at("listen on", socket))?;
    let (reader, creator) = std::io::pipe().map_err(OciError::io("make a pipe"))?;
    let log = log.absolute()?;
    let params = MonitorParams { id: id.to_string(), pod: pod.clone(), bundle, log };
    let params = serde_json::to_string(&params).map_err(OciError::Encode)?;
    let spawn = ENTRY_POINT.spawn().args([params]).dir("/");
    let spawn = spawn.fd(listener.into(), LISTENER_FD).fd(reader.into(), CREATOR_FD);
    let pid = spawn.detach().map_err(failed)?;
    Ok((HostProcess::of(pid)?, creator.into()))
}

fn main(args: Vec<String>) -> ExitCode {
    let result = args.first().ok_or_else(|| "no parameters".to_owned()).and_then(|params| {
        let params: MonitorParams = serde_json::from_str(params).map_err(|error| error.to_string())?;
        run(params).map_err(|error| chain(&error))
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(params: MonitorParams) -> Result<(), OciError> {
    // This comes before other descriptors are opened.
    let inherited = OciError::io("find the inherited descriptors");
    let taken = sys::inherit::take(LISTENER_FD).and_then(|fd| Ok((fd, sys::inherit::take(CREATOR_FD)?)));
    let (listener, creator) = taken.map_err(inherited)?;
    let mut config = Config::load()?;
    // The verbs decode one format only.
    config.task.metrics = MetricsFormat::Cgroup2;
    // Members of the warm pool are servers of containerd's tasks, which only the shim can be.
    config.pool.size = 0;
    params.log.follow(&config)?;
    // Children die with the thread that started them, so there is one thread.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(OciError::io("start the event loop"))?;
    let result = runtime.block_on(serve(params, config, listener.into(), creator));
    // Image conversions that are no longer needed may still run in threads. They can be stopped at any point.
    runtime.shutdown_background();
    result
}

async fn serve(
    params: MonitorParams,
    config: Config,
    listener: UnixListener,
    creator: OwnedFd,
) -> Result<(), OciError> {
    let (events, mut happened) = mpsc::unbounded_channel();
    let settings = PodSettings {
        config,
        namespace: NAMESPACE.to_owned(),
        name: params.id.clone(),
        state_dir: params.pod.path.clone(),
        lifetime: Lifetime::Containers,
        containerd: None,
    };
    let pod = Pod::new(settings, None, events);
    pod.begin_cgroup(params.bundle);
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
        () = abandoned(&pod, creator) => tracing::warn!("the creation was abandoned"),
        _ = terminate.recv() => tracing::info!("ending on SIGTERM"),
    }
    pod.end().await;
    // A connection that stays open delays the end by a limited time.
    let _ = timeout(ANSWERS_GRACE, server.shutdown()).await;
    Ok(())
}

/// Resolves if the verb that creates the container ends without having made one.
async fn abandoned(pod: &Pod, creator: OwnedFd) {
    let closed = async {
        let mut creator = pipe::Receiver::from_owned_fd(creator)?;
        creator.read(&mut [0]).await
    };
    if let Err(error) = closed.await {
        tracing::warn!("cannot watch the verb that creates the container: {error}");
    }
    if !pod.is_empty() {
        std::future::pending::<()>().await;
    }
}
