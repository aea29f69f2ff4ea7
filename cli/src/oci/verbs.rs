//! The short verbs: `start`, `kill`, `delete`, `pause`, `resume`, `state`, `list` and `ps`.

use std::{collections::HashMap, fs, path::Path, str::FromStr as _};

use clap::{Args, ValueEnum};
use machinen::fs::FileError;
use nix::sys::signal::Signal;
use serde::Serialize;
use serde_json::json;

use super::{
    client::{MonitorClient, status_of},
    create::{destroy, destroy_by_force},
    error::OciError,
    global::{GlobalArgs, default_root},
    state::{ContainerRecord, ContainerStatus, StateDir},
};
use crate::{
    everyday::top,
    find::{PodClient, PodSocket},
    output::{Align, TextTable},
};

/// A verb that takes nothing but a container.
#[derive(Debug, Args)]
pub(crate) struct IdArgs {
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// Arguments of `machinen kill`.
#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// Send the signal to all processes of the container
    #[arg(long, short)]
    all: bool,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
    /// The signal, as a number or a name
    #[arg(default_value = "SIGTERM")]
    signal: String,
}

/// Arguments of `machinen delete`.
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// Kill the container first if it has not ended; a container that does not exist is no error
    #[arg(long, short)]
    force: bool,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    Table,
    Json,
}

/// Arguments of `machinen list`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// How the containers are printed
    #[arg(long, short, value_enum, default_value_t = OutputFormat::Table)]
    format: OutputFormat,
    /// Print ids only
    #[arg(long, short)]
    quiet: bool,
}

/// Starts the command of a container that was created.
pub(super) async fn start(global: &GlobalArgs, args: &IdArgs) -> Result<(), OciError> {
    let state = StateDir::find(&global.root, &args.id)?;
    let stopped = || OciError::HasStopped { id: args.id.clone() };
    let monitor = MonitorClient::connect(&state).await?.ok_or_else(stopped)?;
    match monitor.status().await? {
        ContainerStatus::Running | ContainerStatus::Paused => {
            Err(OciError::AlreadyRunning { id: args.id.clone() })
        }
        ContainerStatus::Stopped => Err(stopped()),
        ContainerStatus::Created | ContainerStatus::Creating => monitor.start("").await.map(drop),
    }
}

/// Sends a signal to a container.
pub(super) async fn kill(global: &GlobalArgs, args: &KillArgs) -> Result<(), OciError> {
    let signal = signal_number(&args.signal)?;
    let state = StateDir::find(&global.root, &args.id)?;
    let monitor = MonitorClient::running(&state).await?;
    match monitor.status().await? {
        ContainerStatus::Stopped if args.all => Ok(()),
        status if signal == 0 && status != ContainerStatus::Stopped => Ok(()),
        status @ ContainerStatus::Stopped => Err(OciError::NotRunning { id: args.id.clone(), status }),
        ContainerStatus::Creating => monitor.kill("", signal, args.all).await,
        ContainerStatus::Created | ContainerStatus::Running | ContainerStatus::Paused => {
            monitor.kill_init(signal, args.all).await
        }
    }
}

/// The number of a signal; 0 only asks whether the container runs, as for kill(2).
fn signal_number(text: &str) -> Result<u32, OciError> {
    /// The last real-time signal (signal(7)).
    const LAST: u32 = 64;
    if let Ok(number @ 0..=LAST) = text.parse::<u32>() {
        return Ok(number);
    }
    let name = text.to_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    let signal = Signal::from_str(&name).map_err(|_| OciError::Signal { signal: text.to_owned() })?;
    Ok((signal as i32).cast_unsigned())
}

/// Deletes a container that has stopped, or any with `--force`.
pub(super) async fn delete(global: &GlobalArgs, args: &DeleteArgs) -> Result<(), OciError> {
    let state = match StateDir::find(&global.root, &args.id) {
        Err(OciError::NoContainer { .. }) if args.force => return Ok(()),
        found => found?,
    };
    if args.force {
        return destroy_by_force(&global.root, &state).await;
    }
    match status_of(&state).await? {
        // The init of a created container is killed, as runc does.
        ContainerStatus::Stopped | ContainerStatus::Created => destroy(&global.root, &state).await,
        status => Err(OciError::NotStopped { id: args.id.clone(), status }),
    }
}

/// Freezes a container.
pub(super) async fn pause(global: &GlobalArgs, args: &IdArgs) -> Result<(), OciError> {
    let state = StateDir::find(&global.root, &args.id)?;
    let monitor = MonitorClient::running(&state).await?;
    match monitor.status().await? {
        ContainerStatus::Running | ContainerStatus::Created => monitor.pause().await,
        status => Err(OciError::NotRunning { id: args.id.clone(), status }),
    }
}

/// Lets a frozen container continue.
pub(super) async fn resume(global: &GlobalArgs, args: &IdArgs) -> Result<(), OciError> {
    let state = StateDir::find(&global.root, &args.id)?;
    let monitor = MonitorClient::running(&state).await?;
    match monitor.status().await? {
        ContainerStatus::Paused => monitor.resume().await,
        status => Err(OciError::NotPaused { id: args.id.clone(), status }),
    }
}

