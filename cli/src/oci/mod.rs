//! The OCI runtime's command line, as runc has it: one VM for each container, owned by a process of its own.
//!
//! ```text
//!   create ──> monitor (owns the VM, serves the Task API in the container's directory)
//!          └─> stand-in (the pid that the caller gets; ends with the container's exit status)
//!   other verbs ──Task API──> monitor
//! ```
//! docs/design/oci.md has the reasons.

mod checkpoint;
pub(crate) mod client;
pub(crate) mod console;
pub(crate) mod create;
mod error;
mod events;
pub(crate) mod exec;
pub(crate) mod foreground;
mod global;
mod monitor;
pub(crate) mod pod;
mod restore;
pub(crate) mod run;
pub(crate) mod spec;
pub(crate) mod stand_in;
pub(crate) mod state;
pub(crate) mod update;
mod verbs;

use std::process::ExitCode;

use clap::Subcommand;
use machinen::{pod::anchor, reexec::EntryPoint, shares};

pub(crate) use error::OciError;
pub(crate) use global::{GlobalArgs, default_root};
pub(crate) use monitor::NAME as MONITOR;

/// The hidden processes that the verbs and the monitors start.
pub(crate) const ENTRY_POINTS: &[EntryPoint] = &[
    monitor::ENTRY_POINT,
    monitor::POOL_ENTRY_POINT,
    stand_in::ENTRY_POINT,
    anchor::ENTRY_POINT,
    shares::ENTRY_POINT,
    shares::MAPPING_ENTRY_POINT,
];

/// The verbs of an OCI runtime (runc(8)).
#[derive(Debug, Subcommand)]
pub(crate) enum OciVerb {
    /// Create a container from a bundle; its command waits for start.
    Create(create::CreateArgs),
    /// Start the command of a created container.
    Start(verbs::IdArgs),
    /// Create and start a container, and stay until it ends.
    Run(run::RunArgs),
    /// Print the state of a container, in JSON.
    State(verbs::IdArgs),
    /// Send a signal to a container.
    Kill(verbs::KillArgs),
    /// Delete a container that has stopped.
    Delete(verbs::DeleteArgs),
    /// Run a further process in a container.
    Exec(exec::ExecArgs),
    /// List the containers.
    List(verbs::ListArgs),
    /// List the processes of a container, as its guest sees them.
    Ps(verbs::PsArgs),
    /// Freeze a container.
    Pause(verbs::IdArgs),
    /// Let a frozen container continue.
    Resume(verbs::IdArgs),
    /// Change the limits of a container.
    Update(update::UpdateArgs),
    /// Print the metrics of a container, again and again or once.
    Events(events::EventsArgs),
    /// Write a checkpoint of a container.
    Checkpoint(checkpoint::CheckpointArgs),
    /// Make a container that continues from a checkpoint.
    Restore(restore::RestoreArgs),
    /// Write a config.json to start from.
    Spec(spec::SpecArgs),
    /// Print what this runtime supports, in JSON.
    Features,
}

/// # Errors
/// The verb has failed.
pub(crate) fn run(global: &GlobalArgs, verb: &OciVerb) -> Result<ExitCode, OciError> {
    global.begin_log()?;
    // Without the arguments, which may have secrets.
    tracing::debug!(version = env!("CARGO_PKG_VERSION"), "the verb begins");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(OciError::io("start the event loop"))?;
    let done = runtime.block_on(dispatch(global, verb));
    // A thread that relays a terminal may wait for a key.
    runtime.shutdown_background();
    tracing::debug!("the verb ends");
    done
}

async fn dispatch(global: &GlobalArgs, verb: &OciVerb) -> Result<ExitCode, OciError> {
    match verb {
        OciVerb::Run(args) => return run::run(global, args).await,
        OciVerb::Exec(args) => return exec::run(global, args).await,
        OciVerb::Restore(args) => return restore::run(global, args).await,
        OciVerb::Create(args) => create::run(global, args).await,
        OciVerb::Start(args) => verbs::start(global, args).await,
        OciVerb::State(args) => verbs::state(global, args).await,
        OciVerb::Kill(args) => verbs::kill(global, args).await,
        OciVerb::Delete(args) => verbs::delete(global, args).await,
        OciVerb::List(args) => verbs::list(global, args).await,
        OciVerb::Ps(args) => verbs::ps(global, args).await,
        OciVerb::Pause(args) => verbs::pause(global, args).await,
        OciVerb::Resume(args) => verbs::resume(global, args).await,
        OciVerb::Update(args) => update::run(global, args).await,
        OciVerb::Events(args) => events::run(global, args).await,
        OciVerb::Checkpoint(args) => checkpoint::run(global, args).await,
        OciVerb::Spec(args) => spec::run(args),
        OciVerb::Features => spec::features(),
    }?;
    Ok(ExitCode::SUCCESS)
}
