//! `machinen exec`: runs a further process in a container.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;
use containerd_shim_protos::api::ExecProcessRequest;
use machinen::{fs::FileError, spec::bundle};
use protobuf::{MessageField, well_known_types::any::Any};
use serde_json::{Value, json};

use super::{
    client::MonitorClient,
    create::{Attachment, refuse_descriptors, write_pid_file},
    error::OciError,
    foreground,
    global::GlobalArgs,
    stand_in::StandIn,
    state::{ContainerRecord, ContainerStatus, StateDir},
};
use crate::find::{PodClient, PodSocket};

/// The name of the runtime-spec's process in containerd's registry of types.
pub(crate) const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// The exit code if the process could not be started, as runc's.
const NOT_STARTED: u8 = 255;

/// Arguments of `machinen exec`.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// Unix socket that receives the process's terminal
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// Variable of the environment, in addition to the container's
    #[arg(long, short, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Give the process a terminal
    #[arg(long, short)]
    tty: bool,
    /// User, by numbers
    #[arg(long, short, value_name = "UID[:GID]")]
    user: Option<String>,
    /// Additional group of the process, by its number
    #[arg(long, short = 'g', value_name = "GID", value_delimiter = ',')]
    additional_gids: Vec<u32>,
    /// File with the OCI process, in JSON, instead of a command
    #[arg(long, short, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Go away when the process has started
    #[arg(long, short)]
    detach: bool,
    /// File that gets the pid of the process that stands for the new one on the host
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Unix socket that receives a descriptor of the process that stands for the new one (pidfd_open(2))
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// AppArmor profile; guests have none
    #[arg(long, value_name = "PROFILE", hide = true)]
    apparmor: Option<String>,
    /// SELinux label; guests have none
    #[arg(long, value_name = "LABEL", hide = true)]
    process_label: Option<String>,
    /// Keep the process from getting further privileges
    #[arg(long)]
    no_new_privs: bool,
    /// Capability in addition to those of the container
    #[arg(long, short, value_name = "CAP")]
    cap: Vec<String>,
    /// Number of further descriptors for the process; a VM cannot have any
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    /// Cgroup below the container's, which is not supported
    #[arg(long, value_name = "PATH", hide = true)]
    cgroup: Vec<String>,
    /// If the container is paused, wait until it is resumed instead of failing
    #[arg(long)]
    ignore_paused: bool,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// # Errors
/// The process cannot be described. One that cannot be started is reported on stderr, with exit code 255.
pub(super) async fn run(global: &GlobalArgs, args: &ExecArgs) -> Result<ExitCode, OciError> {
    match exec(global, args).await {
        Ok(status) => Ok(foreground::exit_code(status)),
        Err(error) => {
            global.report(&OciError::Exec(Box::new(error)).into());
            Ok(ExitCode::from(NOT_STARTED))
        }
    }
}

async fn exec(global: &GlobalArgs, args: &ExecArgs) -> Result<u32, OciError> {
    refuse_descriptors(args.preserve_fds)?;
    if !args.cgroup.is_empty() {
        let reason = "an added process is in the cgroup of its container";
        return Err(OciError::Unsupported { what: "--cgroup", reason });
    }
    let state = StateDir::find(&global.root, &args.id)?;
    let record = state.record()?.ok_or_else(|| OciError::NoContainer { id: args.id.clone() })?;
    let monitor = running(&state, &record, args).await?;
    let process = match &args.process {
        Some(file) => read_process(file)?,
        None => described(&record, args)?,
    };
    let terminal = args.tty || process["terminal"].as_bool().unwrap_or(false);
    let attachment = Attachment::of(args.console_socket.as_deref(), args.detach);
    let size = &process["consoleSize"];
    let size = size["width"].as_u64().zip(size["height"].as_u64());
    let (streams, relay) = attachment.streams(terminal, size)?;
    // A process has one pid at a time, and starts one process in a container.
    let exec = format!("cli-{}", std::process::id());
    let stand_in = StandIn::start(&state.id, &record.pod, &exec, streams)?;
    let request = ExecProcessRequest {
        exec_id: exec.clone(),
        terminal,
        stdin: stand_in.stream(0),
        stdout: stand_in.stream(1),
        stderr: if terminal { String::new() } else { stand_in.stream(2) },
        spec: MessageField::some(Any {
            type_url: PROCESS_TYPE.to_owned(),
            value: serde_json::to_vec(&process).map_err(OciError::Encode)?,
            ..Default::default()
        }),
        ..Default::default()
    };
    monitor.exec(request).await?;
    let start = async || {
        let started = monitor.start(&exec).await;
        if started.is_err() {
            monitor.delete(&exec).await?;
        }
        let anchor = started?;
        write_pid_file(args.pid_file.as_deref(), stand_in.process)?;
        stand_in.send_pidfd(args.pidfd_socket.as_deref())?;
        stand_in.go(anchor)
    };
    match args.detach {
        true => start().await.map(|()| 0),
        false => foreground::follow(&monitor, &exec, relay, start).await,
    }
}

