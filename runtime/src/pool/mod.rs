//! The warm pool: clones that are ready before anyone asks for a container.
//!
//! ```text
//!   a container runs ── refill ──> a member process for each free slot, told what VM the container has
//!   member           ── lock slot-N.lock ── clone, wait for its agent ── listen on slot-N.sock
//!   next start       ── connect ── hand over its listener ──> the member answers, frees the slot, and serves
//! ```
//! A VM cannot change its owner: it ends with the process that started it. So what waits is the whole owner, and a start
//! gives it the work instead of starting a process. Members are for starts with the same program, configuration and
//! namespaces only ([`Pool::of`]), and whose container wants the same VM: one that does not gives the clone up and gets
//! its own.

mod member;
mod ready;
mod rehearsal;

use std::{
    env, fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, recv, send,
            setsockopt, socket, sockopt,
        },
        time::{TimeVal, TimeValLike as _},
    },
};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};

use crate::{
    config::Config,
    memfd,
    process::{ProcessError, Spawn, Stdio},
    sys::socket::send_with_fd,
    vm::VmSpec,
};

pub use member::{Member, MemberError, Taken};
pub use ready::Ready;

/// First argument of a process that is to be a member; the VM that it is to have is its stdin, as JSON.
pub const ARGUMENT: &str = "pool-member";

/// Longest message to a member, bytes.
const MAX_MESSAGE: usize = 64 << 10;

/// A member answers at once or is not there; more than this costs more than it saves.
const PATIENCE_S: i64 = 2;

/// A member that is told to go has a VM to end.
const DRAIN_PATIENCE_S: i64 = 10;

/// Why there is no pool, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    #[error("cannot {action} {}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot start a member of the warm pool")]
    Start(#[source] ProcessError),
    #[error("cannot tell a member of the warm pool what VM to make")]
    Request(#[source] io::Error),
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

    /// Starts a member for each slot that has none; each has a VM like `spec`. They outlive this process.
    ///
    /// # Errors
    /// The directory cannot be made, or a process not be started.
    pub fn refill(&self, spec: &VmSpec) -> Result<(), PoolError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(file("make the directory", &self.dir))?;
        let request = serde_json::to_vec(spec).expect("plain data");
        for slot in 0..self.size {
            // Let go at once: the member takes it, or sees that another has.
            if self.slot(slot).lock()?.is_none() {
                continue;
            }
            let stderr = self.slot(slot).log()?;
            let stdin = memfd::holding(&request).map_err(PoolError::Request)?;
            let path = format!("/proc/self/fd/{}", stdin.as_raw_fd());
            let stdin = fs::File::open(path).map_err(PoolError::Request)?;
            Spawn::new("/proc/self/exe")
                .args([ARGUMENT, &slot.to_string()])
                .dir("/")
                .stdin(Stdio::Fd(stdin.into()))
                .stderr(Stdio::Fd(stderr.into()))
                .detach()
                .map_err(PoolError::Start)?;
        }
        Ok(())
    }

    /// Gives a member a message and a descriptor; returns the member's pid. None when there is no member that takes them.
    pub fn hand_over(&self, message: &[u8], fd: &OwnedFd) -> Option<u32> {
        (0..self.size).find_map(|slot| {
            let socket = self.slot(slot).socket();
            match offer(&socket, message, fd) {
                Ok(pid) => Some(pid),
                Err(error) => {
                    tracing::debug!(path = %socket.display(), "no member of the pool: {error}");
                    None
                }
            }
        })
    }

    fn slot(&self, number: u32) -> Slot {
        Slot { path: self.dir.join(format!("slot-{number}")) }
    }
}

/// Ends all members of all pools below `dir`, whatever their configuration; returns how many there were.
///
/// # Errors
/// The directory cannot be read, or a member does not end.
pub fn drain(dir: &Path) -> Result<usize, PoolError> {
    let members = members(dir)?;
    for socket in &members {
        dismiss(socket).map_err(file("end the member at", socket))?;
    }
    Ok(members.len())
}

/// The sockets of all members that wait below `dir`.
///
/// # Errors
/// The directory cannot be read.
pub fn members(dir: &Path) -> Result<Vec<PathBuf>, PoolError> {
    let mut sockets = Vec::new();
    for pool in entries(dir).map_err(file("read", dir))? {
        for path in entries(&pool).map_err(file("read", &pool))? {
            // What a member left that was killed answers to nobody.
            if path.extension().is_some_and(|extension| extension == "sock") && dial(&path).is_ok() {
                sockets.push(path);
            }
        }
    }
    Ok(sockets)
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// A place for one member; whoever holds its lock is the member.
#[derive(Debug)]
struct Slot {
    path: PathBuf,
}

impl Slot {
    fn socket(&self) -> PathBuf {
        self.path.with_extension("sock")
    }

    /// Where the next member says why it has failed. What the last one said there is logged.
    fn log(&self) -> Result<fs::File, PoolError> {
        let path = self.path.with_extension("log");
        match fs::read_to_string(&path) {
            Ok(said) if !said.is_empty() => {
                tracing::warn!("a member of the warm pool has failed: {}", said.trim());
            }
            _ => {}
        }
        let open = fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(&path);
        open.map_err(file("open", path))
    }

    /// None while there is a member.
    fn lock(&self) -> Result<Option<fs::File>, PoolError> {
        let path = self.path.with_extension("lock");
        let open = fs::File::options().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let lock = open.map_err(file("open", &path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(lock)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(file("lock", path)(error.into())),
        }
    }
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

/// A message without a descriptor ends a member; its end of the connection closes with it.
fn dismiss(path: &Path) -> io::Result<()> {
    let socket = match dial(path) {
        Ok(socket) => socket,
        // It was taken meanwhile, or has ended.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(DRAIN_PATIENCE_S))?;
    send(socket.as_raw_fd(), b"end", MsgFlags::MSG_NOSIGNAL)?;
    match recv(socket.as_raw_fd(), &mut [0], MsgFlags::empty()) {
        Ok(_) | Err(Errno::ECONNRESET) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
