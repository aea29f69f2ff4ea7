//! The agent's life: open the channel, dial the host, serve until told to stop or left alone.

use std::{io, sync::Arc};

use machinen_protocol::api::create_agent;
use tokio::sync::watch;

use crate::{
    boot::{BootError, Machine},
    channel::{Channel, ChannelError, Quiet, Unclaimed, wake},
    console,
    container::{Container, Table},
    criu,
    disk::DiskSource,
    engine::{Engine, EngineError},
    options::OptionsError,
    reaper::Reaper,
    service::Service,
    shutdown,
};

/// Everything that the calls of the host work with.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) engine: Engine,
    pub(crate) reaper: Reaper,
    pub(crate) unclaimed: Unclaimed,
    pub(crate) disks: DiskSource,
    pub(crate) containers: Table<Container>,
    /// Whether the clock and the random number generator are the agent's to set.
    pub(crate) owns_kernel: bool,
    /// Set by the call that asks for the end, to its id.
    pub(crate) shutdown: watch::Sender<Option<u32>>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error(transparent)]
    Options(#[from] OptionsError),
    #[error("cannot boot")]
    Boot(#[from] BootError),
    #[error("cannot start the container engine")]
    Engine(#[from] EngineError),
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    #[error("cannot watch child processes")]
    Reaper(#[source] io::Error),
    #[error("no channel to the host")]
    Channel(#[from] ChannelError),
    #[error("cannot serve the host")]
    Serve(#[source] ttrpc::Error),
    #[error("the host has closed the control stream")]
    LeftAlone,
}

/// Returns only with an error; a shutdown ends the VM instead.
///
/// # Errors
/// The channel does not come up, or the host goes away.
pub(crate) async fn run(machine: Machine, engine: Engine) -> Result<(), AgentError> {
    let unclaimed = Unclaimed::default();
    let quiet = Quiet::open(machine.channel).await?;
    let reaper = Reaper::start().map_err(AgentError::Reaper)?;
    let parts = Arc::new(Parts {
        engine,
        reaper,
        unclaimed,
        disks: machine.disks,
        containers: Table::new("container"),
        owns_kernel: machine.owns_kernel,
        shutdown: watch::Sender::new(None),
    });
    console::trace("ready");
    let _port = if machine.waits {
        // What CRIU asks the kernel when it first runs, and its code, are there in every clone then.
        if let Err(err) = criu::warm_up(&parts.reaper).await {
            console::say(&console::chain(&err));
        }
        Some(wake::wait().await?)
    } else {
        None
    };
    let channel = Channel::open(quiet, &parts.unclaimed);
    console::trace("channel open");
    serve(&channel, &parts).await
}

/// One control stream, from dial to close.
async fn serve(channel: &Channel, parts: &Arc<Parts>) -> Result<(), AgentError> {
    let (control, mut watch) = channel.dial_control().await?;
    console::trace("host greeted");
    let listener = ttrpc::r#async::transport::Listener::new(futures_util::stream::iter([Ok(control)]));
    let mut server = ttrpc::r#async::Server::new()
        .register_service(create_agent(Arc::new(Service::new(Arc::clone(parts)))))
        .add_listener(listener);
    server.start().await.map_err(AgentError::Serve)?;
    let mut shutdown = parts.shutdown.subscribe();
    let asked = async { shutdown.wait_for(Option::is_some).await.ok().and_then(|call| *call) };
    tokio::select! {
        biased;
        call = asked => {
            // The answer is the last thing the agent says, but it does say it.
            watch.answered(call.unwrap_or_default()).await;
            channel.flush().await;
            console::end(0)
        }
        () = watch.closed() => {
            // Nobody can ask for an orderly end any more, but the disks deserve one.
            shutdown::run(parts).await;
            Err(AgentError::LeftAlone)
        }
    }
}