/// Prints the state of a container (runtime-spec, runtime.md, "State").
pub(super) async fn state(global: &GlobalArgs, args: &IdArgs) -> Result<(), OciError> {
    let state = StateDir::find(&global.root, &args.id)?;
    let shown = Shown::of(&state).await?;
    println!("{}", serde_json::to_string_pretty(&shown.document()).map_err(OciError::Encode)?);
    Ok(())
}

/// Prints all containers.
pub(super) async fn list(global: &GlobalArgs, args: &ListArgs) -> Result<(), OciError> {
    // Without a container there is no default directory yet. Another one that does not exist is a mistake.
    if global.root != default_root() {
        fs::read_dir(&global.root).map_err(FileError::at("list", &global.root))?;
    }
    let mut all = Vec::new();
    for state in StateDir::all(&global.root)? {
        all.push(Shown::of(&state).await?);
    }
    if args.quiet {
        all.iter().for_each(|shown| println!("{}", shown.id));
        return Ok(());
    }
    if args.format == OutputFormat::Json {
        let documents: Vec<_> = all.iter().map(Shown::document).collect();
        println!("{}", serde_json::to_string(&documents).map_err(OciError::Encode)?);
        return Ok(());
    }
    let columns = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"];
    let mut table = TextTable::new(columns.map(|name| (name, Align::Left)));
    for Shown { id, pid, status, record } in all {
        let [bundle, created, owner] = match record {
            Some(record) => [record.bundle.display().to_string(), record.created, record.owner],
            None => Default::default(),
        };
        table.row([id, pid.to_string(), status.to_string(), bundle, created, owner]);
    }
    print!("{table}");
    Ok(())
}

/// A container as the verbs print it.
struct Shown {
    id: String,
    /// 0 if the container has stopped, or is being created.
    pid: u32,
    status: ContainerStatus,
    record: Option<ContainerRecord>,
}

impl Shown {
    async fn of(state: &StateDir) -> Result<Self, OciError> {
        let status = status_of(state).await?;
        let record = state.record()?;
        let stand_in = record.as_ref().and_then(|record| record.stand_in);
        let pid = stand_in.filter(|_| status != ContainerStatus::Stopped).map_or(0, |process| process.pid);
        Ok(Self { id: state.id.to_string(), pid, status, record })
    }

    fn document(&self) -> StateDocument<'_> {
        let Self { id, pid, status, record } = self;
        let record = record.as_ref();
        StateDocument {
            oci_version: record.map(|record| record.oci_version.as_str()),
            id,
            pid: *pid,
            status: *status,
            bundle: record.map(|record| record.bundle.as_path()),
            rootfs: record.map(|record| record.rootfs.as_path()),
            created: record.map(|record| record.created.as_str()),
            annotations: record.map(|record| &record.annotations).filter(|all| !all.is_empty()),
            owner: record.map(|record| record.owner.as_str()),
        }
    }
}

/// What `state` and `list` print, in the order of runc's, which scripts compare.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct StateDocument<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    oci_version: Option<&'a str>,
    id: &'a str,
    pid: u32,
    status: ContainerStatus,
    #[serde(skip_serializing_if = "Option::is_none")]
    bundle: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rootfs: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<&'a HashMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<&'a str>,
}

/// Arguments of `machinen ps`.
#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// How the processes are printed
    #[arg(long, short, value_enum, default_value_t = OutputFormat::Table)]
    format: OutputFormat,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
    /// Options of ps(1); a VM's processes are listed with fixed columns
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTION")]
    options: Vec<String>,
}

/// Prints the processes of a container, as its guest sees them.
pub(super) async fn ps(global: &GlobalArgs, args: &PsArgs) -> Result<(), OciError> {
    if !args.options.is_empty() {
        let reason = "the container's processes are in a VM, where no ps(1) of the host sees them";
        return Err(OciError::Unsupported { what: "an option of ps(1)", reason });
    }
    let state = StateDir::find(&global.root, &args.id)?;
    let Shown { pid, record, .. } = Shown::of(&state).await?;
    let listed = match record.filter(|_| pid != 0) {
        Some(record) => {
            let pod = PodClient::connect(&PodSocket(record.pod.socket()));
            let listed = async { pod?.processes(&args.id).await }.await;
            listed.map_err(|source| OciError::Inspection { source: Box::new(source) })?
        }
        // A container that has stopped has none, which is no error to runc.
        None => Default::default(),
    };
    match args.format {
        OutputFormat::Json => {
            println!("{}", json!(listed.processes.iter().map(|process| process.pid).collect::<Vec<_>>()));
        }
        OutputFormat::Table => print!("{}", top::table(&listed)),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_numbers_and_names() {
        for (text, number) in [("0", 0), ("9", 9), ("SIGKILL", 9), ("kill", 9), ("TERM", 15), ("34", 34)] {
            assert_eq!(signal_number(text).unwrap(), number, "{text}");
        }
        for text in ["65", "SIGNONE", "", "-9"] {
            let error = signal_number(text).unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
