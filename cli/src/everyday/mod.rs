//! The verbs for a user at a terminal. They work on the containers of every client: containerd, Docker, Podman, CRI-O and machinen itself (`find`).

mod attach;
mod console;
mod debug;
mod error;
mod logs;
mod ls;
mod metrics;
mod mux;
mod port;
mod secret;
pub(crate) mod top;

use std::process::ExitCode;

use clap::Subcommand;
use machinen::{config::Config, reexec::EntryPoint};

use crate::{
    boot, build, copy,
    failure::Failure,
    fork,
    oci::{GlobalArgs, OciError},
};

/// The hidden processes that the verbs start.
pub(crate) const ENTRY_POINTS: &[EntryPoint] = &[boot::keeper::ENTRY_POINT];

/// Everyday commands.
#[derive(Debug, Subcommand)]
pub(crate) enum EverydayVerb {
    /// List the containers of this host, also those of other clients.
    #[command(long_about = "List the containers of this host: those of containerd, Docker, Podman, CRI-O \
        and of machinen itself. MEMORY is the share of the host's memory that the VM takes, and the most that its guest \
        can use; containers of one pod have one VM.")]
    Ls(ls::LsArgs),
    /// Start a container from an image in a file or a directory, without any daemon.
    #[command(
        long_about = "Start a container from an image in a file or a directory, without any daemon, and stay until it ends. \
        The image is unpacked once; what the container writes is gone with it. Without --netns, \
        --network or --publish the container has a loopback interface only."
    )]
    Boot(Box<boot::BootArgs>),
    /// Build images in files, without any daemon.
    Image(build::ImageArgs),
    /// Connect this terminal with a container that `boot --detach` has started.
    #[command(
        long_about = "Connect this terminal with a container that `machinen boot --detach` has started: its output from a \
        little before now on, and its input if it was started with --tty or --interactive. The exit status is that of the \
        container, or 0 after the keys that detach."
    )]
    Attach(attach::AttachArgs),
    /// Switch this terminal between the containers that `boot --detach` has started.
    #[command(
        long_about = "Switch this terminal between the containers that `machinen boot --detach` has started. They are listed; a \
        number and Enter connect with one: the end of its output is shown, and what follows. The keys ctrl-] ctrl-] return to \
        the list (with Enter after them if the container has no terminal). The containers run on when this ends."
    )]
    Mux(mux::MuxArgs),
    /// Print the output of a container that `boot --detach` or Podman has started.
    Logs(logs::LogsArgs),
    /// Show the processes of a container, as its guest sees them.
    Top(top::TopArgs),
    /// Print what the guest of a container has printed on its console: messages of its kernel and of its agent.
    Console(console::ConsoleArgs),
    /// Print what the containers of this host use, in the format of Prometheus.
    #[command(
        long_about = "Print what the containers of this host use, in the text format of Prometheus and with the names and \
        labels of cAdvisor, which cannot see containers in VMs. A collector of text files runs this: \
        machinen metrics > DIR/machinen.prom.new && mv DIR/machinen.prom.new DIR/machinen.prom"
    )]
    Metrics(metrics::MetricsArgs),
    /// Print all that is known of a pod: its VM, containers, processes and console.
    Debug(debug::DebugArgs),
    /// Print which ports of the host lead to a container.
    Port(port::PortArgs),
    /// Give a running container secrets, which are on no disk and in no checkpoint.
    #[command(
        long_about = "Give a running container secrets: files in /run/secrets, one for each, which the user of the \
        container's command may read. They are in the memory of the VM only, on no disk and in no checkpoint: a container \
        that is restored or forked has an empty /run/secrets. A value among the arguments can be seen by other users of \
        this host (ps); NAME alone takes the value from the environment, and --env-file - from stdin."
    )]
    Secret(secret::SecretArgs),
    /// Copy files between a running container and the host.
    #[command(
        long_about = "Copy files between a running container and the host. One of SRC and DST is CONTAINER:PATH. \
        Directories are copied with all that is in them, links as links. Devices, fifos and sockets are left out. Files \
        that are copied to the host belong to the user unless --archive is given, and never have setuid or setgid."
    )]
    Cp(copy::CpArgs),
    /// Make a second container that continues from where a running one is.
    #[command(
        long_about = "Make a second container that continues from where a running one is: with the same processes \
        and memory, and what SRC has written until then, in a VM of its own. SRC continues to run. NEW has SRC's \
        image, labels and configuration, but another hostname and machine id, and its output is discarded."
    )]
    Fork(fork::ForkArgs),
}

/// # Errors
/// The verb has failed.
pub(crate) fn run(global: &GlobalArgs, verb: EverydayVerb) -> Result<ExitCode, Failure> {
    if let EverydayVerb::Fork(args) = verb {
        fork::run(&args, &Config::load()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(OciError::io("start the event loop"))?;
    let done = runtime.block_on(dispatch(global, verb));
    // A thread that relays a terminal may wait for a key.
    runtime.shutdown_background();
    done
}

async fn dispatch(global: &GlobalArgs, verb: EverydayVerb) -> Result<ExitCode, Failure> {
    match verb {
        EverydayVerb::Boot(args) => return Ok(boot::run(global, *args).await),
        EverydayVerb::Image(args) => build::run(global, &args).await?,
        EverydayVerb::Attach(args) => return Ok(attach::run(global, &args).await?),
        EverydayVerb::Mux(args) => mux::run(global, &args).await?,
        EverydayVerb::Logs(args) => logs::run(global, &args).await?,
        EverydayVerb::Ls(args) => ls::run(global, &args).await?,
        EverydayVerb::Top(args) => top::run(global, &args).await?,
        EverydayVerb::Console(args) => console::run(global, &args).await?,
        EverydayVerb::Metrics(args) => metrics::run(global, &args).await?,
        EverydayVerb::Debug(args) => debug::run(global, &args).await?,
        EverydayVerb::Cp(args) => copy::run(global, &args).await?,
        EverydayVerb::Port(args) => port::run(global, &args).await?,
        EverydayVerb::Secret(args) => secret::run(global, &args).await?,
        EverydayVerb::Fork(_) => {}
    }
    Ok(ExitCode::SUCCESS)
}
