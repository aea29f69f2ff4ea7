//! The server: one process, one pod, the task API in both of its versions on one socket.

use std::{
    env, fs,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use containerd_shim_protos::{
    shim_async::create_task,
    ttrpc::asynchronous::{Server, transport::Listener},
};
use machinen::{config::Config, pod::Pod, sys};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, mpsc},
    time::timeout,
};

use crate::{
    args::Args,
    error::ShimError,
    events::Publisher,
    logging,
    start::{ADDRESS_FILE, LISTENER_FD},
    task::TaskService,
};

/// The task API under its name since containerd 2.0.
const TASK_V3: &str = "containerd.task.v3.Task";
/// The same methods and messages, as containerd 1.x calls them.
const TASK_V2: &str = "containerd.task.v2.Task";

/// Directory in the bundle where the pod keeps its sockets and its console log.
pub const POD_DIR: &str = "vm";

/// Longest wait at the end for containerd to take the last events.
const EVENTS_GRACE: Duration = Duration::from_secs(2);

/// Serves until containerd asks for the end and no container is left, or SIGTERM.
///
/// # Errors
/// The configuration is wrong or the listener was not passed on.
pub fn run(args: &Args) -> Result<(), ShimError> {
    // Before anything else opens descriptors.
    let listener = sys::inherit::take(LISTENER_FD).map_err(|_| ShimError::NoListener)?;
    let bundle = env::current_dir().map_err(ShimError::io("find the bundle, the directory", "."))?;
    let config = Config::load()?;
    logging::init(&bundle, &config, args.debug)?;
    // One thread: a shim per container must stay small, and children die with the thread that started them.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ShimError::io("start the event loop in", &bundle))?;
    let result = runtime.block_on(serve(args, bundle.clone(), config, listener.into()));
    remove_socket(&bundle);
    // Conversions that nobody waits for any more run in threads; they leave nothing half-done when they end with us.
    runtime.shutdown_background();
    result
}

async fn serve(
    args: &Args,
    bundle: PathBuf,
    config: Config,
    listener: UnixListener,
) -> Result<(), ShimError> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let pod = Pod::new(config, args.id.clone(), bundle.join(POD_DIR), sender);
    let ended = Arc::new(Notify::new());
    let publisher = Publisher::new(args.namespace.clone(), env::var("TTRPC_ADDRESS").ok());
    let service = TaskService::new(pod.clone(), publisher.requests(), Arc::clone(&ended));
    let published = tokio::spawn(publisher.run(receiver));

    let mut methods = create_task(Arc::new(service.clone()));
    let v2 = create_task(Arc::new(service)).remove(TASK_V3).map(|service| (TASK_V2.to_owned(), service));
    methods.extend(v2);
    let listener = Listener::try_from(listener).map_err(ShimError::io("listen on", &bundle))?;
    let mut server = Server::new().add_listener(listener).register_service(methods);
    server.start().await.map_err(ShimError::Serve)?;
    tracing::debug!(id = args.id, "serving");

    let mut terminate =
        signal(SignalKind::terminate()).map_err(ShimError::io("watch signals of", &bundle))?;
    tokio::select! {
        () = ended.notified() => {}
        _ = terminate.recv() => tracing::info!(id = args.id, "ending on SIGTERM"),
    }
    pod.end().await;
    // Answers that are on their way still arrive; a connection that stays open does not hold us up.
    let _ = timeout(EVENTS_GRACE, server.shutdown()).await;
    drop(server);
    drop(pod);
    if timeout(EVENTS_GRACE, published).await.is_err() {
        tracing::warn!(id = args.id, "containerd did not take the last events in time");
    }
    Ok(())
}

/// The socket must not outlive the server, or the next `start` would have to find out that it is stale.
fn remove_socket(bundle: &Path) {
    let Ok(address) = fs::read_to_string(bundle.join(ADDRESS_FILE)) else { return };
    if let Some(path) = address.strip_prefix("unix://")
        && let Err(error) = fs::remove_file(path)
    {
        tracing::debug!(path, "socket not removed: {error}");
    }
}
