//! Runs one `criu swrk` process and exchanges messages with it (CRIU's rpc.proto, over a socket that keeps
//! message boundaries).

use std::{
    io::IoSliceMut,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    path::Path,
    process::{Command, Stdio},
};

use nix::{
    cmsg_space,
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    sys::{
        signal::Signal,
        socket::{
            AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recv, recvmsg, send, socketpair,
        },
    },
    unistd::Pid,
};
use protobuf::{Message, MessageField};
use rust_criu::rust_criu_protobuf::rpc::{Criu_features, Criu_req, Criu_req_type, Criu_resp};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{oneshot, watch},
};

use super::{CriuError, reason::quote, tmpfs};
use crate::{
    reaper::Reaper,
    sys::{self, WaitStatus},
};

const PROGRAM: &str = "/usr/sbin/criu";
/// Answers are short; this is the most that is read.
const MAX_ANSWER: usize = 64 << 10;

#[derive(Debug)]
pub(super) struct Criu {
    socket: AsyncFd<OwnedFd>,
    reaper: Reaper,
    pid: Pid,
    exit: watch::Receiver<Option<WaitStatus>>,
}

impl Criu {
    /// Starts CRIU. The descriptors in `inherited` keep their numbers in it.
    ///
    /// # Errors
    /// Those of starting a program.
    pub(super) fn start(reaper: &Reaper, inherited: &[OwnedFd]) -> Result<Self, CriuError> {
        let run = |err: Errno| CriuError::Run(err.into());
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(run)?;
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK)).map_err(run)?;
        let inherited: Vec<BorrowedFd<'_>> =
            inherited.iter().map(AsFd::as_fd).chain([theirs.as_fd()]).collect();
        let (pid, exit) = spawn(reaper, &["swrk", &theirs.as_raw_fd().to_string()], &inherited)?;
        let (ended, exit_seen) = watch::channel(None);
        tokio::spawn(async move { ended.send(exit.await.ok()) });
        let exit = exit_seen;
        let socket = sys::register(ours, Interest::READABLE | Interest::WRITABLE).map_err(CriuError::Run)?;
        Ok(Self { socket, reaper: reaper.clone(), pid, exit })
    }

    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends a request. [`Criu::receive`] reports a CRIU that has ended.
    ///
    /// # Errors
    /// Those of sending.
    pub(super) async fn send(&self, request: &Criu_req) -> Result<(), CriuError> {
        let bytes = request.write_to_bytes().map_err(|err| CriuError::Talk(err.into()))?;
        let write = |fd: &OwnedFd| match send(fd.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL) {
            Ok(_) | Err(Errno::EPIPE | Errno::ECONNRESET) => Ok(()),
            Err(err) => Err(err.into()),
        };
        self.socket.async_io(Interest::WRITABLE, write).await.map_err(CriuError::Talk)
    }

    /// Receives the next message, and a descriptor if one came with it. None when CRIU has ended.
    ///
    /// # Errors
    /// What CRIU sends is not a message.
    pub(super) async fn receive(&self) -> Result<Option<(Criu_resp, Option<OwnedFd>)>, CriuError> {
        let mut bytes = vec![0; MAX_ANSWER];
        let mut read = |fd: &OwnedFd| Ok(receive(fd.as_raw_fd(), &mut bytes)?);
        let mut exit = self.exit.clone();
        let received = tokio::select! {
            biased;
            received = self.socket.async_io(Interest::READABLE, &mut read) => received,
            // A process that CRIU has started may keep the other end open longer than CRIU itself. A last
            // message may be pending.
            _ = exit.wait_for(Option::is_some) => read(self.socket.get_ref()),
        };
        let (length, fd) = match received {
            Err(err) if matches!(err.raw_os_error(), Some(libc::ECONNRESET | libc::EAGAIN)) => {
                return Ok(None);
            }
            received => received.map_err(CriuError::Talk)?,
        };
        if length == 0 {
            return Ok(None);
        }
        let answer =
            Criu_resp::parse_from_bytes(&bytes[..length]).map_err(|err| CriuError::Talk(err.into()))?;
        Ok(Some((answer, fd)))
    }

    /// Lets CRIU continue after a notification.
    ///
    /// # Errors
    /// Those of sending.
    pub(super) async fn acknowledge(&self) -> Result<(), CriuError> {
        let mut request = Criu_req::new();
        request.set_type(Criu_req_type::NOTIFY);
        request.set_notify_success(true);
        self.send(&request).await
    }

    /// Lets CRIU work until its final answer.
    ///
    /// # Errors
    /// CRIU has failed; the error has what `quote` finds in its log.
    pub(super) async fn finish(
        &self,
        what: &'static str,
        log: &Path,
        quote: fn(&Path) -> String,
    ) -> Result<(), CriuError> {
        loop {
            match self.receive().await? {
                None => return Err(self.died(log).await),
                Some((answer, _)) if answer.type_() == Criu_req_type::NOTIFY => self.acknowledge().await?,
                Some((answer, _)) if answer.success() => return Ok(()),
                Some(_) => return Err(CriuError::Failed { what, log: quote(log) }),
            }
        }
    }

    /// Kills CRIU, unless it has ended.
    pub(super) fn kill(&self) {
        // The reaper ignores the signal if CRIU has ended.
        let _ = self.reaper.signal(self.pid, libc::SIGKILL);
    }

    /// Kills CRIU and its children, which do some of its work, and returns when all are gone.
    pub(super) async fn end(&self) {
        // The process group may be gone already.
        let _ = sys::kill_raw(Pid::from_raw(-self.pid.as_raw()), libc::SIGKILL);
        self.exit().await;
        // Each of them has the other end open.
        let mut rest = [0; 64];
        let mut read = |fd: &OwnedFd| Ok(recv(fd.as_raw_fd(), &mut rest, MsgFlags::empty())?);
        while self.socket.async_io(Interest::READABLE, &mut read).await.is_ok_and(|length| length > 0) {}
    }

    /// The error of a CRIU that has ended without an answer.
    pub(super) async fn died(&self, log: &Path) -> CriuError {
        CriuError::Died { how: how(self.exit().await), log: quote(log) }
    }

    /// Waits until CRIU has ended. None if its status is unknown.
    pub(super) fn exit(&self) -> impl Future<Output = Option<WaitStatus>> + use<> {
        let mut exit = self.exit.clone();
        async move { exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit) }
    }
}

