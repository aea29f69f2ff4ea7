//! A member of the warm pool: a process that makes a clone, and waits to be taken with it.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, listen, send, socket,
};
use tokio::io::unix::AsyncFd;

use super::{
    MAX_MESSAGE, Pool, PoolError, Ready, Request,
    dismissal::Dismissal,
    file,
    slot::{Record, Slot, Stage},
};
use crate::{config::Config, pod::PodError, sys};

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
    /// It is another's as soon as this is dropped.
    slot: Slot,
    record: Record,
    dismissal: Dismissal,
    path: PathBuf,
    listener: AsyncFd<OwnedFd>,
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
    /// Makes a clone for the slot `number`, whose locked file is `slot`. None: the member is not needed, because there is no
    /// template, or for one of the reasons for which [`Member::taken`] ends; nothing is left then.
    ///
    /// # Errors
    /// The slot's files cannot be used, or the clone does not work. Nothing is left then.
    pub async fn join(
        config: &Config,
        number: u32,
        slot: OwnedFd,
        request: Request,
    ) -> Result<Option<Self>, MemberError> {
        let Some(pool) = Pool::of(config)? else { return Ok(None) };
        // The configuration may have changed since the slot was taken, and the pool be another one.
        let path = Slot::path(&pool.dir, number);
        let Some(slot) = Slot::inherited(path.clone(), slot)? else { return Ok(None) };
        let patience = Duration::from_secs(config.pool.containerd_timeout_s);
        let dismissal = Dismissal::watch(&slot, request.containerd.map(|socket| (socket, patience)))?;
        // What has changed before the watch began is not noticed by it.
        if !slot.has_name()? {
            return Ok(None);
        }
        let mut record =
            Record { pid: std::process::id(), stage: Stage::Cloning, ..Record::new(&request.spec) };
        slot.write(&record)?;
        sweep(&pool.dir).map_err(file("clear", &pool.dir))?;
        let dir = pool.dir.join(name(VM, ""));
        // Not given up half-way: a VM that is being made has no owner that could end it.
        let Some(ready) = Ready::clone_vm(request.spec, config, &dir).await? else { return Ok(None) };
        let path = pool.dir.join(name(MEMBER, SOCKET));
        match listening(&slot, &mut record, &dismissal, &ready, config, &path).await {
            Ok(Some(listener)) => Ok(Some(Self { slot, record, dismissal, path, listener, ready })),
            other => {
                ready.vm.kill().await;
                other.map(|_| None)
            }
        }
    }

    /// Waits to be taken. None: it is not needed any more, because the pool was drained, the configuration or the program has
    /// changed, containerd has been gone for long, the VM has ended, or on SIGTERM; nothing is left then.
    ///
    /// # Errors
    /// The member's socket cannot be waited on.
    pub async fn taken(self) -> Result<Option<Taken>, MemberError> {
        let Self { slot, mut record, dismissal, path, listener, ready } = self;
        let request = tokio::select! {
            request = request(&listener) => request.map(Some).map_err(file("wait on", &path)),
            reason = dismissal.comes() => {
                tracing::debug!("a member of the warm pool ends: {reason:?}");
                Ok(None)
            }
            _ = ready.vm.exited() => Ok(None),
        };
        // A start that connects from now on finds no member.
        let removed = fs::remove_file(&path);
        drop(listener);
        if let Err(error) = removed {
            tracing::warn!(path = %path.display(), "cannot remove a socket: {error}");
        }
        match request {
            Ok(Some(HandedOver { message, fd, connection })) => {
                // From here on nothing of the pool's ends this process: its slot is free, and it does not watch any more.
                record.stage = Stage::Taken;
                slot.write(&record)?;
                Ok(Some(Taken { message, connection, fd, ready }))
            }
            other => {
                ready.vm.kill().await;
                Ok(other.map(|_| None)?)
            }
        }
    }
}

/// Warms a clone up and listens for the start that takes it. None: it is not needed any more.
async fn listening(
    slot: &Slot,
    record: &mut Record,
    dismissal: &Dismissal,
    ready: &Ready,
    config: &Config,
    path: &Path,
) -> Result<Option<AsyncFd<OwnedFd>>, MemberError> {
    record.stage = Stage::WarmingUp;
    slot.write(record)?;
    tokio::select! {
        biased;
        _ = dismissal.comes() => return Ok(None),
        warm = ready.warm_up(config) => warm?,
    }
    record.stage = Stage::Ready;
    slot.write(record)?;
    Ok(Some(publish(path).map_err(file("listen on", path))?))
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

/// Work for a member.
struct HandedOver {
    message: Vec<u8>,
    fd: OwnedFd,
    /// Closed when the member has done what it was asked.
    connection: OwnedFd,
}

/// Waits for a message with a descriptor. A connection on which none comes is of no interest.
async fn request(listener: &AsyncFd<OwnedFd>) -> io::Result<HandedOver> {
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
        if let Ok((length @ 1.., Some(fd))) = received {
            message.truncate(length);
            return Ok(HandedOver { message, fd, connection: connection.into_inner() });
        }
    }
}

/// The socket has its name when it is listened on.
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

/// Extension of a member's socket.
pub(super) const SOCKET: &str = ".sock";

/// The files of a member have its pid in their names.
const MEMBER: &str = "member-";
const VM: &str = "vm-";

fn name(prefix: &str, extension: &str) -> String {
    format!("{prefix}{}{extension}", std::process::id())
}

/// Removes what members that were killed have left.
fn sweep(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let owned = name.strip_prefix(VM).or_else(|| name.strip_prefix(MEMBER));
        let Some(pid) = owned.and_then(|name| name.split('.').next()) else { continue };
        if !Path::new("/proc").join(pid).exists() {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            match removed {
                // Another member was faster.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_dead_have_left_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["vm-1", "vm-99999999"] {
            fs::create_dir(path(name)).unwrap();
        }
        let files =
            ["member-1.sock", "member-99999999.sock", "member-99999999.new", "slot-0.lock", "slot-0.log"];
        for name in files {
            fs::write(path(name), "").unwrap();
        }
        sweep(dir.path()).unwrap();
        let mut left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["member-1.sock", "slot-0.lock", "slot-0.log", "vm-1"]);
    }
}
