//! The shim's log: lines in containerd's format, sent to containerd's log through the bundle's `log` fifo.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::Arc,
};

use machinen::{config::Config, fs::FileError};
use nix::fcntl::OFlag;
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use crate::error::ShimError;

/// Sends the log to `<bundle>/log`. If that fifo is missing (the shim was started by hand), there is no log.
///
/// # Errors
/// The configured level is unknown, or the fifo cannot be opened.
pub(crate) fn init(bundle: &Path, config: &Config, debug: bool) -> Result<(), ShimError> {
    let level: LevelFilter =
        config.log.level.parse().map_err(|_| ShimError::LogLevel { level: config.log.level.clone() })?;
    let level = if debug { level.max(LevelFilter::DEBUG) } else { level };
    let path = bundle.join("log");
    if !path.exists() {
        return Ok(());
    }
    let file = open(&path).map_err(FileError::at("open the log", path))?;
    let lines = tracing_logfmt::builder().with_target(false).layer().with_writer(Arc::new(file));
    // libcgroups warns at each use of each cgroup controller that the host does not have. What fails is an error.
    let levels = Targets::new().with_default(level).with_target("libcgroups", level.min(LevelFilter::ERROR));
    tracing_subscriber::registry().with(levels).with(lines).init();
    Ok(())
}

/// Opened for reading too, so that the fifo survives a restart of containerd, and without blocking, so that
/// lines are dropped while there is no reader.
fn open(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)
}
