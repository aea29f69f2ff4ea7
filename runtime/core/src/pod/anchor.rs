//! The host process whose pid stands for a container.
//!
//! Clients look at `/proc/<pid>/ns/net` and the other namespaces, open files below `/proc/<pid>/root`, and
//! signal the pid. The VMM's pid would lead them to the VMM's namespaces, and a pid of the guest to an
//! unrelated process. So each container has one idle process on the host, in the container's own namespaces,
//! with a view of the container's root file system as its root. The anchor ends with the container and with
//! the process that owns the VM.
//!
//! The anchor never accesses files below its root, so it starts and ends whatever the guest does. If there
//! can be no view, its root is an empty directory: never the host's root, which a client could mistake for
//! the container's.

use std::{
    io::{self, Write as _},
    os::fd::OwnedFd,
    path::PathBuf,
};

use machinen_base::{
    error::chain,
    netns,
    process::{Child, Jail, Namespaces, ProcessError, ProcessExit, Stdio},
    reexec::EntryPoint,
    sys,
};
use machinen_netlink::NetlinkSocket;
use nix::mount::{MntFlags, umount2};
use rustix::{
    fs::CWD,
    io::Errno,
    mount::{MoveMountFlags, move_mount},
    process::{chroot, fchdir, pivot_root},
};
use tokio::{io::AsyncReadExt as _, net::unix::pipe, task::spawn_blocking};

use super::{cover::Cover, namespaces::AnchorNamespaces};
use crate::view::{self, ContainerView, DeviceError, ViewGuest};

/// The process whose pid clients get; it inherits its root.
pub const ENTRY_POINT: EntryPoint = EntryPoint { name: "container-anchor", main: |_| main() };

/// The descriptor on which the anchor inherits its root.
const ROOT_FD: i32 = 3;
/// What the anchor reports when it has entered its root; any other text is an error message.
const IN_ROOT: &str = "in root";
/// Where the root is mounted temporarily. Every host has this directory.
const TEMPORARY_MOUNT: &str = "/proc";
/// The index of the loopback interface of every network namespace.
const LOOPBACK: u32 = 1;

