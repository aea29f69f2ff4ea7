//! Runs one hook on the host: with the container's state on its stdin, a bounded time, and a bounded part of its errors.
//!
//! A hook is a program of the operator, so it has this process's rights, user and limits, as one of runc's has. It gets
//! no variable of this process's environment and no descriptor but its standard streams, and runs in a process group of
//! its own, which is killed as a whole.

use std::{
    fs::File,
    io::{self, Seek as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use machinen_base::{
    fs::FileError,
    memfd,
    process::{Child, Jail, Namespaces, Spawn, Stdio},
};
use oci_spec::runtime::Hook;
use tokio::{net::unix::pipe, time::timeout};

use super::{HookFailure, output::HookErrors};

/// The namespaces of a container's anchor in which its createContainer hooks run.
const CONTAINER_NAMESPACES: [&str; 3] = ["net", "ipc", "uts"];

/// Where a hook runs.
#[derive(Debug, Clone, Copy)]
pub(super) struct HookPlace<'a> {
    /// The working directory, which is the container's bundle as for runc's hooks.
    pub(super) dir: &'a Path,
    /// The cgroups; if empty, those of this process.
    pub(super) cgroups: &'a [PathBuf],
    /// The process whose namespaces the hook joins. What the hook mounts then is seen by the hook only.
    pub(super) namespaces_of: Option<u32>,
}

/// Runs a hook to its end.
///
/// # Errors
/// The hook cannot be started, has not ended within `limit`, or has ended without success.
pub(super) async fn execute(
    hook: &Hook,
    place: &HookPlace<'_>,
    state: &[u8],
    limit: Duration,
) -> Result<(), HookFailure> {
    let (child, mut errors) = start(hook, place, state)?;
    let ended = timeout(limit, async {
        tokio::select! {
            biased;
            exit = child.exited() => Ok(exit),
            error = errors.follow() => Err(HookFailure::Streams(error)),
        }
    })
    .await;
    match ended {
        Ok(Ok(exit)) if exit.success() => Ok(()),
        Ok(Ok(exit)) => Err(HookFailure::Exit { exit, stderr: errors.finish() }),
        Ok(Err(failure)) => {
            child.kill_group().await.map_err(HookFailure::End)?;
            Err(failure)
        }
        Err(_) => {
            child.kill_group().await.map_err(HookFailure::End)?;
            Err(HookFailure::Timeout { limit, stderr: errors.finish() })
        }
    }
}

fn start(hook: &Hook, place: &HookPlace<'_>, state: &[u8]) -> Result<(Child, HookErrors), HookFailure> {
    let args = hook.args().as_deref().unwrap_or_default();
    let mut spawn = Spawn::new(hook.path())
        .clear_env()
        .dir(place.dir)
        .cgroups(place.cgroups.iter().cloned())
        .stdin(Stdio::Fd(stdin(state).map_err(HookFailure::Streams)?))
        .stderr(Stdio::Pipe)
        .args(args.get(1..).unwrap_or_default());
    if let Some(name) = args.first() {
        spawn = spawn.arg0(name);
    }
    // The configuration was checked: each has a name and a value.
    for (name, value) in hook.env().iter().flatten().filter_map(|variable| variable.split_once('=')) {
        spawn = spawn.env(name, value);
    }
    if let Some(pid) = place.namespaces_of {
        let namespaces = Namespaces { mount: true, ..Namespaces::default() };
        spawn = spawn.jail(Jail { namespaces, ..Jail::default() }).join_namespaces(namespaces_of(pid)?);
    }
    let mut child = spawn.start().map_err(HookFailure::Start)?;
    let stderr = OwnedFd::from(child.stderr.take().expect("it was asked for"));
    let stderr = pipe::Receiver::from_owned_fd(stderr).map_err(HookFailure::Streams)?;
    Ok((child, HookErrors::new(stderr)))
}

/// A file with the state. Unlike a pipe it takes a state of any length from a writer that does not wait, and a hook
/// that does not read it disturbs nothing.
fn stdin(state: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd::holding(state)?);
    file.rewind()?;
    Ok(file.into())
}

fn namespaces_of(pid: u32) -> Result<Vec<OwnedFd>, HookFailure> {
    let open = |name| {
        let path = format!("/proc/{pid}/ns/{name}");
        File::open(&path).map(OwnedFd::from).map_err(FileError::at("open the namespace", path))
    };
    CONTAINER_NAMESPACES.into_iter().map(open).collect::<Result<_, _>>().map_err(HookFailure::Namespace)
}
