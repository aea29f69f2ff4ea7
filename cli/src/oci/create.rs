//! `machinen create`, and what it shares with `run` and `restore`: a container whose init waits in its VM.

use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use clap::Args;
use containerd_shim_protos::api::{CreateTaskRequest, Mount};
use machinen::{
    config::Config,
    error::chain,
    fs::{FileError, remove_dir_if_exists},
    pod::ContainerId,
    spec::{OCI_VERSION, bundle},
};
use oci_spec::runtime::Spec;

use super::{
    client::MonitorClient,
    console::{Console, Relay, set_size},
    error::OciError,
    global::GlobalArgs,
    monitor,
    pod::{PodDir, PodRecord},
    stand_in::{StandIn, StandInStreams},
    state::{ContainerRecord, HostProcess, StateDir},
};

const NO_DESCRIPTORS: &str = "a process in a VM cannot have the caller's descriptors";

/// Options of the verbs that make a container.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Directory with config.json
    #[arg(long, short, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Unix socket that receives the process's terminal
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// File that gets the pid of the process that stands for the container on the host
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Unix socket that receives a descriptor of the process that stands for the container (pidfd_open(2))
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// Number of further descriptors for the process; a VM cannot have any
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    /// No effect: the guest makes the container's root as it must
    #[arg(long)]
    no_pivot: bool,
    /// No effect: the guest has its own keyrings
    #[arg(long)]
    no_new_keyring: bool,
    /// Id of the container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    #[arg(skip)]
    pub(crate) boot: Option<BootedRootfs>,
}

/// What `machinen boot` adds to a bundle that it has made.
#[derive(Debug, Clone)]
pub(crate) struct BootedRootfs {
    /// What the root file system is made of. The bundle is removed with the container.
    pub(crate) mount: Mount,
}

impl CreateArgs {
    /// The container's id.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// The directory with `config.json`.
    pub(crate) fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// Those of a container whose bundle was made for it alone.
    pub(crate) fn of_boot(id: String, bundle: PathBuf, boot: BootedRootfs) -> Self {
        Self {
            bundle,
            console_socket: None,
            pid_file: None,
            pidfd_socket: None,
            preserve_fds: 0,
            no_pivot: false,
            no_new_keyring: false,
            id,
            boot: Some(boot),
        }
    }
}

/// A container whose init waits in its VM.
pub(crate) struct CreatedContainer {
    pub(crate) state: StateDir,
    pub(crate) monitor: MonitorClient,
    /// The terminal of a process that stays in the foreground.
    pub(crate) relay: Option<Relay>,
}

/// What the terminal of a process is connected with.
#[derive(Debug)]
pub(crate) enum Attachment<'a> {
    /// The caller's socket, which gets the terminal.
    Socket(&'a Path),
    /// The streams of this process.
    Foreground,
    /// Neither.
    Detached,
    /// Streams that another process keeps.
    Kept(StandInStreams),
}

impl<'a> Attachment<'a> {
    pub(crate) fn of(console_socket: Option<&'a Path>, detach: bool) -> Self {
        match console_socket {
            Some(socket) => Self::Socket(socket),
            None if detach => Self::Detached,
            None => Self::Foreground,
        }
    }

    /// The streams of a process's stand-in.
    ///
    /// # Errors
    /// A terminal has nothing that it could be connected with, or the reverse.
    pub(crate) fn streams(
        self,
        terminal: bool,
        size: Option<(u64, u64)>,
    ) -> Result<(StandInStreams, Option<Relay>), OciError> {
        if let Self::Kept(streams) = self {
            return Ok((streams, None));
        }
        if !terminal {
            return match self {
                Self::Socket(_) => Err(OciError::NoTerminal),
                _ => Ok((StandInStreams::Inherited, None)),
            };
        }
        let open = || {
            let console = Console::open()?;
            if let Some((width, height)) = size {
                set_size(&console, width, height);
            }
            Ok::<_, OciError>(console)
        };
        match self {
            Self::Socket(socket) => Ok((StandInStreams::Terminal(open()?.send_to(socket)?), None)),
            Self::Foreground => {
                let (relay, slave) = open()?.relay()?;
                Ok((StandInStreams::Terminal(slave), Some(relay)))
            }
            Self::Detached | Self::Kept(_) => Err(OciError::NoConsoleSocket),
        }
    }
}

/// Creates a container and goes away.
///
/// # Errors
/// The container cannot be created; nothing of it is left.
pub(crate) async fn run(global: &GlobalArgs, args: &CreateArgs) -> Result<(), OciError> {
    let attachment = Attachment::of(args.console_socket.as_deref(), true);
    create(global, args, attachment, None).await.map(drop)
}

