//! `machinen fork`: a second container that continues from where a running one is, through containerd's own API.
//!
//! ```text
//!   look up SRC; NEW is free; memory for one more VM     nothing touched yet: refusals cost nothing
//!   one fork of SRC at a time from here
//!   lease, snapshot of NEW, container NEW                the names are taken
//!   (a disk of the snapshotter's: pause)
//!   checkpoint, SRC continues; its writes are copied     SRC is frozen no longer than CRIU needs
//!   (resume)                                             again, if another client has disturbed it
//!   others may fork SRC again
//!   task of NEW from the checkpoint, images removed, start
//! ```
//! What has been made is noted in order and taken back in the opposite one, if a later step fails or a signal comes, after a
//! restart of containerd too.

mod capture;
mod checkpoint_dir;
mod containerd;
mod error;
mod serving;
mod signals;
mod source;
mod spec;
mod steps;
mod undo;

use std::path::PathBuf;

use clap::Args;
use machinen::config::Config;
use serde_json::json;

use self::{containerd::ContainerdClient, error::ForkError, spec::TcpChoice};

/// Arguments of `machinen fork`.
#[derive(Debug, Args)]
pub struct ForkArgs {
    /// containerd's socket
    #[arg(long, short, env = "CONTAINERD_ADDRESS", default_value = "/run/containerd/containerd.sock")]
    address: PathBuf,
    /// containerd's namespace
    #[arg(long, short, env = "CONTAINERD_NAMESPACE", default_value = "default")]
    namespace: String,
    /// What NEW's established TCP connections become: both ends of one cannot go on twice
    #[arg(long, value_enum, default_value_t = TcpChoice::Close)]
    tcp: TcpChoice,
    /// NEW runs before its memory is there, and fetches it
    #[arg(long)]
    lazy: bool,
    /// Keep the checkpoint in this directory, which is made unless it is there and empty
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Hostname of NEW instead of its id
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Id of the container to fork, which runs or is paused
    #[arg(value_name = "SRC")]
    source: String,
    /// Id of the container to make
    new: String,
}

/// Forks a container; prints the new one's id on stdout and progress on stderr.
///
/// # Errors
/// It cannot be forked. SRC runs on, and nothing of NEW is left.
pub fn run(args: &ForkArgs, config: &Config) -> Result<(), ForkError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let forked = runtime.map_err(ForkError::Start)?.block_on(async {
        let containerd = ContainerdClient::connect(&args.address, &args.namespace).await?;
        steps::fork(containerd, args, config).await
    })?;
    if args.json {
        let steps::Forked { pid, hostname, bundle } = forked;
        let value = json!({
            "id": args.new, "source": args.source, "pid": pid, "hostname": hostname, "bundle": bundle,
        });
        println!("{value:#}");
    } else {
        println!("{}", args.new);
    }
    Ok(())
}
