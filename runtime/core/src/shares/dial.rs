//! Connects to UNIX sockets of the host that are in the volumes, in the share server.
//!
//! ```text
//!   shim ──control socket: DialHeader, a socket for the answer──> server ──connect(2)──> /proc/self/fd/N, in a volume
//!        <──the answer: an errno, the connection────────────────
//! ```
//! The server has no socket of the host's network namespace, and no file but those of the volumes: it reaches a listening
//! process of the host only by the path of a socket in a volume.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::Arc,
    thread,
    time::Duration,
};

use fuse_backend_rs::passthrough::PassthroughFs;
use machinen_base::sys::socket::{receive_with_fd, send_with_fd};
use machinen_protocol::sockets::{DialHeader, SocketKind};
use nix::{
    errno::Errno,
    sys::{
        socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt},
        time::{TimeVal, TimeValLike as _},
    },
};
use rustix::{
    fs::{FileType, OFlags, fstat},
    process::{Gid, Uid},
    thread::{set_thread_res_gid, set_thread_res_uid},
};

use super::{reopen::reopen, root::VOLUMES};

/// How long a process may take to make room in its queue of connections.
const ACCEPTED_WITHIN: Duration = Duration::from_secs(20);
/// Bytes of the answer.
pub(super) const ANSWER: usize = 4;

/// Connects as it is asked to on the control socket, until that ends.
pub(super) fn serve(control: OwnedFd, files: &Arc<PassthroughFs>) -> io::Result<()> {
    loop {
        let mut header = [0; DialHeader::SIZE];
        let (length, answer) = match receive_with_fd(control.as_fd(), &mut header) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            received => received?,
        };
        let answer = match (length, answer) {
            (0, _) => return Ok(()),
            (DialHeader::SIZE, Some(answer)) => answer,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        let files = Arc::clone(files);
        // The shim bounds the number of connections. The thread takes the user of the process, and ends as that.
        thread::Builder::new().spawn(move || {
            let connected = dial(&files, DialHeader::decode(header));
            let (errno, connection) = match connected {
                Ok(connection) => (0, Some(connection)),
                Err(error) => (error.raw_os_error().unwrap_or(libc::EIO), None),
            };
            // Without the other end nothing waits for the answer.
            drop(send_with_fd(answer.as_fd(), &errno.to_ne_bytes(), connection.as_ref()));
        })?;
    }
}

/// What a process has bound to the socket with this node.
///
/// # Errors
/// The node is no socket in a volume.
pub(super) fn kind(files: &PassthroughFs, node: u64) -> io::Result<SocketKind> {
    let file = open_socket(files, node)?;
    // This sends nothing: a socket for datagrams only remembers where they would go.
    match connected(&file, SockType::Datagram) {
        Ok(_) => Ok(SocketKind::Datagrams),
        Err(Errno::EPROTOTYPE) => Ok(SocketKind::Connections),
        Err(Errno::ECONNREFUSED) => Ok(SocketKind::Unbound),
        Err(errno) => Err(errno.into()),
    }
}

/// Connects this thread, which may do nothing else after that, as a process of the guest.
fn dial(files: &PassthroughFs, header: DialHeader) -> io::Result<OwnedFd> {
    let file = open_socket(files, header.node)?;
    // The process that accepts sees this user (SO_PEERCRED). Its right to connect was checked by the guest's kernel.
    let (uid, gid) = (Uid::from_raw_unchecked(header.uid), Gid::from_raw_unchecked(header.gid));
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    Ok(connected(&file, SockType::Stream)?)
}

fn open_socket(files: &PassthroughFs, node: u64) -> io::Result<OwnedFd> {
    let file = reopen(files, VOLUMES, node, OFlags::PATH)?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::Socket {
        return Err(io::Error::from_raw_os_error(libc::ENOTSOCK));
    }
    Ok(file)
}

fn connected(file: &OwnedFd, kind: SockType) -> nix::Result<OwnedFd> {
    let socket = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::SendTimeout, &TimeVal::seconds(ACCEPTED_WITHIN.as_secs().cast_signed()))?;
    let address = UnixAddr::new(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str())?;
    connect(socket.as_raw_fd(), &address)?;
    Ok(socket)
}
