//! The agent's life: it opens the channel, dials the host, and serves calls until the host asks for the end
//! or goes away.

use std::{io, sync::Arc};

use machinen_protocol::api::create_agent;
use procfs::{
    ProcResult,
    process::{MMapPath, Process},
};
use tokio::task::spawn_blocking;

use crate::{
    boot::{BootError, Machine},
    cgroup::DeviceFilters,
    channel::{Channel, ChannelError, Unclaimed, Unopened, wake},
    configure, console,
    context::Context,
    criu,
    engine::{self, Engine, EngineError},
    network::{Network, NetworkError},
    options::OptionsError,
    reaper::Reaper,
    rehearsal,
    service::{AgentState, Service},
    shutdown, sys,
};

#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error(transparent)]
    Options(#[from] OptionsError),
    #[error("cannot boot")]
    Boot(#[from] BootError),
    #[error("cannot start the container engine")]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    #[error("cannot watch child processes")]
    Reaper(#[source] io::Error),
    #[error("no channel to the host")]
    Channel(#[from] ChannelError),
    #[error("cannot serve the host")]
    Serve(#[source] ttrpc::Error),
    #[error("the host has closed the control stream")]
    HostGone,
}

/// Runs the agent. Returns only with an error; a shutdown ends the VM instead.
///
/// # Errors
/// The channel does not come up, or the host goes away.
pub(crate) async fn run(machine: Machine, engine: Engine) -> Result<(), AgentError> {
    let unopened = Unopened::open(machine.channel).await?;
    let reaper = Reaper::start().map_err(AgentError::Reaper)?;
    // Before the agent waits: a template has the devices hidden already.
    let network = Network::hide_devices()?;
    let (unclaimed, device_filters) = (Unclaimed::default(), DeviceFilters::default());
    let context = Context { engine, reaper, unclaimed, disks: machine.disks, device_filters, network };
    let state = Arc::new(AgentState::new(context, machine.owns_kernel));
    console::trace("ready");
    let woken = if machine.waits {
        let failed = warm_up(&state).await;
        Some(wake::wait(failed).await?)
    } else {
        None
    };
    let wake = woken.as_ref().map(|(wake, _port)| *wake);
    let channel = Channel::open(unopened, &state.context.unclaimed, wake);
    console::trace("channel open");
    match serve(&channel, &state).await? {
        ServeEnd::Requested => console::end(0),
        ServeEnd::HostGone => {
            // No call can ask for the end any more, but the disks still have to be written.
            shutdown::run(&state.context.reaper, &state.containers).await;
            Err(AgentError::HostGone)
        }
    }
}

/// Has this program in memory as a whole, so that no clone reads a part of it from the disk.
fn read_program() -> ProcResult<()> {
    let process = Process::myself()?;
    let program = MMapPath::Path(process.exe()?);
    for mapped in process.maps()?.into_iter().filter(|mapped| mapped.pathname == program) {
        let (start, end) = mapped.address;
        sys::populate(start, usize::try_from(end - start).unwrap_or_default()).map_err(io::Error::from)?;
    }
    Ok(())
}

/// Does what each clone of this template would do otherwise. A failure only makes clones slower; returns how many there were.
async fn warm_up(state: &Arc<AgentState>) -> u64 {
    let Context { reaper, network, disks, device_filters, .. } = &state.context;
    let mut failed = 0;
    note(read_program(), &mut failed);
    // CRIU's code, and what it asks the kernel when it first runs, are then in memory in every clone.
    note(criu::warm_up(reaper).await, &mut failed);
    note(disks.warm_up().await, &mut failed);
    note(network.warm_up(), &mut failed);
    note(configure::warm_up(), &mut failed);
    note(engine::warm_up(), &mut failed);
    note(device_filters.warm_up(engine::usual_program()), &mut failed);
    note(rehearsal::rehearse(state).await, &mut failed);
    // After the rehearsal, which watches them, too.
    note(state.localhost.warm_up().await, &mut failed);
    // The thread that packs the layer of a container that has ended.
    note(spawn_blocking(|| ()).await, &mut failed);
    failed
}

fn note<E: std::error::Error>(result: Result<(), E>, failed: &mut u64) {
    if let Err(error) = result {
        console::report(&error);
        *failed += 1;
    }
}

/// Why a control stream has ended.
#[derive(Debug)]
pub(crate) enum ServeEnd {
    /// The host has asked for the end of the VM, and has the answer.
    Requested,
    /// The host has closed the stream.
    HostGone,
}

/// Serves one control stream, from dial to close.
///
/// # Errors
/// The stream cannot be opened or served.
pub(crate) async fn serve(channel: &Channel, state: &Arc<AgentState>) -> Result<ServeEnd, AgentError> {
    let (control, mut watch) = channel.dial_control().await?;
    console::trace("host greeted");
    let listener = ttrpc::r#async::transport::Listener::new(futures_util::stream::iter([Ok(control)]));
    let service = create_agent(Arc::new(Service::new(Arc::clone(state))));
    let mut server = ttrpc::r#async::Server::new().register_service(service).add_listener(listener);
    server.start().await.map_err(AgentError::Serve)?;
    let mut shutdown = state.shutdown.subscribe();
    let requested = async { shutdown.wait_for(Option::is_some).await.ok().and_then(|call| *call) };
    tokio::select! {
        biased;
        call = requested => {
            // The agent sends nothing after the answer, but the answer has to arrive.
            watch.answered(call.unwrap_or_default()).await;
            channel.flush().await;
            Ok(ServeEnd::Requested)
        }
        () = watch.closed() => Ok(ServeEnd::HostGone),
    }
}
