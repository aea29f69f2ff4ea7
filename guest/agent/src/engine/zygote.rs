//! The process that forks all others: small, single-threaded, and with nothing in memory but the agent's
//! code.

use std::{
    fs::File,
    io::IoSliceMut,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::{
        prctl::set_pdeathsig,
        signal::Signal,
        socket::{AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair},
    },
    unistd::ForkResult,
};

use super::{
    exec::{self, ExecCall},
    mapping,
    report::{Report, Reporter},
    request::ZygoteRequest,
    worker,
};
use crate::{console, stdio::ProcessEnds, sys};

/// Requests hold ids and paths; specs are in files.
const MAX_REQUEST: usize = 16 << 10;
/// The report pipe, an OCI process in a file, a pidfd of the init, and the three standard streams.
const MAX_FDS: usize = 6;

/// What the zygote runs in forked processes for other modules than the engine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EntryPoints {
    /// Serves the files below a root directory to the other end of a socket.
    pub(crate) serve_view: fn(root: OwnedFd, socket: OwnedFd) -> !,
}

/// Forks the zygote. Returns in the agent only.
pub(super) fn fork(entry_points: EntryPoints) -> Result<OwnedFd, Errno> {
    let (agent, zygote) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    match sys::fork()? {
        ForkResult::Parent { .. } => Ok(agent),
        ForkResult::Child => {
            drop(agent);
            serve(zygote, entry_points)
        }
    }
}

fn serve(socket: OwnedFd, entry_points: EntryPoints) -> ! {
    let named = set_pdeathsig(Signal::SIGKILL).and_then(|()| nix::sys::prctl::set_name(c"machinen-engine"));
    if let Err(err) = named {
        console::fail(&format!("the engine's process cannot prepare itself: {err}"));
    }
    let pids: OwnedFd = match File::open("/proc/self/ns/pid") {
        Ok(file) => file.into(),
        Err(err) => console::fail(&format!("the engine's process cannot open its pid namespace: {err}")),
    };
    if let Err(err) = super::warm_up() {
        // Only workers get slower.
        console::report(&err);
    }
    loop {
        match receive(&socket) {
            Ok(Some((request, fds))) => {
                if spawn(&request, fds, &pids, entry_points).is_none() {
                    console::say("the engine's process has received a request without its descriptors");
                }
            }
            Ok(None) => sys::exit_now(0),
            Err(Errno::EINTR) => {}
            Err(err) => console::fail(&format!("the engine's process cannot read a request: {err}")),
        }
    }
}

/// None when the agent is gone.
fn receive(socket: &OwnedFd) -> Result<Option<(ZygoteRequest, Vec<OwnedFd>)>, Errno> {
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
fn spawn(
    request: &ZygoteRequest,
    fds: Vec<OwnedFd>,
    pids: &OwnedFd,
    entry_points: EntryPoints,
) -> Option<()> {
    let mut fds = fds.into_iter();
    let reporter = Reporter::new(fds.next()?);
    match request {
        ZygoteRequest::Create(create) => {
            let ends = ProcessEnds::from_fds(fds.collect())?;
            match sys::fork_sibling() {
                Ok(ForkResult::Parent { .. }) => {}
                Ok(ForkResult::Child) => worker::run(create, &reporter, ends),
                Err(err) => reporter.send(Report::Failed { text: format!("cannot fork a worker: {err}") }),
            }
        }
        ZygoteRequest::Exec(request) => {
            let (process, init) = (fds.next()?, fds.next()?);
            let ends = ProcessEnds::from_fds(fds.collect())?;
            exec::spawn(ExecCall { request, process, init, ends }, &reporter, pids);
        }
        ZygoteRequest::MapOwners(request) => match sys::fork_sibling() {
            Ok(ForkResult::Parent { .. }) => {}
            Ok(ForkResult::Child) => mapping::run(request, &reporter),
            Err(err) => reporter.send(Report::Failed { text: format!("cannot fork a worker: {err}") }),
        },
        ZygoteRequest::EnterNetwork => {
            let entered = setns(fds.next()?, CloneFlags::CLONE_NEWNET);
            reporter.send(entered.map_or_else(
                |err| Report::Failed { text: format!("cannot enter the network namespace: {err}") },
                |()| Report::Entered,
            ));
        }
        ZygoteRequest::View => {
            let (root, socket) = (fds.next()?, fds.next()?);
            match sys::fork_sibling() {
                Ok(ForkResult::Parent { .. }) => {}
                Ok(ForkResult::Child) => {
                    reporter.send(Report::Worker { pid: nix::unistd::getpid().as_raw() });
                    // Nothing more is reported.
                    drop(reporter);
                    (entry_points.serve_view)(root, socket)
                }
                Err(err) => reporter.send(Report::Failed { text: format!("cannot fork a server: {err}") }),
            }
        }
    }
    Some(())
}
