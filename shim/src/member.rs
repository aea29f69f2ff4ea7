//! A member of the warm pool: a server that waits for its work, with a VM that is ready.

use std::{env, fs, io};

use machinen::{
    config::Config,
    fs::FileError,
    pool::{Member, SLOT_FD},
    sys,
};

use crate::{
    error::ShimError,
    logging,
    server::{self, ServerParams},
    start::PID_FILE,
};

/// Becomes the member of the slot `number`, and then the server of the container that takes it.
///
/// # Errors
/// The clone cannot be made, or, after the member was taken, the same as for any server.
pub(crate) fn run(args: &[String]) -> Result<(), ShimError> {
    // This comes before other descriptors are opened.
    let slot = sys::inherit::take(SLOT_FD).map_err(|_| ShimError::NoSlot)?;
    let number = args.first().and_then(|number| number.parse().ok()).ok_or(ShimError::NoSlot)?;
    let request = serde_json::from_reader(io::stdin().lock()).map_err(ShimError::Json)?;
    let config = Config::load()?;
    let runtime = server::event_loop(".".as_ref())?;
    let result = runtime.block_on(async {
        let Some(member) = Member::join(&config, number, slot, request).await? else { return Ok(()) };
        let Some(taken) = member.taken().await? else { return Ok(()) };
        let work: ServerParams = serde_json::from_slice(&taken.message).map_err(ShimError::Json)?;
        // `delete` expects the server in this directory, and the answer to the start follows below.
        env::set_current_dir(&work.bundle).map_err(FileError::at("enter the bundle", &work.bundle))?;
        logging::init(&work.bundle, &config, work.debug)?;
        let pid_file = work.bundle.join(PID_FILE);
        fs::write(&pid_file, std::process::id().to_string()).map_err(FileError::at("write", pid_file))?;
        let (listener, warm_vm) = taken.accept().await?;
        tracing::debug!(id = work.id, "taken from the warm pool");
        server::serve(work, config, listener, Some(warm_vm)).await
    });
    runtime.shutdown_background();
    result
}
