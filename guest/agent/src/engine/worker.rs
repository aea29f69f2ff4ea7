//! The creation of one container, in a process of its own.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use libcontainer::{
    container::builder::ContainerBuilder, error::LibcontainerError, syscall::syscall::SyscallType,
};
use machinen_protocol::error::chain;
use nix::{
    fcntl::{OFlag, open},
    sys::{socket::MsgFlags, stat::Mode},
    unistd::getpid,
};
use serde_json::Value;

use super::{
    executor::CommandExecutor,
    inherited, log,
    report::{Refusal, Report, Reporter},
    request::{Console, CreateRequest},
    terminal,
};
use crate::{
    stdio::{ProcessEnds, receive_fd},
    sys,
};

#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error("cannot prepare the worker")]
    Prepare(#[source] inherited::InheritedError),
    #[error("cannot pass the terminal on")]
    Terminal(#[source] io::Error),
    #[error("cannot use the root file system")]
    Rootfs(#[source] pathrs::error::Error),
    #[error("cannot open the namespaces that the container joins")]
    Namespaces(#[source] io::Error),
    #[error("cannot create the working directory {cwd}")]
    Cwd { cwd: String, source: pathrs::error::Error },
    #[error(transparent)]
    Engine(#[from] LibcontainerError),
    #[error("the engine has made a container without an init")]
    NoInit,
}

/// Creates the container and ends the process; the init becomes a child of the agent.
pub(super) fn run(request: &CreateRequest, reporter: &Reporter, ends: ProcessEnds) -> ! {
    reporter.send(Report::Worker { pid: getpid().as_raw() });
    log::install(reporter.clone());
    match create(request, reporter, ends) {
        Ok(pid) => reporter.send(Report::Created { pid }),
        Err(err) => {
            use LibcontainerError::{InvalidSpec, MissingSpec, Spec};
            if let WorkerError::Engine(InvalidSpec(_) | MissingSpec(_) | Spec(_)) = err {
                reporter.send(Report::Refused { refusal: Refusal::Spec, text: chain(&err) });
            }
            reporter.send(Report::Failed { text: without_wrappers(&chain(&err)).to_owned() });
        }
    }
    sys::exit_now(0)
}

fn create(request: &CreateRequest, reporter: &Reporter, ends: ProcessEnds) -> Result<i32, WorkerError> {
    inherited::give_up().map_err(WorkerError::Prepare)?;
    if request.keeps_oom_score {
        inherited::set_oom_score("0").map_err(WorkerError::Prepare)?;
    }
    let root = pathrs::Root::open(&request.rootfs).map_err(WorkerError::Rootfs)?;
    make_cwd(&root, &request.cwd)?;
    let _namespaces = hold_namespaces(&request.bundle).map_err(WorkerError::Namespaces)?;
    let mut builder = ContainerBuilder::new(request.id.clone(), SyscallType::default())
        .with_root_path(&request.state)?
        .with_executor(CommandExecutor::new(reporter.clone()));
    let mut relay = None;
    match ends {
        ProcessEnds::Files([stdin, stdout, stderr]) => {
            builder = builder.with_stdin(stdin).with_stdout(stdout).with_stderr(stderr);
        }
        ProcessEnds::Terminal(socket) => {
            let listening = TerminalRelay::listen(&request.bundle, socket).map_err(WorkerError::Terminal)?;
            builder = builder.with_console_socket(Some(&listening.path));
            relay = Some(listening);
        }
    }
    let container = builder.as_init(&request.bundle).with_systemd(false).as_sibling(true).build()?;
    if let Some(relay) = relay {
        relay.pass_on(request.console.unwrap_or_default()).map_err(WorkerError::Terminal)?;
    }
    container.pid().map(nix_0_29_pid).ok_or(WorkerError::NoInit)
}

/// Opens the namespaces that the configuration names by paths, and names them by the descriptors. libcontainer opens them
/// by their paths when it has joined a user namespace, in which it may not look into the agent's process any more.
fn hold_namespaces(bundle: &Path) -> io::Result<Vec<fs::File>> {
    let path = bundle.join("config.json");
    let mut spec: Value = serde_json::from_slice(&fs::read(&path)?)?;
    let mut held = Vec::new();
    for namespace in spec.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut).into_iter().flatten()
    {
        if let Some(path) = namespace["path"].as_str() {
            let file = fs::File::open(path)?;
            namespace["path"] = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
            held.push(file);
        }
    }
    if !held.is_empty() {
        fs::write(&path, serde_json::to_vec(&spec)?)?;
    }
    Ok(held)
}

/// libcontainer sends a terminal to a socket that it finds by its path, but the agent's socket has no path:
/// this passes the terminal on.
struct TerminalRelay {
    listener: UnixListener,
    path: PathBuf,
    socket: OwnedFd,
}

impl TerminalRelay {
    fn listen(dir: &Path, socket: OwnedFd) -> io::Result<Self> {
        const NAME: &str = "console.sock";
        // The address of a socket has at most 108 bytes, which a long container id exceeds.
        let short = open(dir, OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_DIRECTORY, Mode::empty())?;
        let listener = UnixListener::bind(format!("/proc/self/fd/{}/{NAME}", short.as_raw_fd()))?;
        Ok(Self { listener, path: dir.join(NAME), socket })
    }

    /// The container exists, so its terminal was sent.
    fn pass_on(self, console: Console) -> io::Result<()> {
        let (connection, _) = self.listener.accept()?;
        let master = receive_fd(connection.as_fd(), MsgFlags::empty())?;
        terminal::prepare(master.as_fd(), console)?;
        terminal::send(self.socket.as_fd(), master.as_fd())
    }
}

/// The engine repeats "failed to create" in every process that an error passes through.
fn without_wrappers(mut text: &str) -> &str {
    const WRAPPERS: [&str; 3] =
        ["failed to create container: ", "exec process failed with error ", "error in executing process : "];
    while let Some(rest) = WRAPPERS.iter().find_map(|wrapper| text.strip_prefix(wrapper)) {
        text = rest;
    }
    text
}

/// Creates the working directory if the image lacks it. Links do not lead out of the root file system.
fn make_cwd(root: &pathrs::Root, cwd: &Path) -> Result<(), WorkerError> {
    if root.resolve(cwd).is_ok() {
        return Ok(());
    }
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    root.mkdir_all(cwd, &mode)
        .map(drop)
        .map_err(|source| WorkerError::Cwd { cwd: cwd.display().to_string(), source })
}

/// libcontainer uses another version of the crate that wraps a pid.
fn nix_0_29_pid(pid: impl Into<libc::pid_t>) -> i32 {
    pid.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_its_own_text() {
        let text = "failed to create container: exec process failed with error error in executing process : failed \
                    to prepare rootfs";
        assert_eq!(without_wrappers(text), "failed to prepare rootfs");
        assert_eq!(without_wrappers("no wrapper"), "no wrapper");
    }
}
