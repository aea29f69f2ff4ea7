//! `machinen restore`: makes a container that continues from a checkpoint.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use machinen::fs::FileError;

use super::{
    checkpoint::{CriuArgs, UnsupportedArgs},
    create::{Attachment, CreateArgs, create},
    error::OciError,
    global::GlobalArgs,
    run::{StayArgs, proceed},
};

/// Arguments of `machinen restore`.
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// Directory with the checkpoint
    #[arg(long, value_name = "DIR", default_value = "checkpoint")]
    image_path: PathBuf,
    /// No effect: CRIU's log goes to the log of the container
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    #[command(flatten)]
    stay: StayArgs,
    // The manifest of a checkpoint says what it needs, so these have been decided.
    #[command(flatten)]
    criu: CriuArgs,
    #[command(flatten)]
    unsupported: UnsupportedArgs,
    #[command(flatten)]
    create: CreateArgs,
}

/// # Errors
/// The container cannot be restored; nothing of it is left.
pub(super) async fn run(global: &GlobalArgs, args: &RestoreArgs) -> Result<ExitCode, OciError> {
    args.unsupported.refuse()?;
    let attachment = Attachment::of(args.create.console_socket.as_deref(), args.stay.detach);
    let image = args.image_path.canonicalize().map_err(FileError::at("find", &args.image_path))?;
    let created = create(global, &args.create, attachment, Some(&image)).await?;
    proceed(global, created, &args.stay).await
}