/// The monitor of a container to which a process can be added. That of a paused container is waited for if the caller
/// ignores the pause: a process that is added to it by runc does not run before the container is resumed, either.
async fn running(
    state: &StateDir,
    record: &ContainerRecord,
    args: &ExecArgs,
) -> Result<MonitorClient, OciError> {
    let stopped = |status| OciError::ExecInStopped { id: args.id.clone(), status };
    let monitor = MonitorClient::of_pod(&state.id, &record.pod)?;
    let monitor = monitor.ok_or_else(|| stopped(ContainerStatus::Stopped))?;
    loop {
        match monitor.status().await? {
            ContainerStatus::Running | ContainerStatus::Created => return Ok(monitor),
            ContainerStatus::Paused if args.ignore_paused => {
                let pod = PodClient::connect(&PodSocket(record.pod.socket()));
                let waited = async { pod?.not_paused(&args.id).await }.await;
                waited.map_err(|source| OciError::Inspection { source: Box::new(source) })?;
            }
            ContainerStatus::Paused => return Err(OciError::ExecInPaused { id: args.id.clone() }),
            status => return Err(stopped(status)),
        }
    }
}

fn read_process(path: &Path) -> Result<Value, OciError> {
    let text = fs::read(path).map_err(FileError::at("read", path))?;
    serde_json::from_slice(&text).map_err(|source| OciError::Json { path: path.to_owned(), source })
}

/// The process that the options describe: that of the container, with another command.
fn described(record: &ContainerRecord, args: &ExecArgs) -> Result<Value, OciError> {
    if args.command.is_empty() {
        return Err(OciError::NoCommand);
    }
    let spec = bundle::load(&record.bundle)?;
    let mut process = serde_json::to_value(spec.process()).map_err(OciError::Encode)?;
    process["args"] = json!(args.command);
    process["terminal"] = json!(args.tty);
    if let Some(cwd) = &args.cwd {
        process["cwd"] = json!(cwd);
    }
    if args.no_new_privs {
        process["noNewPrivileges"] = json!(true);
    }
    extend(&mut process["env"], &args.env);
    if let Some(user) = &args.user {
        let numbers = user.split_once(':').map_or((user.as_str(), "0"), |(uid, gid)| (uid, gid));
        let parsed = numbers.0.parse::<u32>().ok().zip(numbers.1.parse::<u32>().ok());
        let wrong = || OciError::Argument { what: "--user", text: user.clone(), takes: "UID or UID:GID" };
        let (uid, gid) = parsed.ok_or_else(wrong)?;
        process["user"]["uid"] = json!(uid);
        process["user"]["gid"] = json!(gid);
    }
    if !args.additional_gids.is_empty() {
        process["user"]["additionalGids"] = json!(args.additional_gids);
    }
    add_capabilities(&mut process["capabilities"], &args.cap);
    Ok(process)
}

/// Adds capabilities as runc does: no inheritable ones, and ambient ones only where the container has them as inheritable.
fn add_capabilities(sets: &mut Value, added: &[String]) {
    if added.is_empty() {
        return;
    }
    for set in ["bounding", "effective", "permitted"] {
        extend(&mut sets[set], added);
    }
    let inheritable = sets["inheritable"].as_array().cloned().unwrap_or_default();
    let ambient = added.iter().filter(|name| inheritable.iter().any(|it| it == name.as_str()));
    let ambient: Vec<_> = ambient.cloned().collect();
    if !ambient.is_empty() {
        extend(&mut sets["ambient"], &ambient);
    }
}

/// Adds texts to a list, which may be absent.
fn extend(list: &mut Value, texts: &[String]) {
    let mut all = list.as_array().cloned().unwrap_or_default();
    all.extend(texts.iter().map(|text| json!(text)));
    *list = json!(all);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn added_capabilities_are_ambient_only_if_they_are_inheritable() {
        let mut sets = json!({ "bounding": ["CAP_A"], "inheritable": ["CAP_B"] });
        add_capabilities(&mut sets, &["CAP_B".to_owned(), "CAP_C".to_owned()]);
        let added = json!(["CAP_B", "CAP_C"]);
        let expected = json!({
            "bounding": ["CAP_A", "CAP_B", "CAP_C"], "effective": added, "permitted": added,
            "inheritable": ["CAP_B"], "ambient": ["CAP_B"],
        });
        assert_eq!(sets, expected);
        add_capabilities(&mut sets, &[]);
        assert_eq!(sets, expected);
    }
}
