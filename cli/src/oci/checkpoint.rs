//! `machinen checkpoint`: writes a checkpoint of a container to a directory.

use std::path::{Path, PathBuf};

use clap::Args;
use containerd_shim_protos::{api::CheckpointTaskRequest, shim::oci::CheckpointOptions};
use machinen::fs::FileError;
use protobuf::{Message as _, MessageField, well_known_types::any::Any};

use super::{
    client::MonitorClient,
    create::destroy,
    error::OciError,
    global::GlobalArgs,
    state::{ContainerStatus, StateDir},
};

/// runc's name of the options in containerd's registry of types.
const OPTIONS_TYPE: &str = "containerd.runc.v1.CheckpointOptions";

/// Arguments of `machinen checkpoint`.
#[derive(Debug, Args)]
pub(crate) struct CheckpointArgs {
    /// Directory for the checkpoint
    #[arg(long, value_name = "DIR", default_value = "checkpoint")]
    image_path: PathBuf,
    /// Directory for CRIU's log
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    /// Let the container continue
    #[arg(long)]
    leave_running: bool,
    #[command(flatten)]
    criu: CriuArgs,
    #[command(flatten)]
    unsupported: UnsupportedArgs,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// What both directions allow (criu(8)).
#[derive(Debug, Args)]
pub(super) struct CriuArgs {
    /// Allow established TCP connections
    #[arg(long)]
    tcp_established: bool,
    /// Allow Unix sockets whose peers are outside of the container
    #[arg(long)]
    ext_unix_sk: bool,
    /// Allow processes with a terminal from outside of the container
    #[arg(long)]
    shell_job: bool,
    /// Allow file locks
    #[arg(long)]
    file_locks: bool,
    /// soft, full, strict or ignore; a container in a VM always has cgroups of its own
    #[arg(long, value_name = "MODE", default_value = "soft")]
    manage_cgroups_mode: String,
    /// Kind of namespace whose content is not saved: network
    #[arg(long, value_name = "KIND")]
    empty_ns: Vec<String>,
}

/// Options of runc that are refused by name.
#[derive(Debug, Args)]
pub(super) struct UnsupportedArgs {
    #[arg(long, hide = true)]
    lazy_pages: bool,
    #[arg(long, hide = true)]
    pre_dump: bool,
    #[arg(long, hide = true)]
    page_server: Option<String>,
    #[arg(long, hide = true)]
    status_fd: Option<i32>,
    #[arg(long, hide = true)]
    parent_path: Option<PathBuf>,
    #[arg(long, hide = true)]
    auto_dedup: bool,
    #[arg(long, hide = true)]
    lsm_profile: Option<String>,
    #[arg(long, hide = true)]
    lsm_mount_context: Option<String>,
    #[arg(long, hide = true)]
    tcp_skip_in_flight: bool,
    // The guest's CRIU has it always.
    #[arg(long, hide = true)]
    link_remap: bool,
}

impl UnsupportedArgs {
    /// # Errors
    /// One of the options is given.
    pub(super) fn refuse(&self) -> Result<(), OciError> {
        let whole = "a checkpoint has the whole memory of the container";
        let labels = "guests have neither AppArmor nor SELinux";
        for (given, flag, reason) in [
            (self.lazy_pages, "--lazy-pages", "the memory is loaded before the container continues"),
            (self.pre_dump, "--pre-dump", whole),
            (self.page_server.is_some(), "--page-server", "the guest has no way to a page server"),
            (self.status_fd.is_some(), "--status-fd", "a VM cannot have the caller's descriptors"),
            (self.parent_path.is_some(), "--parent-path", whole),
            (self.auto_dedup, "--auto-dedup", whole),
            (self.tcp_skip_in_flight, "--tcp-skip-in-flight", "a connection that is being made is refused"),
            (self.lsm_profile.is_some(), "--lsm-profile", labels),
            (self.lsm_mount_context.is_some(), "--lsm-mount-context", labels),
        ] {
            if given {
                return Err(OciError::Unsupported { what: flag, reason });
            }
        }
        Ok(())
    }
}

/// Writes a checkpoint. Unless the container continues, it is deleted afterwards, as runc does.
pub(super) async fn run(global: &GlobalArgs, args: &CheckpointArgs) -> Result<(), OciError> {
    args.unsupported.refuse()?;
    let state = StateDir::find(&global.root, &args.id)?;
    let monitor = MonitorClient::running(&state).await?;
    match monitor.status().await? {
        ContainerStatus::Running | ContainerStatus::Paused => {}
        status => return Err(OciError::NotRunning { id: args.id.clone(), status }),
    }
    let options = CheckpointOptions {
        exit: !args.leave_running,
        open_tcp: args.criu.tcp_established,
        external_unix_sockets: args.criu.ext_unix_sk,
        terminal: args.criu.shell_job,
        file_locks: args.criu.file_locks,
        empty_namespaces: args.criu.empty_ns.clone(),
        cgroups_mode: args.criu.manage_cgroups_mode.clone(),
        work_path: args.work_path.as_deref().map(absolute).transpose()?.unwrap_or_default(),
        ..Default::default()
    };
    let options = Any {
        type_url: OPTIONS_TYPE.to_owned(),
        value: options.write_to_bytes().map_err(OciError::Decode)?,
        ..Default::default()
    };
    let request = CheckpointTaskRequest {
        path: absolute(&args.image_path)?,
        options: MessageField::some(options),
        ..Default::default()
    };
    monitor.checkpoint(request).await?;
    if args.leave_running {
        return Ok(());
    }
    monitor.wait("").await?;
    destroy(&global.root, &state).await
}

/// A path that means the same to the monitor, which works in another directory.
pub(super) fn absolute(path: &Path) -> Result<String, OciError> {
    let path = std::path::absolute(path).map_err(FileError::at("find", path))?;
    Ok(path.to_string_lossy().into_owned())
}
