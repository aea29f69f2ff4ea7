//! AF_VSOCK in the guest, Unix sockets on the host: a vhost-device-vsock daemon for each VM.
//!
//! ```text
//!   <dir>/vsock/vhost.sock     the daemon listens, QEMU inherits a connection to it
//!   <dir>/vsock/vm.vsock       the daemon listens, the host dials: "CONNECT <port>\n" -> "OK <number>\n"
//!   <dir>/vsock/vm.vsock_1024  the host listens, the daemon dials for the guest
//! ```

use std::{
    fs::{self, File},
    future::poll_fn,
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{fs::chown, net::UnixStream as StdUnixStream},
    },
    path::{Path, PathBuf},
    sync::{Mutex as StdMutex, PoisonError},
    task::Poll,
};

use machinen_base::{
    fs::{create_new_private_dir, remove_dir_if_exists},
    process::{Child, ProcessExit, ReservedUser, RunAs, Spawn, Stdio},
    sys,
};
use machinen_protocol::{STREAM_PORT, control_port};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
};

use super::{BoxedStream, PRIVATE_CID, VmChannelError, daemon_jail};
use crate::bounded_log::BoundedLog;

/// Longest answer to CONNECT that is read, bytes.
const MAX_ANSWER: usize = 32;

/// Bytes of a stream that the daemon buffers for a host that does not read: as many as the guest's kernel
/// allows in flight (vsock(7), SO_VM_SOCKETS_BUFFER_SIZE). With fewer the guest waits more often. With more
/// the guest waits forever, since the daemon acknowledges data only when three quarters of its buffer have
/// been used.
const BUFFER: usize = 256 << 10;

#[derive(Debug)]
pub(super) struct VhostUser {
    daemon: Child,
    sockets: Sockets,
    /// None when the control stream is open.
    control: StdMutex<Option<UnixListener>>,
    /// The user that the daemon runs as.
    _user: ReservedUser,
}

/// The directory of the sockets. Dropping this removes the directory.
#[derive(Debug)]
struct Sockets {
    path: PathBuf,
    /// Sockets are addressed through this descriptor, because their paths may be too long for a socket
    /// address.
    dir: File,
}

impl VhostUser {
    /// Returns the socket that QEMU inherits.
    pub(super) async fn prepare(program: &Path, dir: &Path) -> Result<(Self, OwnedFd), VmChannelError> {
        let failed = |action| move |source| VmChannelError::Host { action, source };
        // Not the user of QEMU: neither may trace the other.
        let user = ReservedUser::reserve().map_err(VmChannelError::User)?;
        let identity = user.run_as(Vec::new());
        let sockets = Sockets::create(dir.join("vsock"), &identity).map_err(failed("make a directory"))?;
        let control_name = format!("vm.vsock_{}", control_port(PRIVATE_CID));
        let control = UnixListener::bind(sockets.address(&control_name)).map_err(failed("listen"))?;
        let owned = chown(sockets.path.join(&control_name), Some(identity.uid), Some(identity.gid));
        owned.map_err(failed("change the owner of a socket"))?;

        let created = CreationWatch::watch(&sockets.path).map_err(failed("watch a directory"))?;
        let (stderr, stderr_writer) = io::pipe().map_err(failed("make a pipe"))?;
        let daemon = Spawn::new(program)
            .args([
                "--vm",
                &format!(
                    "guest-cid={PRIVATE_CID},socket=vhost.sock,uds-path=vm.vsock,tx-buffer-size={BUFFER}"
                ),
            ])
            .stderr(Stdio::Fd(stderr_writer.into()))
            .jail(daemon_jail::jail(&sockets.path, identity))
            .start()
            .map_err(VmChannelError::Daemon)?;
        let stderr =
            tokio::net::unix::pipe::Receiver::from_owned_fd(stderr.into()).map_err(failed("read a pipe"))?;
        let printed = BoundedLog::default();
        let reading = tokio::spawn(printed.clone().read(stderr, None));

        let connection = tokio::select! {
            connection = created.connect(&sockets, "vhost.sock") => connection.map_err(failed("connect to the daemon"))?,
            exit = daemon.exited() => {
                // The daemon's error messages are complete when the pipe has ended.
                reading.await.ok();
                return Err(ended(exit, &printed));
            }
        };
        Ok((Self { daemon, sockets, control: StdMutex::new(Some(control)), _user: user }, connection.into()))
    }

    /// Accepts a stream to the control port.
    pub(super) async fn accept(&self) -> Result<BoxedStream, VmChannelError> {
        let accepted = poll_fn(|cx| match &*self.control() {
            Some(listener) => listener.poll_accept(cx),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        });
        match accepted.await {
            Ok((stream, _)) => Ok(Box::new(stream)),
            Err(source) => Err(VmChannelError::Host { action: "accept a stream", source }),
        }
    }

    pub(super) fn stop_listening(&self) {
        self.control().take();
    }