/// Why an anchor could not be started.
#[derive(Debug, thiserror::Error)]
pub enum AnchorError {
    /// The container's network namespace cannot be opened.
    #[error("cannot open the network namespace {}", path.display())]
    Netns {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// No network namespace can be made.
    #[error("cannot make a network namespace for the container")]
    NewNetns(#[source] io::Error),
    /// The device for the view of the container's files cannot be opened.
    #[error("cannot make a root for the container's anchor process")]
    Root(#[source] DeviceError),
    /// The anchor's process cannot be started.
    #[error("cannot start the container's anchor process")]
    Spawn(#[source] ProcessError),
    /// The anchor's report cannot be read.
    #[error("cannot read the report of the container's anchor process")]
    Report(#[source] io::Error),
    /// The anchor could not enter its root.
    #[error("the container's anchor process cannot enter its root: {report}")]
    NoRoot {
        /// The anchor's report.
        report: String,
    },
}

/// The anchor of a container that is being created or exists.
#[derive(Debug)]
pub struct Anchor {
    /// Another view, where the caller has mounted the root file system.
    cover: Option<Cover>,
    /// Ends before the process, which may be waiting for a reply of the view.
    view: Option<ContainerView>,
    child: Child,
    report: pipe::Receiver,
    netns: OwnedFd,
}

impl Anchor {
    /// Starts the anchor of the container `id`, in the network namespace at `netns` or a new one, and in the `joined`
    /// namespaces or new ones of their kinds.
    ///
    /// # Errors
    /// The namespace cannot be opened, or the process cannot be started.
    pub(super) async fn spawn(
        id: &str,
        netns: Option<PathBuf>,
        joined: AnchorNamespaces,
    ) -> Result<Self, AnchorError> {
        let netns = match netns {
            Some(path) => open_netns(path).await?,
            None => new_netns().await?,
        };
        let (view, root) = match ContainerView::mount(id) {
            Ok((view, root)) => (Some(view), root),
            Err(error) => {
                tracing::warn!(
                    id,
                    "the container's files will not be visible on the host: {}",
                    chain(&error)
                );
                (None, view::empty().map_err(AnchorError::Root)?)
            }
        };
        let jail = Jail {
            namespaces: Namespaces {
                mount: true,
                ipc: joined.ipc.is_none(),
                uts: joined.uts.is_none(),
                ..Namespaces::default()
            },
            empty_environment: true,
            new_keyring: true,
            no_new_privileges: true,
            no_core: true,
            ..Jail::default()
        };
        let mut spawn = ENTRY_POINT.spawn().jail(jail);
        let own_netns = netns.try_clone().map_err(AnchorError::NewNetns)?;
        spawn = spawn.fd(root, ROOT_FD).stdout(Stdio::Pipe).join_netns(own_netns);
        spawn = spawn.join_namespaces(joined.ipc.into_iter().chain(joined.uts));
        let mut child = spawn.start().map_err(AnchorError::Spawn)?;
        let report = OwnedFd::from(child.stdout.take().expect("it was asked for"));
        let report = pipe::Receiver::from_owned_fd(report).map_err(AnchorError::Report)?;
        Ok(Self { cover: None, view, child, report, netns })
    }

    /// The anchor's pid on the host.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// The network namespace that the process is in.
    ///
    /// # Errors
    /// The errors of dup(2).
    pub(super) fn netns(&self) -> io::Result<OwnedFd> {
        self.netns.try_clone()
    }

    /// Waits until the process has entered its root. Its pid may only be passed to clients after that.
    ///
    /// # Errors
    /// The process could not enter its root.
    pub async fn wait_for_root(&mut self) -> Result<(), AnchorError> {
        let mut report = String::new();
        self.report.read_to_string(&mut report).await.map_err(AnchorError::Report)?;
        if report == IN_ROOT { Ok(()) } else { Err(AnchorError::NoRoot { report }) }
    }

    /// Connects the view to the guest, because the container exists there now.
    pub(super) fn attach(&self, guest: ViewGuest) {
        if let Some(view) = &self.view {
            view.attach(guest);
        }
    }

    /// Resolves when the process has ended.
    pub(super) fn ended(&self) -> impl Future<Output = ProcessExit> + Send + 'static {
        self.child.exited()
    }

    /// Keeps a cover, which is to end with this anchor.
    pub(super) fn keep(&mut self, cover: Cover) {
        self.cover = Some(cover);
    }

    /// Ends the views and then the process.
    ///
    /// # Errors
    /// The kernel refuses to kill the process.
    pub(super) async fn end(&mut self) -> Result<(), ProcessError> {
        if let Some(cover) = self.cover.take()
            && let Err(error) = cover.remove().await
        {
            tracing::warn!("{}", chain(&error));
        }
        if let Some(view) = &mut self.view {
            view.end().await;
        }
        self.child.kill().await.map(drop)
    }
}

/// Makes a network namespace in which the loopback interface is switched on, as runc does.
async fn new_netns() -> Result<OwnedFd, AnchorError> {
    let switch_on =
        || NetlinkSocket::new()?.set_link(LOOPBACK, "lo", true, Vec::new()).map_err(io::Error::other);
    let made = spawn_blocking(move || netns::inside_new(switch_on)).await;
    let made = made.unwrap_or_else(|error| Err(io::Error::other(error)));
    made.map(|(namespace, ())| namespace).map_err(AnchorError::NewNetns)
}

/// Opens a network namespace by its path, in a thread of its own: the file system that the path leads to may
/// not answer.
///
/// # Errors
/// The errors of open(2), or the path is not that of a namespace.
async fn open_netns(path: PathBuf) -> Result<OwnedFd, AnchorError> {
    let open = {
        let path = path.clone();
        move || netns::open(&path)
    };
    let opened = spawn_blocking(open).await.unwrap_or_else(|error| Err(io::Error::other(error)));
    opened.map_err(|source| AnchorError::Netns { path, source })
}

/// What the anchor process does: enter its root and namespaces, give up all privileges, and wait to be
/// killed.
fn main() -> ! {
    let report = match enter_root() {
        Ok(()) => IN_ROOT.to_owned(),
        Err(error) => error.to_string(),
    };
    // A write fails if the parent has closed the pipe; it is about to kill this process then.
    let written = io::stdout().write_all(report.as_bytes()).and_then(|()| io::stdout().flush());
    drop((written, sys::inherit::take(libc::STDOUT_FILENO)));
    loop {
        nix::unistd::pause();
    }
}

/// Makes the inherited mount the root of this process, and gives up the host's mounts and all capabilities.
fn enter_root() -> io::Result<()> {
    let root = sys::inherit::take(ROOT_FD)?;
    move_mount(&root, "", CWD, TEMPORARY_MOUNT, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    fchdir(&root)?;
    match pivot_root(".", ".") {
        // The old root is on top of the new one after this (pivot_root(2)).
        Ok(()) => umount2(".", MntFlags::MNT_DETACH)?,
        // The current root is the kernel's initial root file system, which pivot_root(2) cannot replace
        // (ramfs-rootfs-initramfs.rst), but which another mount can cover.
        Err(Errno::INVAL) => {
            move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
            chroot(".")?;
        }
        Err(error) => return Err(error.into()),
    }
    drop(root);
    sys::drop_capabilities()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn only_a_namespace_is_joined() {
        let dir = tempfile::tempdir().unwrap();
        let (fifo, file) = (dir.path().join("fifo"), dir.path().join("file"));
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::write(&file, "").unwrap();
        for path in [fifo, file, "/dev/null".into()] {
            let opened =
                timeout(Duration::from_secs(10), open_netns(path.clone())).await.expect("it does not wait");
            let AnchorError::Netns { path: named, source } = opened.unwrap_err() else {
                panic!("another error")
            };
            assert_eq!((named, source.to_string().as_str()), (path, "it is not a namespace"));
        }
        assert!(open_netns("/proc/self/ns/net".into()).await.is_ok());
    }
}
