//! `machinen run`: creates a container, starts it, and stays until it ends.

use std::process::ExitCode;

use clap::Args;

use super::{
    create::{Attachment, CreateArgs, CreatedContainer, create, destroy},
    error::OciError,
    foreground,
    global::GlobalArgs,
};

/// Arguments of `machinen run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    stay: StayArgs,
    #[command(flatten)]
    create: CreateArgs,
}

/// How long a verb stays that starts a container.
#[derive(Debug, Args)]
pub(crate) struct StayArgs {
    /// Go away when the container runs
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Do not delete the container when it has ended
    #[arg(long)]
    pub(crate) keep: bool,
    /// No effect: the container's processes have their parent in the VM
    #[arg(long)]
    pub(crate) no_subreaper: bool,
}

/// # Errors
/// The container cannot be created or started; nothing of it is left.
pub(crate) async fn run(global: &GlobalArgs, args: &RunArgs) -> Result<ExitCode, OciError> {
    let attachment = Attachment::of(args.create.console_socket.as_deref(), args.stay.detach);
    let created = create(global, &args.create, attachment, None).await?;
    proceed(global, created, &args.stay).await
}

/// Starts a container that was created or restored, and stays until it has ended unless that is not wanted.
///
/// # Errors
/// The container cannot be started; nothing of it is left.
pub(crate) async fn proceed(
    global: &GlobalArgs,
    created: CreatedContainer,
    stay: &StayArgs,
) -> Result<ExitCode, OciError> {
    let StayArgs { detach, keep, .. } = *stay;
    let CreatedContainer { state, monitor, relay } = created;
    let ended = match detach {
        true => monitor.start("").await.map(|_| 0),
        false => foreground::follow(&monitor, "", relay, async || monitor.start("").await.map(drop)).await,
    };
    if ended.is_err() || !(detach || keep) {
        destroy(&global.root, &state).await?;
    }
    ended.map(foreground::exit_code)
}
