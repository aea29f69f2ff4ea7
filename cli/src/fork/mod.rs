//! `machinen fork`: a second container that continues from where a running one is, through containerd's own
//! API.
//!
//! ```text
//!   look up SRC; is NEW unused; is memory left           nothing is changed yet, so a refusal costs nothing
//!   one fork of SRC at a time from here
//!   lease, snapshot of NEW, container NEW                the names are reserved
//!   (pause, if SRC writes to a disk of the snapshotter)
//!   checkpoint, SRC continues; its writes are copied     SRC is frozen no longer than CRIU needs
//!   (resume)                                             repeated if another client interferes
//!   others may fork SRC again
//!   task of NEW from the checkpoint, images removed, start
//! ```
//! Every step that makes something is recorded. If a later step fails or a signal arrives, the recorded steps
//! are undone in the opposite order, also after a restart of containerd.

mod capture;
mod checkpoint_dir;
mod containerd;
mod error;
mod network;
mod serving;
mod signals;
mod source;
mod spec;
mod steps;
mod undo;

pub(crate) use checkpoint_dir::left_over;

use std::path::PathBuf;

use clap::Args;
use machinen::config::Config;
use serde_json::json;

use self::{
    containerd::ContainerdClient,
    error::ForkError,
    network::NetworkChoice,
    spec::{TcpChoice, VolumesChoice},
};

/// Arguments of `machinen fork`.
#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    /// containerd's socket
    #[arg(long, short, env = "CONTAINERD_ADDRESS", default_value = "/run/containerd/containerd.sock")]
    address: PathBuf,
    /// containerd's namespace
    #[arg(long, short, env = "CONTAINERD_NAMESPACE", default_value = "default")]
    namespace: String,
    /// What happens to NEW's established TCP connections, which only one of both containers can continue
    #[arg(long, value_enum, default_value_t = TcpChoice::Close)]
    tcp: TcpChoice,
    /// What happens if SRC has writable volumes (bind mounts), whose files are not copied
    #[arg(long, value_enum, default_value_t = VolumesChoice::Refuse)]
    volumes: VolumesChoice,
    /// Start NEW before its memory is there, which is then loaded on demand
    #[arg(long)]
    lazy: bool,
    /// Keep the checkpoint in this directory, which must be empty or missing
    #[arg(long, alias = "bundle", value_name = "DIR")]
    checkpoint_dir: Option<PathBuf>,
    /// Hostname of NEW instead of its id
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Network namespace of NEW, by its path; "none" gives NEW a loopback interface only. A source with a network
    /// namespace requires it, since both containers cannot have the same
    #[arg(long, value_name = "PATH|none")]
    netns: Option<NetworkChoice>,
    /// Published ports of NEW, separated by commas; "none" publishes none. A source with published ports (annotation
    /// io.machinen.ports) requires it, since both containers cannot have the same
    #[arg(long, short, value_name = "PORTS|none", conflicts_with = "netns")]
    publish: Option<String>,
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
/// The container cannot be forked. SRC continues to run, and nothing of NEW is left.
pub(crate) fn run(args: &ForkArgs, config: &Config) -> Result<(), ForkError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let forked = runtime.map_err(ForkError::Start)?.block_on(async {
        let containerd = ContainerdClient::connect(&args.address, &args.namespace).await?;
        steps::fork(containerd, args, config).await
    })?;
    if args.json {
        let steps::Forked { pid, hostname, checkpoint_dir } = forked;
        let value = json!({
            "id": args.new, "source": args.source, "pid": pid, "hostname": hostname, "bundle": checkpoint_dir,
        });
        println!("{value:#}");
    } else {
        println!("{}", args.new);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    struct ForkCommandLine {
        #[command(flatten)]
        args: ForkArgs,
    }

    #[test]
    fn the_old_spelling_of_checkpoint_dir_still_works_and_is_hidden() {
        for option in ["--checkpoint-dir", "--bundle"] {
            let line = ForkCommandLine::try_parse_from(["fork", option, "/kept", "one", "two"]).unwrap();
            assert_eq!(line.args.checkpoint_dir.as_deref(), Some("/kept".as_ref()), "{option}");
        }
        let help = ForkCommandLine::command().render_long_help().to_string();
        assert!(help.contains("--checkpoint-dir <DIR>") && !help.contains("bundle"), "{help}");
    }
}
