//! The process from which all others are forked: small, single-threaded, with nothing in it but the agent's code.

use std::{
    fs::File,
    io::IoSliceMut,
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::{
        prctl::set_pdeathsig,
        signal::Signal,
        socket::{AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair},
    },
    unistd::ForkResult,
};
use serde::{Deserialize, Serialize};

use super::{
    exec,
    process::Console,
    report::{Message, Reporter},
    worker,
};
use crate::{console, stdio::ProcessEnds, sys, view};

/// Ids and paths; specs are in files.
const MAX_REQUEST: usize = 16 << 10;
/// The report pipe, a process and the handle of the init it joins, and the three standard streams.
const MAX_FDS: usize = 6;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Request {
    /// With the report pipe, and the process's ends of its streams.
    Create(Create),
    /// With the report pipe, the OCI process in a file, a pidfd of the container's init, and the ends.
    Exec(Exec),
    /// With the report pipe, a container's root, and the socket on which its files are asked for.
    View,
}

/// One container to make.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Create {
    pub(super) id: String,
    /// Holds config.json.
    pub(super) bundle: PathBuf,
    /// Where libcontainer keeps its state, in a directory named like the container.
    pub(super) state: PathBuf,
    pub(super) rootfs: PathBuf,
    /// Of the process, in the container.
    pub(super) cwd: PathBuf,
    /// The spec does not set the process's OOM score.
    pub(super) keeps_oom_score: bool,
    /// How its terminal is to be, if it gets one.
    pub(super) console: Option<Console>,
}

/// One process to run in a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Exec {
    /// Of the container's init, as the agent sees it.
    pub(super) init: i32,
    /// CLONE_NEW* of the namespaces that the init does not share with the agent.
    pub(super) namespaces: i32,
    pub(super) cgroup: PathBuf,
    /// Holds the spec's linux.seccomp.
    pub(super) seccomp: Option<PathBuf>,
    /// The spec's linux.personality.domain.
    pub(super) personality: Option<String>,
    /// How its terminal is to be, if it gets one.
    pub(super) console: Option<Console>,
}

/// Returns in the agent; the zygote never does.
pub(super) fn fork() -> Result<OwnedFd, Errno> {
    let (agent, zygote) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    match sys::fork()? {
        ForkResult::Parent { .. } => Ok(agent),
        ForkResult::Child => {
            drop(agent);
            serve(zygote)
        }
    }
}

fn serve(socket: OwnedFd) -> ! {
    let named = set_pdeathsig(Signal::SIGKILL).and_then(|()| nix::sys::prctl::set_name(c"machinen-engine"));
    if let Err(err) = named {
        fail(&format!("the engine's process cannot prepare itself: {err}"));
    }
    let pids: OwnedFd = match File::open("/proc/self/ns/pid") {
        Ok(file) => file.into(),
        Err(err) => fail(&format!("the engine's process cannot open its pid namespace: {err}")),
    };
    loop {
        match receive(&socket) {
            Ok(Some((request, fds))) => {
                if spawn(&request, fds, &pids).is_none() {
                    console::say("the engine's process was sent a request without its descriptors");
                }
            }
            Ok(None) => sys::exit_now(0),
            Err(Errno::EINTR) => {}
            Err(err) => fail(&format!("the engine's process cannot read a request: {err}")),
        }
    }
}

pub(super) fn fail(text: &str) -> ! {
    console::say(text);
    sys::exit_now(1)
}

/// None when the agent is gone.
fn receive(socket: &OwnedFd) -> Result<Option<(Request, Vec<OwnedFd>)>, Errno> {
    let mut bytes = vec![0; MAX_REQUEST];
    let mut space = cmsg_space!([i32; MAX_FDS]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            fds.extend(received.into_iter().map(sys::received_fd));
        }
    }
    let length = message.bytes;
    if length == 0 {
        return Ok(None);
    }
    let request = serde_json::from_slice(&bytes[..length]).map_err(|_| Errno::EBADMSG)?;
    Ok(Some((request, fds)))
}

/// None when descriptors are missing.
fn spawn(request: &Request, fds: Vec<OwnedFd>, pids: &OwnedFd) -> Option<()> {
    let mut fds = fds.into_iter();
    let reporter = Reporter::new(fds.next()?);
    match request {
        Request::Create(create) => {
            let ends = ProcessEnds::from_fds(fds.collect())?;
            match sys::fork_sibling() {
                Ok(ForkResult::Parent { .. }) => {}
                Ok(ForkResult::Child) => worker::run(create, &reporter, ends),
                Err(err) => reporter.send(Message::Failed { text: format!("cannot fork a worker: {err}") }),
            }
        }
        Request::Exec(request) => {
            let (process, init) = (fds.next()?, fds.next()?);
            let ends = ProcessEnds::from_fds(fds.collect())?;
            exec::spawn(exec::Exec { request, process, init, ends }, &reporter, pids);
        }
        Request::View => {
            let (root, socket) = (fds.next()?, fds.next()?);
            match sys::fork_sibling() {
                Ok(ForkResult::Parent { .. }) => {}
                Ok(ForkResult::Child) => {
                    reporter.send(Message::Worker { pid: nix::unistd::getpid().as_raw() });
                    // Nothing more is reported.
                    drop(reporter);
                    view::serve(root, socket)
                }
                Err(err) => reporter.send(Message::Failed { text: format!("cannot fork a server: {err}") }),
            }
        }
    }
    Some(())
}
