//! The process from which workers are forked: small, single-threaded, with nothing in it but the agent's code.

use std::{
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
    report::{Message, Reporter},
    worker,
};
use crate::{console, sys};

/// Ids and paths; the spec itself is in a file.
const MAX_REQUEST: usize = 16 << 10;
/// The report pipe and the three standard streams.
const FDS: usize = 4;

/// One container to make.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
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
        console::say(&format!("the engine's process cannot prepare itself: {err}"));
        sys::exit_now(1);
    }
    loop {
        match receive(&socket) {
            Ok(Some((request, fds))) => spawn(&request, fds),
            Ok(None) => sys::exit_now(0),
            Err(Errno::EINTR) => {}
            Err(err) => {
                console::say(&format!("the engine's process cannot read a request: {err}"));
                sys::exit_now(1);
            }
        }
    }
}

/// None when the agent is gone.
fn receive(socket: &OwnedFd) -> Result<Option<(Request, [OwnedFd; FDS])>, Errno> {
    let mut bytes = vec![0; MAX_REQUEST];
    let mut space = cmsg_space!([i32; FDS]);
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
    Ok(Some((request, fds.try_into().map_err(|_| Errno::EBADMSG)?)))
}

fn spawn(request: &Request, [report, stdin, stdout, stderr]: [OwnedFd; FDS]) {
    let reporter = Reporter::new(report);
    match sys::fork_sibling() {
        Ok(ForkResult::Parent { .. }) => {}
        Ok(ForkResult::Child) => worker::run(request, &reporter, [stdin, stdout, stderr]),
        Err(err) => reporter.send(Message::Failed { text: format!("cannot fork a worker: {err}") }),
    }
}
