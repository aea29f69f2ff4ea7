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
use machinen::{config::Config, pod::Pod, pool::Ready, sys};
use serde::{Deserialize, Serialize};
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
    sync::{Notify, mpsc, oneshot},
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
    let runtime = event_loop(&bundle)?;
    let work = Work {
        namespace: args.namespace.clone(),
        id: args.id.clone(),
        debug: args.debug,
        bundle,
        events: env::var("TTRPC_ADDRESS").ok(),
    };
    let result = runtime.block_on(serve(work, config, listener.into(), None));
    // Conversions that nobody waits for any more run in threads; they leave nothing half-done when they end with us.
    runtime.shutdown_background();
    result
}

/// One thread: a shim per container must stay small, and children die with the thread that started them.
///
/// # Errors
/// Those of epoll_create(2) and its like.
pub fn event_loop(bundle: &Path) -> Result<Runtime, ShimError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(ShimError::io("start the event loop in", bundle))
}

/// What a server is for.
#[derive(Debug, Serialize, Deserialize)]
pub struct Work {
    pub namespace: String,
    pub id: String,
    pub debug: bool,
    pub bundle: PathBuf,
    /// Where containerd takes events.
    pub events: Option<String>,
}

/// Serves the pod of `work`, whose first VM may be there already, to its end; the socket goes with it.
///
/// # Errors
/// The listener or signals cannot be waited on.
pub async fn serve(
    work: Work,
    config: Config,
    listener: UnixListener,
    ready: Option<Ready>,
) -> Result<(), ShimError> {
    // Known now, because whoever ends us may have removed the bundle by then.
    let socket = socket_of(&work.bundle);
    let result = serve_pod(work, config, listener, ready).await;
    remove(socket);
    result
}

async fn serve_pod(
    work: Work,
    config: Config,
    listener: UnixListener,
    ready: Option<Ready>,
) -> Result<(), ShimError> {
    let Work { namespace, id, bundle, events, .. } = work;
    let (sender, receiver) = mpsc::unbounded_channel();
    let pod = Pod::new(config, namespace.clone(), id.clone(), bundle.join(POD_DIR), sender);
    if let Some(ready) = ready {
        pod.adopt(ready);
    }
    if let Some(socket) = &events {
        pod.serves(PathBuf::from(socket.trim_start_matches("unix://")));
    }
    let ended = Arc::new(Notify::new());
    let publisher = Publisher::new(namespace, events);
    let service = TaskService::new(pod.clone(), Arc::clone(&ended));
    let (last, told) = oneshot::channel();
    let published = tokio::spawn(publisher.run(receiver, told));

    let mut methods = create_task(Arc::new(service.clone()));
    let v2 = create_task(Arc::new(service)).remove(TASK_V3).map(|service| (TASK_V2.to_owned(), service));
    methods.extend(v2);
    let listener = Listener::try_from(listener).map_err(ShimError::io("listen on", &bundle))?;
    let mut server = Server::new().add_listener(listener).register_service(methods);
    server.start().await.map_err(ShimError::Serve)?;
    tracing::debug!(id, "serving");

    let mut terminate =
        signal(SignalKind::terminate()).map_err(ShimError::io("watch signals of", &bundle))?;
    tokio::select! {
        () = ended.notified() => {}
        _ = terminate.recv() => tracing::info!(id, "ending on SIGTERM"),
    }
    pod.end().await;
    // Before containerd sees the connection close: it then runs `delete`, which kills a server that is still there.
    let _ = last.send(());
    if timeout(EVENTS_GRACE, published).await.is_err() {
        tracing::warn!(id, "containerd did not take the last events in time");
    }
    // Answers that are on their way still arrive; a connection that stays open does not hold us up.
    let _ = timeout(EVENTS_GRACE, server.shutdown()).await;
    Ok(())
}

fn socket_of(bundle: &Path) -> Option<PathBuf> {
    let address = fs::read_to_string(bundle.join(ADDRESS_FILE)).ok()?;
    address.strip_prefix("unix://").map(PathBuf::from)
}

/// The socket must not outlive the server, or the next `start` would have to find out that it is stale.
fn remove(socket: Option<PathBuf>) {
    if let Some(path) = socket
        && let Err(error) = fs::remove_file(&path)
    {
        tracing::debug!(path = %path.display(), "socket not removed: {error}");
    }
}
