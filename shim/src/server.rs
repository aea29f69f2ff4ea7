//! The server: one process with one pod, and the task API in both of its versions on one socket.

use std::{
    env, fs,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use containerd_shim_protos::ttrpc::asynchronous::Server;
use machinen::{
    config::Config,
    error::chain,
    fs::FileError,
    pod::{Lifetime, Pod, PodSettings, leftovers},
    pool::WarmVm,
    sys,
};
use serde::{Deserialize, Serialize};
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
    sync::{Notify, mpsc, oneshot},
    time::timeout,
};

use crate::{
    args::ShimArgs,
    connections::Connections,
    delete::present,
    error::ShimError,
    logging,
    publisher::Publisher,
    start::{ADDRESS_FILE, LISTENER_FD},
};

/// How long containerd may take to receive the last events at the end.
const EVENTS_GRACE: Duration = Duration::from_secs(2);

/// How long a server waits for a connection when it has no container, or its bundle was removed. containerd connects at once
/// to a server that it has started, and after its own restart ends those without containers and finds none without a bundle.
const ABANDONED_AFTER: Duration = Duration::from_secs(15);

/// Serves until containerd requests a shutdown and no container is left, or until SIGTERM.
///
/// # Errors
/// The configuration is invalid, or the listener was not passed.
pub(crate) fn run(args: &ShimArgs) -> Result<(), ShimError> {
    // This comes before other descriptors are opened.
    let listener = sys::inherit::take(LISTENER_FD).map_err(|_| ShimError::NoListener)?;
    let bundle = env::current_dir().map_err(FileError::at("find the bundle, the directory", "."))?;
    let config = Config::load()?;
    logging::init(&bundle, &config, args.debug)?;
    let runtime = event_loop(&bundle)?;
    let work = ServerParams {
        namespace: args.namespace.clone(),
        id: args.id.clone(),
        debug: args.debug,
        bundle,
        events: env::var("TTRPC_ADDRESS").ok(),
    };
    let result = runtime.block_on(serve(work, config, listener.into(), None));
    // Image conversions that are no longer needed may still run in threads. They can be stopped at any point.
    runtime.shutdown_background();
    result
}

/// Creates a single-threaded event loop: a shim per container must be small, and children die with the thread
/// that started them.
///
/// # Errors
/// The event loop cannot be created.
pub(crate) fn event_loop(bundle: &Path) -> Result<Runtime, ShimError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.map_err(FileError::at("start the event loop in", bundle))?)
}

/// What a server has to serve.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ServerParams {
    pub namespace: String,
    pub id: String,
    pub debug: bool,
    pub bundle: PathBuf,
    /// The socket on which containerd receives events.
    pub events: Option<String>,
}

/// Serves the pod of `work` until its end, and removes the socket. The VM of the first container may exist
/// already.
///
/// # Errors
/// The listener or the signals fail.
pub(crate) async fn serve(
    work: ServerParams,
    config: Config,
    listener: UnixListener,
    warm_vm: Option<WarmVm>,
) -> Result<(), ShimError> {
    // Read now, because the bundle may have been removed by the time that the server ends.
    let socket = socket_of(&work.bundle);
    let result = serve_pod(work, config, listener, warm_vm).await;
    remove(socket);
    result
}

async fn serve_pod(
    work: ServerParams,
    config: Config,
    listener: UnixListener,
    warm_vm: Option<WarmVm>,
) -> Result<(), ShimError> {
    let ServerParams { namespace, id, bundle, events, .. } = work;
    tracing::debug!(id, config = %config.file.display(), "the configuration of the pod");
    let (sender, receiver) = mpsc::unbounded_channel();
    let containerd = events.as_ref().map(|socket| PathBuf::from(socket.trim_start_matches("unix://")));
    let settings = PodSettings {
        config,
        namespace: namespace.clone(),
        name: id.clone(),
        state_dir: bundle.clone(),
        lifetime: Lifetime::Containers,
        default_cgroup: None,
        containerd,
    };
    let pod = Pod::new(settings, warm_vm, sender);
    let ended = Arc::new(Notify::new());
    let publisher = Publisher::new(namespace, events);
    let (last, last_sent) = oneshot::channel();
    let published = tokio::spawn(publisher.run(receiver, last_sent));

    let services = machinen_task::services(pod.clone(), Arc::clone(&ended));
    let (listener, connections) = Connections::of(listener).map_err(FileError::at("listen on", &bundle))?;
    let mut server = Server::new().add_listener(listener).register_service(services);
    server.start().await.map_err(ShimError::Serve)?;
    tracing::debug!(id, "serving");

    let mut terminate =
        signal(SignalKind::terminate()).map_err(FileError::at("watch signals of", &bundle))?;
    let mut is_abandoned = false;
    tokio::select! {
        () = ended.notified() => {}
        _ = terminate.recv() => tracing::info!(id, "ending on SIGTERM"),
        () = connections.abandoned(ABANDONED_AFTER, || pod.is_empty() || !bundle.exists()) => {
            tracing::info!(id, "ending, because containerd has forgotten this server");
            is_abandoned = true;
        }
    }
    pod.end().await;
    if is_abandoned {
        remove_from_renamed(&id, &bundle).await;
    }
    // Sent before containerd sees the connection close, since it then runs `delete`, which kills a server
    // that is still running.
    let _ = last.send(());
    if timeout(EVENTS_GRACE, published).await.is_err() {
        tracing::warn!(id, "containerd did not receive the last events in time");
    }
    if pod.has_sandbox() {
        // containerd closes the connection when it has the answer to ShutdownSandbox.
        let _ = timeout(EVENTS_GRACE, connections.closed()).await;
    }
    // Answers in flight still arrive, and a connection that stays open delays the end by a limited time.
    let _ = timeout(EVENTS_GRACE, server.shutdown()).await;
    Ok(())
}

/// Removes what the pod has left in a bundle that containerd has renamed. By its path the pod does not find it.
async fn remove_from_renamed(id: &str, bundle: &Path) {
    let renamed = present(id, bundle);
    if renamed == bundle {
        return;
    }
    match leftovers::remove(&renamed, &renamed, Instant::now() + EVENTS_GRACE).await {
        Ok(problems) => problems.iter().for_each(|problem| tracing::warn!(id, "{problem}")),
        Err(error) => tracing::warn!(id, "{}", chain(&error)),
    }
}

fn socket_of(bundle: &Path) -> Option<PathBuf> {
    let address = fs::read_to_string(bundle.join(ADDRESS_FILE)).ok()?;
    address.strip_prefix("unix://").map(PathBuf::from)
}

/// Removes the socket, so that the next `start` does not find a stale one.
fn remove(socket: Option<PathBuf>) {
    if let Some(path) = socket
        && let Err(error) = fs::remove_file(&path)
    {
        tracing::debug!(path = %path.display(), "socket not removed: {error}");
    }
}
