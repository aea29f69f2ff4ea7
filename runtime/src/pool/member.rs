//! A member of the warm pool: a process with a ready clone, waiting to be taken.

use std::{
    env, fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use nix::sys::{
    inotify::{AddWatchFlags, InitFlags, Inotify},
    socket::{AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, listen, send, socket},
};
use tokio::{
    io::unix::AsyncFd,
    signal::unix::{SignalKind, signal},
};

use super::{MAX_MESSAGE, Pool, PoolError, Ready, Slot, file};
use crate::{
    config::{self, Config},
    pod::PodError,
    sys,
    vm::VmSpec,
};

/// Why a process could not be a member.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error("cannot have a clone ready")]
    Clone(#[from] PodError),
    #[error("the taker of a ready clone has gone")]
    TakerGone(#[source] io::Error),
}

/// A process that waits in its slot.
#[derive(Debug)]
pub struct Member {
    slot: Slot,
    /// The slot is another's as soon as this is dropped.
    _lock: fs::File,
    listener: AsyncFd<OwnedFd>,
    changes: AsyncFd<OwnedFd>,
    ready: Ready,
}

/// A member that was taken, and does not belong to the pool any more.
#[derive(Debug)]
pub struct Taken {
    /// What the taker has said.
    pub message: Vec<u8>,
    connection: OwnedFd,
    fd: OwnedFd,
    ready: Ready,
}

impl Member {
    /// Takes the slot `number` and makes a clone like `spec`. None: nobody needs this member.
    ///
    /// # Errors
    /// The slot's files cannot be made, or there is no clone to be had. Nothing is left then.
    pub async fn join(config: &Config, number: u32, spec: VmSpec) -> Result<Option<Self>, MemberError> {
        let Some(pool) = Pool::of(config)? else { return Ok(None) };
        let slot = pool.slot(number);
        let Some(lock) = slot.lock()? else { return Ok(None) };
        // Before the clone: what changes meanwhile is noticed too.
        let changes = watch().map_err(file("watch", "/proc/self/exe"))?;
        sweep(&pool.dir).map_err(file("clear", &pool.dir))?;
        let dir = pool.dir.join(format!("{VM_DIR}{}", std::process::id()));
        let Some(ready) = Ready::make(spec, config, &dir).await? else { return Ok(None) };
        let path = slot.socket();
        match publish(&path) {
            Ok(listener) => Ok(Some(Self { slot, _lock: lock, listener, changes, ready })),
            Err(error) => {
                ready.vm.kill().await;
                Err(file("listen on", path)(error).into())
            }
        }
    }

    /// Waits to be taken. None: it is not needed any more, because it was told to go, its VM has ended, or the
    /// configuration or the program has changed; nothing is left then.
    ///
    /// # Errors
    /// The slot's socket cannot be waited on.
    pub async fn taken(self) -> Result<Option<Taken>, MemberError> {
        let path = self.slot.socket();
        let failed = |error| MemberError::Pool(file("wait on", &path)(error));
        let mut terminated = signal(SignalKind::terminate()).map_err(failed)?;
        let ended = self.ready.vm.exited();
        let request = tokio::select! {
            request = request(&self.listener) => request.map_err(failed).map(Some),
            _ = terminated.recv() => Ok(None),
            _ = ended => Ok(None),
            changed = self.changes.readable() => changed.map(|_| None).map_err(failed),
        };
        // Whoever comes from now on finds nobody, and the slot is free.
        let Self { listener, ready, .. } = self;
        let removed = fs::remove_file(&path);
        drop(listener);
        if let Err(error) = removed {
            tracing::warn!(path = %path.display(), "cannot remove a socket: {error}");
        }
        match request {
            Ok(Some(Request { message, fd: Some(fd), connection })) => {
                Ok(Some(Taken { message, connection, fd, ready }))
            }
            other => {
                ready.vm.kill().await;
                other.map(|_| None)
            }
        }
    }
}

impl Taken {
    /// Tells the taker that this process does the work from now on. Returns the listener that it gave, and the clone.
    ///
    /// # Errors
    /// The taker has not waited; it has others do the work, and nothing is left here.
    pub async fn accept(self) -> Result<(UnixListener, Ready), MemberError> {
        match send(self.connection.as_raw_fd(), b"1", MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => Ok((self.fd.into(), self.ready)),
            Err(error) => {
                self.ready.vm.kill().await;
                Err(MemberError::TakerGone(error.into()))
            }
        }
    }
}

/// A message to a member. Without a descriptor: it is to end.
struct Request {
    message: Vec<u8>,
    fd: Option<OwnedFd>,
    /// Closed when the member has done what it was asked.
    connection: OwnedFd,
}

/// Waits for somebody who says something; others only look whether there is a member.
async fn request(listener: &AsyncFd<OwnedFd>) -> io::Result<Request> {
    loop {
        let mut ready = listener.readable().await?;
        let connection = match sys::socket::accept(listener.get_ref().as_fd()) {
            Ok(connection) => connection,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ready.clear_ready();
                continue;
            }
            Err(error) => return Err(error),
        };
        let connection = sys::async_fd(connection)?;
        let mut message = vec![0; MAX_MESSAGE];
        let received = loop {
            let mut ready = connection.readable().await?;
            match sys::socket::receive_with_fd(connection.get_ref().as_fd(), &mut message) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                received => break received,
            }
        };
        if let Ok((length @ 1.., fd)) = received {
            message.truncate(length);
            return Ok(Request { message, fd, connection: connection.into_inner() });
        }
    }
}

/// Only one who holds the slot's lock comes here. The socket has its name when somebody listens.
fn publish(path: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let unpublished = path.with_extension("new");
    match fs::remove_file(&unpublished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(&unpublished)?)?;
    listen(&listener, Backlog::new(16)?)?;
    fs::rename(&unpublished, path)?;
    sys::async_fd(listener)
}

/// Before the pid of the process that a VM's directory belongs to.
const VM_DIR: &str = "vm-";

/// Removes what members that were killed have left of their VMs.
fn sweep(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let pid = name.and_then(|name| name.strip_prefix(VM_DIR));
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}

/// Readable when the program or its configuration is not what it was.
fn watch() -> io::Result<AsyncFd<OwnedFd>> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let flags = AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_MOVE_SELF
        | AddWatchFlags::IN_DELETE_SELF;
    let config = env::var_os("MACHINEN_CONFIG").map_or_else(|| config::DEFAULT_PATH.into(), PathBuf::from);
    for path in [Path::new("/proc/self/exe"), &config] {
        match inotify.add_watch(path, flags) {
            // No configuration is a configuration.
            Ok(_) | Err(nix::Error::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    sys::async_fd(inotify.as_fd().try_clone_to_owned()?)
}
