//! The warm pool: clones that are ready before a container is requested.
//!
//! ```text
//!   a container runs ── refill ──> a member process for each free slot, with the VM to make and the slot's lock
//!   member           ── clone, wait for its agent, create a container once ── listen on member-PID.sock
//!   next start       ── connect ── hand over its listener ──> the member answers, frees the slot, and serves
//!   drain            ── unlink the files of occupied slots ──> their members end, whatever their progress
//! ```
//! A VM cannot change its owner, because it ends with the process that started it. So a member is a whole
//! owner that waits, and a start hands its work over to a member instead of starting a process. A member only
//! serves starts with the same program, configuration and namespaces ([`Pool::of`]). If the container needs a
//! different VM, the member kills the clone and starts that VM. A member that is no longer needed ends by
//! itself (`dismissal.rs`).

mod client;
mod dismissal;
mod listing;
mod member;
mod slot;
pub mod warm_up;
mod warm_vm;

use std::{
    env, fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::{FileError, create_private_dirs, hex, if_exists},
    memfd,
    process::{ProcessError, Stdio},
    reexec,
    sys::socket::send_with_fd,
};
use machinen_vm::{VmSpec, assets};
use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, recv, setsockopt, socket,
        sockopt,
    },
    time::{TimeVal, TimeValLike as _},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::config::{Config, PoolConfig};
use slot::PoolSlot;

pub use listing::{ListedMember, drain, list};
pub use member::{Member, MemberError, TakenMember};
pub use slot::{MemberRecord, MemberStage};
pub use warm_vm::{CloneError, WarmVm, has_room};

/// The name of the entry point of a process that is a member. The number of its slot is its argument, and a
/// [`MemberRequest`] is its stdin, as JSON. The shim has the entry point, because a member becomes a shim.
pub const MEMBER: &str = "pool-member";

/// The descriptor on which a member inherits the locked file of its slot.
pub const SLOT_FD: i32 = 3;

/// Size limit of a message to a member, bytes.
const MAX_MESSAGE: usize = 64 << 10;

/// A member that is alive answers at once; waiting longer would cost more than the pool saves.
const PATIENCE_S: i64 = 2;

/// The errors of the pool.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// An operation on a file of the pool failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The member's process cannot be started.
    #[error("cannot start a member of the warm pool")]
    Start(#[source] ProcessError),
    /// The request for a member cannot be passed on.
    #[error("cannot pass a request to a member of the warm pool")]
    Request(#[source] io::Error),
    /// The lock of a member's slot cannot be waited for.
    #[error("cannot wait for the end of a member of the warm pool")]
    Wait(#[source] io::Error),
    /// The member has not ended in time.
    #[error("the member of the warm pool with the pid {pid} has not ended within {seconds} s")]
    Stays {
        /// The member's pid.
        pid: u32,
        /// The time limit, seconds.
        seconds: u64,
    },
}

impl HasKind for PoolError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::File(error) => error.kind(),
            Self::Start(_) => ErrorKind::Internal,
            Self::Request(error) | Self::Wait(error) => ErrorKind::of_io(error),
            Self::Stays { .. } => ErrorKind::DeadlineExceeded,
        }
    }
}

/// What VM a member is to make, and for which containerd.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MemberRequest {
    /// Describes the VM.
    pub spec: VmSpec,
    /// The socket of that containerd, if known. The member ends when containerd has been absent for long.
    pub containerd: Option<PathBuf>,
    /// Directories of the cgroups that the member moves to, because that of the pod that starts it ends with that pod.
    pub cgroups: Vec<PathBuf>,
}

/// The members that a process with a certain configuration may use.
#[derive(Debug, Clone)]
pub struct Pool {
    dir: PathBuf,
    size: u32,
    /// The file of the members' configuration.
    config: PathBuf,
}

