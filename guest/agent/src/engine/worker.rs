//! One creation, in a process of its own.

use std::{fs, os::fd::OwnedFd, path::Path};

use libcontainer::{
    container::builder::ContainerBuilder, error::LibcontainerError, syscall::syscall::SyscallType,
};
use nix::{
    errno::Errno,
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        stat::{Mode, umask},
    },
    unistd::{getpid, setgroups},
};

use super::{
    executor::Command,
    log,
    report::{Message, Refusal, Reporter},
    zygote::Request,
};
use crate::{console, sys};

/// Open files of a container whose spec does not say: what init systems give to services.
const FILES_SOFT: u64 = 1024;
const FILES_HARD: u64 = 524_288;

#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error("cannot prepare the worker")]
    Prepare(#[source] Errno),
    #[error("cannot set the OOM score")]
    OomScore(#[source] std::io::Error),
    #[error("cannot use the root file system")]
    Rootfs(#[source] pathrs::error::Error),
    #[error("cannot create the working directory {cwd}")]
    Cwd { cwd: String, source: pathrs::error::Error },
    #[error(transparent)]
    Engine(#[from] LibcontainerError),
    #[error("the engine made a container without an init")]
    NoInit,
}

/// Makes the container and ends the process; the init that it leaves is the agent's child.
pub(super) fn run(request: &Request, reporter: &Reporter, stdio: [OwnedFd; 3]) -> ! {
    reporter.send(Message::Worker { pid: getpid().as_raw() });
    log::install(reporter.clone());
    match create(request, reporter, stdio) {
        Ok(pid) => reporter.send(Message::Created { pid }),
        Err(err) => {
            use LibcontainerError::{InvalidSpec, MissingSpec, Spec};
            if let WorkerError::Engine(InvalidSpec(_) | MissingSpec(_) | Spec(_)) = err {
                reporter.send(Message::Refused { refusal: Refusal::Spec, text: console::chain(&err) });
            }
            reporter.send(Message::Failed { text: without_wrappers(&console::chain(&err)).to_owned() });
        }
    }
    sys::exit_now(0)
}

fn create(request: &Request, reporter: &Reporter, stdio: [OwnedFd; 3]) -> Result<i32, WorkerError> {
    shed(request)?;
    let root = pathrs::Root::open(&request.rootfs).map_err(WorkerError::Rootfs)?;
    make_cwd(&root, &request.cwd)?;
    let command = Command::new(reporter.clone());
    let [stdin, stdout, stderr] = stdio;
    let container = ContainerBuilder::new(request.id.clone(), SyscallType::default())
        .with_root_path(&request.state)?
        .with_executor(command)
        .with_stdin(stdin)
        .with_stdout(stdout)
        .with_stderr(stderr)
        .as_init(&request.bundle)
        .with_systemd(false)
        .as_sibling(true)
        .build()?;
    container.pid().map(nix_0_29_pid).ok_or(WorkerError::NoInit)
}

/// The engine says "failed to create" once in every process that an error passes through.
fn without_wrappers(mut text: &str) -> &str {
    const WRAPPERS: [&str; 3] =
        ["failed to create container: ", "exec process failed with error ", "error in executing process : "];
    while let Some(rest) = WRAPPERS.iter().find_map(|wrapper| text.strip_prefix(wrapper)) {
        text = rest;
    }
    text
}

/// Gives up what a container must not inherit from the agent.
fn shed(request: &Request) -> Result<(), WorkerError> {
    setgroups(&[]).map_err(WorkerError::Prepare)?;
    umask(Mode::from_bits_truncate(0o022));
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(WorkerError::Prepare)?;
    setrlimit(Resource::RLIMIT_NOFILE, FILES_SOFT, hard.min(FILES_HARD)).map_err(WorkerError::Prepare)?;
    if request.keeps_oom_score {
        fs::write("/proc/self/oom_score_adj", "0").map_err(WorkerError::OomScore)?;
    }
    Ok(())
}

/// The working directory is made if the image lacks it, without leaving the root file system by its links.
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
    fn an_error_keeps_what_it_says() {
        let text = "failed to create container: exec process failed with error error in executing process : failed \
                    to prepare rootfs";
        assert_eq!(without_wrappers(text), "failed to prepare rootfs");
        assert_eq!(without_wrappers("no such luck"), "no such luck");
    }
}