/// Creates a container, or restores it from the checkpoint in a directory.
///
/// # Errors
/// The container cannot be created; nothing of it is left.
pub(crate) async fn create(
    global: &GlobalArgs,
    args: &CreateArgs,
    attachment: Attachment<'_>,
    checkpoint: Option<&Path>,
) -> Result<CreatedContainer, OciError> {
    refuse_descriptors(args.preserve_fds)?;
    refuse_activation(|name| std::env::var(name).ok())?;
    // The monitor reads it again, and cannot report an error as well.
    Config::load()?;
    let id = ContainerId::parse(&args.id)?;
    let bundle = args.bundle.canonicalize().map_err(FileError::at("find the bundle", &args.bundle))?;
    let spec = bundle::load(&bundle)?;
    let state = StateDir::reserve(&global.root, id)?;
    let made = create_in(&state, &bundle, &spec, (global, args), attachment, checkpoint).await;
    match made {
        Ok((monitor, relay)) => Ok(CreatedContainer { state, monitor, relay }),
        Err(error) => {
            // The first failure is the one to report.
            if let Err(left) = destroy(&global.root, &state).await {
                eprintln!("machinen: {}", chain(&left));
            }
            Err(error)
        }
    }
}

/// # Errors
/// The caller wants the process to have descriptors of its own.
pub(super) fn refuse_descriptors(count: u32) -> Result<(), OciError> {
    match count {
        0 => Ok(()),
        _ => Err(OciError::Unsupported { what: "--preserve-fds", reason: NO_DESCRIPTORS }),
    }
}

/// runc passes the sockets that systemd has opened for it (sd_listen_fds(3)) on to the container.
///
/// # Errors
/// There are such sockets.
fn refuse_activation(variable: impl Fn(&str) -> Option<String>) -> Result<(), OciError> {
    let number = |name| variable(name).and_then(|text| text.parse::<u32>().ok());
    let is_meant = number("LISTEN_PID") == Some(std::process::id());
    if is_meant && number("LISTEN_FDS").is_some_and(|count| count > 0) {
        return Err(OciError::Unsupported { what: "socket activation (LISTEN_FDS)", reason: NO_DESCRIPTORS });
    }
    Ok(())
}

async fn create_in(
    state: &StateDir,
    bundle: &Path,
    spec: &Spec,
    (global, args): (&GlobalArgs, &CreateArgs),
    attachment: Attachment<'_>,
    checkpoint: Option<&Path>,
) -> Result<(MonitorClient, Option<Relay>), OciError> {
    let process = spec.process().as_ref();
    let terminal = process.and_then(|process| process.terminal()).unwrap_or(false);
    let size = process.and_then(|process| process.console_size()).map(|size| (size.width(), size.height()));
    let pod = enter_pod(state, bundle, spec, (global, args))?;
    let mut record = ContainerRecord::new(state, bundle, spec, pod);
    record.own_bundle = args.boot.is_some();
    let (streams, relay) = attachment.streams(terminal, size)?;
    let stand_in = StandIn::start(&state.id, &record.pod, "", streams)?;
    let client = MonitorClient::running(state).await?;
    let request = CreateTaskRequest {
        bundle: bundle.to_string_lossy().into_owned(),
        terminal,
        stdin: stand_in.stream(0),
        stdout: stand_in.stream(1),
        stderr: if terminal { String::new() } else { stand_in.stream(2) },
        rootfs: args.boot.iter().map(|boot| boot.mount.clone()).collect(),
        checkpoint: checkpoint.map(|dir| dir.to_string_lossy().into_owned()).unwrap_or_default(),
        ..Default::default()
    };
    let anchor = client.create(request).await?;
    record.stand_in = Some(stand_in.process);
    state.save(&record)?;
    write_pid_file(args.pid_file.as_deref(), stand_in.process)?;
    stand_in.send_pidfd(args.pidfd_socket.as_deref())?;
    stand_in.go(anchor)?;
    Ok((client, relay))
}

