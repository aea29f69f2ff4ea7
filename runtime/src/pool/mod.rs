//! The warm pool: clones that are ready before anyone asks for a container.
//!
//! ```text
//!   a container runs ── refill ──> a member process for each free slot, with the VM that it is to make, and the slot's lock
//!   member           ── clone, wait for its agent, create a container once ── listen on member-PID.sock
//!   next start       ── connect ── hand over its listener ──> the member answers, frees the slot, and serves
//!   drain            ── unlink the files of occupied slots ──> their members end, however far they have come
//! ```
//! A VM cannot change its owner: it ends with the process that started it. So what waits is the whole owner, and a start
//! gives it the work instead of starting a process. Members are for starts with the same program, configuration and
//! namespaces only ([`Pool::of`]), and whose container wants the same VM: one that does not gives the clone up and gets
//! its own. A member ends by itself when it is of no use any more (`dismissal.rs`).

mod client;
mod dismissal;
mod listing;
mod member;
mod ready;
mod rehearsal;
mod slot;

use std::{
    env, fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, recv, setsockopt, socket,
        sockopt,
    },
    time::{TimeVal, TimeValLike as _},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    config::Config,
    memfd,
    process::{ProcessError, Spawn, Stdio},
    sys::socket::send_with_fd,
    vm::VmSpec,
};
use slot::Slot;

pub use listing::{Listed, drain, list};
pub use member::{Member, MemberError, Taken};
pub use ready::Ready;
pub use slot::{Record, Stage};

/// First argument of a process that is to be a member, before the number of its slot; a [`Request`] is its stdin, as JSON.
pub const ARGUMENT: &str = "pool-member";

/// A member finds the locked file of its slot here.
pub const SLOT_FD: i32 = 3;

/// Longest message to a member, bytes.
const MAX_MESSAGE: usize = 64 << 10;

/// A member answers at once or is not there; more than this costs more than it saves.
const PATIENCE_S: i64 = 2;

/// Why there is no pool, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    #[error("cannot {action} {}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot start a member of the warm pool")]
    Start(#[source] ProcessError),
    #[error("cannot tell a member of the warm pool what VM to make")]
    Request(#[source] io::Error),
    #[error("cannot wait for the end of a member of the warm pool")]
    Wait(#[source] io::Error),
    #[error("the member of the warm pool with the pid {pid} has not ended within {seconds} s")]
    Stays { pid: u32, seconds: u64 },
}

/// What a member is to make, and for which containerd.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    pub spec: VmSpec,
    /// Its socket, if it is known. The member ends when there has been no containerd for long.
    pub containerd: Option<PathBuf>,
}

fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> PoolError {
    let path = path.into();
    move |source| PoolError::File { action, path, source }
}

/// The members that a process may use, by the rules of its configuration.
#[derive(Debug, Clone)]
pub struct Pool {
    dir: PathBuf,
    size: u32,
}

impl Pool {
    /// None: the configuration wants none.
    ///
    /// # Errors
    /// This program or its namespaces cannot be looked at.
    pub fn of(config: &Config) -> Result<Option<Self>, PoolError> {
        if config.pool.size == 0 {
            return Ok(None);
        }
        let mut digest = Sha256::new();
        digest.update(serde_json::to_vec(config).expect("plain data"));
        digest.update(env::var_os("MACHINEN_ASSETS_DIR").unwrap_or_default().as_encoded_bytes());
        // A program that was replaced is another one, as is one that sees other files or another network.
        for name in ["exe", "ns/mnt", "ns/net", "ns/pid"] {
            let path = Path::new("/proc/self").join(name);
            let at = fs::metadata(&path).map_err(file("look at", path))?;
            digest.update(at.dev().to_le_bytes());
            digest.update(at.ino().to_le_bytes());
        }
        let key: String = digest.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Ok(Some(Self { dir: config.pool.dir.join(key), size: config.pool.size }))
    }

    /// Starts a member for each slot that has none; each has a VM as the request says. They outlive this process.
    ///
    /// # Errors
    /// The directory cannot be made, or a process not be started.
    pub fn refill(&self, request: &Request) -> Result<(), PoolError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(file("make the directory", &self.dir))?;
        (0..self.size).try_for_each(|number| self.start_member(number, request))
    }

    /// The slot is taken before the member's process exists, so that a drain at any time finds it.
    fn start_member(&self, number: u32, request: &Request) -> Result<(), PoolError> {
        let path = Slot::path(&self.dir, number);
        let Some(slot) = Slot::take(&path)? else { return Ok(()) };
        slot.write(&Record::new(&request.spec))?;
        let stderr = log(&path)?;
        let request = serde_json::to_vec(request).expect("plain data");
        let stdin = memfd::holding(&request).map_err(PoolError::Request)?;
        let stdin = fs::File::open(format!("/proc/self/fd/{}", stdin.as_raw_fd()));
        Spawn::new("/proc/self/exe")
            .args([ARGUMENT, &number.to_string()])
            .dir("/")
            .stdin(Stdio::Fd(stdin.map_err(PoolError::Request)?.into()))
            .stderr(Stdio::Fd(stderr.into()))
            .fd(slot.share()?, SLOT_FD)
            .detach()
            .map_err(PoolError::Start)
    }

    /// Gives a member a message and a descriptor; returns the member's pid. None when there is no member that takes them.
    pub fn hand_over(&self, message: &[u8], fd: &OwnedFd) -> Option<u32> {
        // Without the directory there is no member.
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
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Where the next member of a slot says why it has failed. What the last one said there is logged.
fn log(slot: &Path) -> Result<fs::File, PoolError> {
    let path = slot.with_extension("log");
    match fs::read_to_string(&path) {
        Ok(said) if !said.is_empty() => {
            tracing::warn!("a member of the warm pool has failed: {}", said.trim());
        }
        _ => {}
    }
    let open = fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(&path);
    open.map_err(file("open", path))
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
