//! A member of the warm pool: a process that makes a clone and waits until a start takes it.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use machinen_base::{
    cgroup,
    fs::{FileError, remove_dir_if_exists, remove_if_exists},
    sys,
};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, listen, send, socket,
};
use tokio::io::unix::AsyncFd;

use super::{
    CloneError, MAX_MESSAGE, MemberRequest, Pool, PoolError, WarmVm,
    dismissal::Dismissal,
    slot::{MemberRecord, MemberStage, PoolSlot},
};
use crate::config::Config;

/// The errors of a member.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    /// The pool failed.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The member cannot make its clone.
    #[error("cannot make a clone for the warm pool")]
    Clone(#[from] CloneError),
    /// The start that took the member has ended.
    #[error("the start that took a member of the warm pool has ended")]
    StartEnded(#[source] io::Error),
}

/// A process that waits in its slot.
#[derive(Debug)]
pub struct Member {
    /// The slot becomes free when this is dropped.
    slot: PoolSlot,
    record: MemberRecord,
    dismissal: Dismissal,
    path: PathBuf,
    listener: AsyncFd<OwnedFd>,
    warm_vm: WarmVm,
}

/// A member that a start has taken, and that no longer belongs to the pool.
#[derive(Debug)]
pub struct TakenMember {
    /// The message of the start.
    pub message: Vec<u8>,
    connection: OwnedFd,
    fd: OwnedFd,
    warm_vm: WarmVm,
}

impl Member {
    /// Makes a clone for the slot `number`, whose locked file is `slot`. Returns None if the member is not
    /// needed, because there is no template or for a reason for which [`Member::taken`] ends; nothing is left
    /// then.
    ///
    /// # Errors
    /// The slot's files cannot be used, or the clone does not work. Nothing is left then.
    pub async fn join(
        config: &Config,
        number: u32,
        slot: OwnedFd,
        request: MemberRequest,
    ) -> Result<Option<Self>, MemberError> {
        cgroup::enter(&request.cgroups, std::process::id()).map_err(PoolError::File)?;
        let Some(pool) = Pool::of(config)? else { return Ok(None) };
        // If the configuration has changed since the slot was taken, this process belongs to another pool.
        let path = PoolSlot::path(&pool.dir, number);
        let Some(slot) = PoolSlot::inherited(path.clone(), slot)? else { return Ok(None) };
        let dismissal = Dismissal::watch(&slot, request.containerd, config)?;
        // The watch does not report what happened before it began.
        if !slot.has_name()? {
            return Ok(None);
        }
        let mut record = MemberRecord {
            pid: std::process::id(),
            stage: MemberStage::Cloning,
            ..MemberRecord::new(&request.spec, config.file.clone())
        };
        slot.write(&record)?;
        sweep(&pool.dir).map_err(FileError::at("clear", &pool.dir)).map_err(PoolError::File)?;
        let dir = pool.dir.join(name(VM, ""));
        // This is not cancelled half-way, because a VM that is being made has no owner yet that could end it.
        let Some(warm_vm) = WarmVm::clone_vm(request.spec, config, &dir).await? else { return Ok(None) };
        let path = pool.dir.join(name(MEMBER, SOCKET));
        match warm_up_and_listen(&slot, &mut record, &dismissal, &warm_vm, config, &path).await {
            Ok(Some(listener)) => Ok(Some(Self { slot, record, dismissal, path, listener, warm_vm })),
            other => {
                warm_vm.vm.kill().await;
                other.map(|_| None)
            }
        }
    }

    /// Waits until a start takes the member. Returns None if the member is no longer needed, because the pool
    /// was drained, the configuration or the program has changed, containerd has been absent for long, the VM
    /// has ended, or on SIGTERM; nothing is left then.
    ///
    /// # Errors
    /// The member's socket fails.
    pub async fn taken(self) -> Result<Option<TakenMember>, MemberError> {
        let Self { slot, mut record, dismissal, path, listener, warm_vm } = self;
        let request = tokio::select! {
            request = next_work(&listener) => request.map(Some).map_err(FileError::at("wait on", &path)),
            reason = dismissal.wait() => {
                tracing::debug!("a member of the warm pool ends: {reason:?}");
                Ok(None)
            }
            _ = warm_vm.vm.exited() => Ok(None),
        };
        // From now on a start that connects finds no member.
        let removed = fs::remove_file(&path);
        drop(listener);
        if let Err(error) = removed {
            tracing::warn!(path = %path.display(), "cannot remove a socket: {error}");
        }
        match request {
            Ok(Some(HandedWork { message, fd, connection })) => {
                // From here on nothing of the pool ends this process: its slot is free, and it watches
                // nothing any more.
                record.stage = MemberStage::Taken;
                slot.write(&record)?;
                Ok(Some(TakenMember { message, connection, fd, warm_vm }))
            }
            other => {
                warm_vm.vm.kill().await;
                Ok(other.map(|_| None).map_err(PoolError::File)?)
            }
        }
    }
}

/// Warms a clone up and listens for the start that takes it. Returns None if the member is no longer needed.
async fn warm_up_and_listen(
    slot: &PoolSlot,
    record: &mut MemberRecord,
    dismissal: &Dismissal,
    warm_vm: &WarmVm,
    config: &Config,
    path: &Path,
) -> Result<Option<AsyncFd<OwnedFd>>, MemberError> {
    record.stage = MemberStage::WarmingUp;
    slot.write(record)?;
    tokio::select! {
        biased;
        _ = dismissal.wait() => return Ok(None),
        warm = warm_vm.warm_up(config) => warm?,
    }
    record.stage = MemberStage::Ready;
    slot.write(record)?;
    let listener = publish(path).map_err(FileError::at("listen on", path)).map_err(PoolError::File)?;
    Ok(Some(listener))
}

impl TakenMember {
    /// Confirms to the start that this process does its work from now on. Returns the listener that the start
    /// has passed, and the clone.
    ///
    /// # Errors
    /// The start has given up waiting and uses another process. Nothing is left here.
    pub async fn accept(self) -> Result<(UnixListener, WarmVm), MemberError> {
        match send(self.connection.as_raw_fd(), b"1", MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => Ok((self.fd.into(), self.warm_vm)),
            Err(error) => {
                self.warm_vm.vm.kill().await;
                Err(MemberError::StartEnded(error.into()))
            }
        }
    }
}

/// The work that a start has handed over.
struct HandedWork {
    message: Vec<u8>,
    fd: OwnedFd,
    /// Closed when the member has confirmed.
    connection: OwnedFd,
}

/// Waits for a message with a descriptor. A connection without one is ignored.
async fn next_work(listener: &AsyncFd<OwnedFd>) -> io::Result<HandedWork> {
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
            return Ok(HandedWork { message, fd, connection: connection.into_inner() });
        }
    }
}

/// The socket gets its name only when it is being listened on.
fn publish(path: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let unpublished = path.with_extension("new");
    remove_if_exists(&unpublished)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(&unpublished)?)?;
    listen(&listener, Backlog::new(16)?)?;
    fs::rename(&unpublished, path)?;
    sys::async_fd(listener)
}

/// Extension of a member's socket.
pub(super) const SOCKET: &str = ".sock";

/// A member's files have its pid in their names.
const MEMBER: &str = "member-";
const VM: &str = "vm-";

fn name(prefix: &str, extension: &str) -> String {
    format!("{prefix}{}{extension}", std::process::id())
}

/// Removes the files of members that were killed.
fn sweep(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let owned = name.strip_prefix(VM).or_else(|| name.strip_prefix(MEMBER));
        let Some(pid) = owned.and_then(|name| name.split('.').next()) else { continue };
        if !Path::new("/proc").join(pid).exists() {
            // Another member may have removed the file meanwhile.
            if path.is_dir() {
                remove_dir_if_exists(&path)?
            } else {
                remove_if_exists(&path)?
            };
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_ended_processes_are_removed() {
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
