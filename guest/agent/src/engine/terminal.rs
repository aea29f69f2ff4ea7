//! A process makes its own terminal, in the devpts of its container.

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::{
        socket::{ControlMessage, MsgFlags, sendmsg},
        stat::Mode,
        statfs::{FsType, fstatfs},
    },
    unistd::{Gid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, fchown},
};

use super::request::Console;
use crate::sys::terminal;

const PTMX: &str = "/dev/pts/ptmx";
/// DEVPTS_SUPER_MAGIC of linux/magic.h.
const DEVPTS: FsType = FsType(0x1cd1);

#[derive(Debug, thiserror::Error)]
pub(super) enum TerminalError {
    #[error("cannot open {PTMX}")]
    Open(#[source] Errno),
    #[error("{PTMX} is not on a devpts")]
    NotDevpts,
    #[error("cannot prepare the terminal")]
    Prepare(#[source] Errno),
    #[error("cannot send the terminal to the agent")]
    Send(#[source] io::Error),
    #[error("cannot connect the terminal")]
    Connect(#[source] Errno),
}

/// Makes the controlling terminal of this session, connects the standard streams with it, and sends its
/// master.
pub(super) fn make(socket: BorrowedFd<'_>, console: Console) -> Result<(), TerminalError> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = open(PTMX, flags, Mode::empty()).map_err(TerminalError::Open)?;
    // The file system belongs to the tenant: a name proves nothing.
    if fstatfs(&master).map_err(TerminalError::Open)?.filesystem_type() != DEVPTS {
        return Err(TerminalError::NotDevpts);
    }
    terminal::unlock(master.as_fd()).map_err(TerminalError::Prepare)?;
    let slave = prepare(master.as_fd(), console).map_err(TerminalError::Prepare)?;
    send(socket, master.as_fd()).map_err(TerminalError::Send)?;
    terminal::control(slave.as_fd())
        .and_then(|()| dup2_stdin(&slave))
        .and_then(|()| dup2_stdout(&slave))
        .and_then(|()| dup2_stderr(&slave))
        .map_err(TerminalError::Connect)
}

/// Sets the size of a terminal, and its owner: the process opens it again as /dev/stdout. Returns its slave.
pub(super) fn prepare(master: BorrowedFd<'_>, console: Console) -> Result<OwnedFd, Errno> {
    let slave = terminal::peer(master)?;
    fchown(&slave, Some(Uid::from_raw(console.owner)), None::<Gid>)?;
    if let Some(size) = console.size {
        terminal::set_size(master, size.width, size.height)?;
    }
    Ok(slave)
}

pub(super) fn send(socket: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> io::Result<()> {
    let fds = [fd.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"pty")], &control, flags, None)?;
    Ok(())
}