    fn control(&self) -> std::sync::MutexGuard<'_, Option<UnixListener>> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn dial(&self) -> Result<BoxedStream, VmChannelError> {
        let mut stream =
            UnixStream::connect(self.sockets.address("vm.vsock")).await.map_err(VmChannelError::Closed)?;
        connect(&mut stream).await.map_err(VmChannelError::Closed)?;
        Ok(Box::new(stream))
    }

    pub(super) async fn close(&self) -> Result<(), VmChannelError> {
        let killed = self.daemon.kill().await.map_err(VmChannelError::Daemon);
        let removed = self.sockets.remove();
        killed?;
        removed.map_err(|source| VmChannelError::Host { action: "remove the sockets", source })
    }
}

fn ended(exit: ProcessExit, printed: &BoundedLog) -> VmChannelError {
    let text = printed.excerpt();
    VmChannelError::DaemonEnded(if text.is_empty() { exit.to_string() } else { format!("{exit}: {text}") })
}

/// Asks the daemon for the guest's stream port. The answer is read byte by byte, because bytes of the guest
/// may follow it.
async fn connect(stream: &mut UnixStream) -> io::Result<()> {
    stream.write_all(format!("CONNECT {STREAM_PORT}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        if answer.len() == MAX_ANSWER {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a long answer to CONNECT"));
        }
        answer.push(stream.read_u8().await?);
    }
    if !answer.starts_with(b"OK ") {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer to CONNECT that is not OK"));
    }
    Ok(())
}

impl Sockets {
    fn create(path: PathBuf, identity: &RunAs) -> io::Result<Self> {
        create_new_private_dir(&path)?;
        let sockets = File::open(&path).map(|dir| Self { path: path.clone(), dir });
        let owned = sockets.and_then(|sockets| {
            chown(&sockets.path, Some(identity.uid), Some(identity.gid))?;
            Ok(sockets)
        });
        if owned.is_err() {
            // The first failure is the one to report.
            fs::remove_dir(&path).ok();
        }
        owned
    }

    fn address(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.dir.as_raw_fd()).into()
    }

    fn remove(&self) -> io::Result<()> {
        remove_dir_if_exists(&self.path).map(drop)
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!(path = %self.path.display(), "cannot remove the sockets of a VM: {error}");
        }
    }
}

/// Reports when files appear in a directory.
struct CreationWatch {
    inotify: Inotify,
    ready: tokio::io::unix::AsyncFd<OwnedFd>,
}

impl CreationWatch {
    fn watch(dir: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        inotify.add_watch(dir, AddWatchFlags::IN_CREATE)?;
        let ready = sys::async_fd(inotify.as_fd().try_clone_to_owned()?)?;
        Ok(Self { inotify, ready })
    }

    /// Connects to a socket as soon as it listens.
    async fn connect(&self, sockets: &Sockets, name: &str) -> io::Result<StdUnixStream> {
        loop {
            let mut ready = self.ready.readable().await?;
            match self.inotify.read_events() {
                Ok(events) if events.iter().any(|event| event.name.as_deref() == Some(name.as_ref())) => {
                    break;
                }
                Ok(_) => {}
                Err(nix::Error::EAGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
        // The file appears at bind(2). No event reports the listen(2) that follows.
        loop {
            match StdUnixStream::connect(sockets.address(name)) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    tokio::task::yield_now().await;
                }
                result => return result,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn myself() -> RunAs {
        RunAs { uid: nix::unistd::getuid().as_raw(), gid: nix::unistd::getgid().as_raw(), groups: vec![] }
    }

    #[tokio::test]
    async fn a_socket_is_found_when_it_appears_however_long_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120));
        fs::create_dir(&deep).unwrap();
        let sockets = Sockets::create(deep.join("vsock"), &myself()).unwrap();
        let created = CreationWatch::watch(&sockets.path).unwrap();
        let (connected, listener) = tokio::join!(created.connect(&sockets, "a"), async {
            File::create(sockets.path.join("other")).unwrap();
            UnixListener::bind(sockets.address("a")).unwrap()
        });
        connected.unwrap();
        drop(listener);
        drop(sockets);
        assert!(!deep.join("vsock").exists());
    }

    #[tokio::test]
    async fn connect_is_asked_for_and_checked() {
        for (answer, good) in
            [("OK 1073741824\nrest", true), ("NO\n", false), ("OK 1", false), (&"O".repeat(99), false)]
        {
            let (mut host, mut daemon) = UnixStream::pair().unwrap();
            daemon.write_all(answer.as_bytes()).await.unwrap();
            daemon.shutdown().await.unwrap();
            assert_eq!(connect(&mut host).await.is_ok(), good, "{answer:?}");
            let mut asked = [0; 13];
            daemon.read_exact(&mut asked).await.unwrap();
            assert_eq!(&asked, b"CONNECT 1025\n");
            if good {
                let mut rest = String::new();
                host.read_to_string(&mut rest).await.unwrap();
                assert_eq!(rest, "rest");
            }
        }
    }

    #[tokio::test]
    async fn a_daemon_that_ends_is_quoted_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        // It has not the options of the daemon.
        let error = VhostUser::prepare("/bin/sh".as_ref(), dir.path()).await.unwrap_err();
        assert!(error.to_string().contains("exited with status 2: "), "{error}");
        let error = VhostUser::prepare("/nowhere/vhost-device-vsock".as_ref(), dir.path()).await;
        assert!(machinen_base::error::chain(&error.unwrap_err()).contains("make setup"));
        assert!(!dir.path().join("vsock").exists());
    }
}