impl Drop for Criu {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Describes how CRIU has ended, as the end of a sentence.
pub(super) fn how(exit: Option<WaitStatus>) -> String {
    match exit {
        Some(WaitStatus::Signaled(signal)) => match Signal::try_from(i32::from(signal)) {
            Ok(name) => format!("was killed by signal {signal} ({name})"),
            Err(_) => format!("was killed by signal {signal}"),
        },
        Some(WaitStatus::Exited(status)) => format!("has ended with status {status}"),
        None => "has ended".to_owned(),
    }
}

/// Starts CRIU. The descriptors in `inherited` keep their numbers in it.
///
/// # Errors
/// Those of starting a program.
pub(super) fn spawn(
    reaper: &Reaper,
    args: &[&str],
    inherited: &[impl AsFd],
) -> Result<(Pid, oneshot::Receiver<WaitStatus>), CriuError> {
    // The agent has one thread, so nothing else starts a program before this returns.
    for fd in inherited {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|err| CriuError::Run(err.into()))?;
    }
    #[expect(clippy::disallowed_methods, reason = "in the guest the agent's reaper supervises processes")]
    let mut criu = Command::new(PROGRAM);
    criu.args(args)
        .env_clear()
        .env("PATH", format!("{}:/usr/sbin:/usr/bin", tmpfs::DIR))
        .process_group(0)
        .stderr(Stdio::null());
    supervise(reaper, criu)
}

/// Starts the agent's own program under another name, by which it does something else.
///
/// # Errors
/// Those of starting a program.
pub(super) fn spawn_own(
    reaper: &Reaper,
    name: &str,
    args: &[String],
) -> Result<(Pid, oneshot::Receiver<WaitStatus>), CriuError> {
    #[expect(clippy::disallowed_methods, reason = "in the guest the agent's reaper supervises processes")]
    let mut own = Command::new("/proc/self/exe");
    own.arg0(name).args(args).env_clear();
    supervise(reaper, own)
}

fn supervise(
    reaper: &Reaper,
    mut program: Command,
) -> Result<(Pid, oneshot::Receiver<WaitStatus>), CriuError> {
    let expectation = reaper.expect();
    program.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null());
    let child = program.spawn().map_err(CriuError::Run)?;
    let pid = Pid::from_raw(child.id().cast_signed());
    Ok((pid, expectation.watch(pid)))
}

fn receive(socket: RawFd, bytes: &mut [u8]) -> Result<(usize, Option<OwnedFd>), Errno> {
    let mut parts = [IoSliceMut::new(bytes)];
    let mut space = cmsg_space!(RawFd);
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut received = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            received = fds.into_iter().map(sys::received_fd).next();
        }
    }
    Ok((message.bytes, received))
}

/// Makes CRIU probe the kernel's features, which it records in /run/criu.kdat.
///
/// # Errors
/// CRIU cannot be run.
pub(crate) async fn warm_up(reaper: &Reaper) -> Result<(), CriuError> {
    let mut request = Criu_req::new();
    request.set_type(Criu_req_type::FEATURE_CHECK);
    request.features = MessageField::some(Criu_features { mem_track: Some(true), ..Default::default() });
    let criu = Criu::start(reaper, &[])?;
    criu.send(&request).await?;
    criu.receive().await?;
    criu.exit().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signal_that_killed_it_has_its_name() {
        let ended = |status| how(Some(status));
        assert_eq!(ended(WaitStatus::Signaled(9)), "was killed by signal 9 (SIGKILL)");
        assert_eq!(ended(WaitStatus::Signaled(40)), "was killed by signal 40");
        assert_eq!(ended(WaitStatus::Exited(1)), "has ended with status 1");
    }
}