/// Finds the pod that the container belongs to, or makes one with a monitor. The container's record names the pod from
/// then on.
fn enter_pod(
    state: &StateDir,
    bundle: &Path,
    spec: &Spec,
    (global, args): (&GlobalArgs, &CreateArgs),
) -> Result<PodDir, OciError> {
    let record = |pod| {
        let own_bundle = args.boot.is_some();
        ContainerRecord { own_bundle, ..ContainerRecord::new(state, bundle, spec, pod) }
    };
    if let Some(pod) = PodDir::of_other(&global.root, &state.id, spec)? {
        let _locked = pod.lock()?;
        state.save(&record(pod.clone()))?;
        return Ok(pod);
    }
    let pod = PodDir::create(&global.root)?;
    let _locked = pod.lock()?;
    state.save(&record(pod.clone()))?;
    let monitor = monitor::start(&state.id, &pod, &global.log)?;
    pod.save(&PodRecord { monitor, bundle: bundle.to_owned() })?;
    Ok(pod)
}

impl ContainerRecord {
    fn new(state: &StateDir, bundle: &Path, spec: &Spec, pod: PodDir) -> Self {
        let rootfs = spec.root().as_ref().map(|root| bundle.join(root.path())).unwrap_or_default();
        let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten();
        Self {
            oci_version: OCI_VERSION.to_owned(),
            id: state.id.to_string(),
            stand_in: None,
            pod,
            bundle: bundle.to_owned(),
            rootfs,
            created: humantime::format_rfc3339_nanos(SystemTime::now()).to_string(),
            owner: user.map(|user| user.name).unwrap_or_default(),
            annotations: spec.annotations().clone().unwrap_or_default(),
            own_bundle: false,
        }
    }
}

/// Writes the pid of a stand-in to the file that the caller has named, which is complete when it appears.
///
/// # Errors
/// The file cannot be written.
pub(crate) fn write_pid_file(path: Option<&Path>, process: HostProcess) -> Result<(), OciError> {
    let Some(path) = path else { return Ok(()) };
    let failed = || FileError::at("write the pid file", path);
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    fs::write(&name, process.pid.to_string()).map_err(failed())?;
    Ok(fs::rename(&name, path).map_err(failed())?)
}

/// Ends whatever exists of a container, by force, and removes its directory. Its pod ends with its last container.
///
/// # Errors
/// A part of it cannot be removed.
pub(crate) async fn destroy(root: &Path, state: &StateDir) -> Result<(), OciError> {
    let Some(record) = state.record()? else { return state.remove() };
    let monitor = MonitorClient::of_pod(&state.id, &record.pod)?;
    if let Some(monitor) = &monitor {
        match monitor.delete("").await {
            Ok(()) => {}
            // The end of the monitor ends the container, too.
            Err(error) if is_alone(root, state, &record.pod)? => {
                tracing::debug!("not deleted by its monitor: {}", chain(&error));
            }
            Err(error) => return Err(error),
        }
    }
    if !record.pod.path.exists() {
        return remove(state, &record);
    }
    let _locked = record.pod.lock()?;
    if is_alone(root, state, &record.pod)? {
        if let Some(monitor) = &monitor {
            monitor.shut_down().await;
        }
        record.pod.remove().await?;
    }
    remove(state, &record)
}

/// Kills a container that has not ended, and removes it as [`destroy`] does.
///
/// # Errors
/// A part of it cannot be removed.
pub(crate) async fn destroy_by_force(root: &Path, state: &StateDir) -> Result<(), OciError> {
    if let Some(monitor) = MonitorClient::connect(state).await? {
        // A container that has ended refuses the signal. One that does not end by it ends with its monitor.
        if monitor.kill("", libc::SIGKILL.cast_unsigned(), false).await.is_ok() {
            monitor.wait("").await?;
        }
    }
    destroy(root, state).await
}

/// Frees the id, after the bundle if it was made for the container.
fn remove(state: &StateDir, record: &ContainerRecord) -> Result<(), OciError> {
    if record.own_bundle {
        remove_dir_if_exists(&record.bundle).map_err(FileError::at("remove", &record.bundle))?;
    }
    state.remove()
}

/// Whether no other container is in the pod.
fn is_alone(root: &Path, state: &StateDir, pod: &PodDir) -> Result<bool, OciError> {
    for other in StateDir::all(root)?.into_iter().filter(|other| other.id != state.id) {
        if other.record()?.is_some_and(|record| record.pod == *pod) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_systemd_are_refused_if_they_are_meant_for_this_process() {
        let own = std::process::id();
        let refused = |pid: u32, count: &str| {
            refuse_activation(|name| match name {
                "LISTEN_PID" => Some(pid.to_string()),
                "LISTEN_FDS" => Some(count.to_owned()),
                _ => None,
            })
        };
        let error = refused(own, "1").unwrap_err().to_string();
        assert!(error.contains("LISTEN_FDS"), "{error}");
        refused(own, "0").unwrap();
        refused(own + 1, "1").unwrap();
        refuse_activation(|_| None).unwrap();
    }
}