impl Pool {
    /// Returns None if the configuration disables the pool.
    ///
    /// # Errors
    /// This program or its namespaces cannot be inspected.
    pub fn of(config: &Config) -> Result<Option<Self>, PoolError> {
        if config.pool.size == 0 {
            return Ok(None);
        }
        let mut digest = Sha256::new();
        digest.update(serde_json::to_vec(config).expect("plain data"));
        // A member has this path in its environment, and ends when that file changes.
        digest.update(config.file.as_os_str().as_encoded_bytes());
        digest.update(env::var_os(assets::DIR_VARIABLE).unwrap_or_default().as_encoded_bytes());
        // Members are not shared with a program that was replaced, nor with one that has other mounts, pids
        // or another network.
        for name in ["exe", "ns/mnt", "ns/net", "ns/pid"] {
            let path = Path::new("/proc/self").join(name);
            let at = fs::metadata(&path).map_err(FileError::at("look at", path))?;
            digest.update(at.dev().to_le_bytes());
            digest.update(at.ino().to_le_bytes());
        }
        let key = hex(&digest.finalize()[..8]);
        let PoolConfig { dir, size, .. } = &config.pool;
        Ok(Some(Self { dir: dir.join(key), size: *size, config: config.file.clone() }))
    }

    /// Starts a member for each free slot, with a VM as requested. The members outlive this process.
    ///
    /// # Errors
    /// The directory cannot be created, or a process cannot be started.
    pub fn refill(&self, request: &MemberRequest) -> Result<(), PoolError> {
        create_private_dirs(&self.dir).map_err(FileError::at("make the directory", &self.dir))?;
        (0..self.size).try_for_each(|number| self.start_member(number, request))
    }

    /// Takes the slot before the member's process exists, so that a drain always finds it.
    fn start_member(&self, number: u32, request: &MemberRequest) -> Result<(), PoolError> {
        let path = PoolSlot::path(&self.dir, number);
        let Some(slot) = PoolSlot::take(&path)? else { return Ok(()) };
        slot.write(&MemberRecord::new(&request.spec, self.config.clone()))?;
        let stderr = log(&path)?;
        let request = serde_json::to_vec(request).expect("plain data");
        let stdin = memfd::holding(&request).map_err(PoolError::Request)?;
        let stdin = fs::File::open(format!("/proc/self/fd/{}", stdin.as_raw_fd()));
        reexec::spawn(MEMBER)
            .args([number.to_string()])
            .dir("/")
            .stdin(Stdio::Fd(stdin.map_err(PoolError::Request)?.into()))
            .stderr(Stdio::Fd(stderr.into()))
            .fd(slot.share()?, SLOT_FD)
            .detach()
            .map_err(PoolError::Start)
            .map(drop)
    }

    /// Hands a message and a descriptor over to a member; returns the member's pid. Returns None if no member
    /// accepts them.
    pub fn hand_over(&self, message: &[u8], fd: &OwnedFd) -> Option<u32> {
        // If the directory is missing, there is no member.
        let mut sockets = entries(&self.dir).unwrap_or_default();
        sockets.retain(|path| path.to_str().is_some_and(|path| path.ends_with(member::SOCKET)));
        sockets.into_iter().find_map(|socket| match offer(&socket, message, fd) {
            Ok(pid) => Some(pid),
            Err(error) => {
                tracing::debug!(path = %socket.display(), "no member of the pool: {error}");
                None
            }
        })
    }
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = if_exists(fs::read_dir(dir))?;
    entries.into_iter().flatten().map(|entry| Ok(entry?.path())).collect()
}

/// Opens the file to which the next member of a slot writes its errors, and logs those of the previous
/// member.
fn log(slot: &Path) -> Result<fs::File, PoolError> {
    let path = slot.with_extension("log");
    match fs::read_to_string(&path) {
        Ok(errors) if !errors.is_empty() => {
            tracing::warn!("a member of the warm pool has failed: {}", errors.trim());
        }
        _ => {}
    }
    let open = fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(&path);
    Ok(open.map_err(FileError::at("open", path))?)
}

fn dial(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

fn offer(path: &Path, message: &[u8], fd: &OwnedFd) -> io::Result<u32> {
    let socket = dial(path)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(PATIENCE_S))?;
    send_with_fd(socket.as_fd(), message, Some(fd))?;
    let mut answer = [0];
    match recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())? {
        1 => {
            let peer = getsockopt(&socket, sockopt::PeerCredentials)?;
            u32::try_from(peer.pid()).map_err(io::Error::other)
        }
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
