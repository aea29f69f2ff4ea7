//! The host process whose pid stands for a container.
//!
//! Clients look at `/proc/<pid>/ns/net` and friends, open files below `/proc/<pid>/root`, and signal it. The VMM's pid would
//! send them to the VMM's namespaces, the guest's pid to a stranger, so each container has one process that does nothing in
//! the container's own namespaces, with a view of the container's root file system as its root. It ends with the container,
//! and with the process that owns the VM.
//!
//! It never touches what is below its root, so it starts and ends whatever the guest does. Its root is an empty directory
//! where there can be no view: never the host's, for which a client could take it.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, umount2};
use rustix::{
    fs::CWD,
    io::Errno,
    mount::{MoveMountFlags, move_mount},
    process::{chroot, fchdir, pivot_root},
};
use tokio::{io::AsyncReadExt as _, net::unix::pipe};

use crate::{
    error::chain,
    process::{Child, Namespaces, ProcessError, ProcessExit, Sandbox, Spawn, Stdio},
    sys,
    view::{self, ContainerView, DeviceError, ViewGuest},
};

/// First argument with which a binary that owns VMs runs [`main`] instead of its own work.
pub const ARGUMENT: &str = "container-anchor";

/// The descriptor on which it finds its root.
const ROOT_FD: i32 = 3;
/// What it says when it is where it is to stay; anything else is what went wrong.
const SETTLED: &str = "settled";
/// Where its root is mounted for a moment: a directory that every host has.
const DOORWAY: &str = "/proc";

/// Why there is no anchor.
#[derive(Debug, thiserror::Error)]
pub enum AnchorError {
    #[error("cannot open the network namespace {}", path.display())]
    Netns { path: PathBuf, source: io::Error },
    #[error("cannot make a root for the container's anchor process")]
    Root(#[source] DeviceError),
    #[error("cannot start the container's anchor process")]
    Spawn(#[source] ProcessError),
    #[error("cannot hear the container's anchor process")]
    Hear(#[source] io::Error),
    #[error("the container's anchor process cannot settle: {said}")]
    Unsettled { said: String },
}

/// The anchor of a container that is being created or exists.
#[derive(Debug)]
pub struct Anchor {
    /// Ends before the process, which may be waiting for it.
    view: Option<ContainerView>,
    child: Child,
    said: pipe::Receiver,
}

impl Anchor {
    /// Starts the anchor of the container `id`, in the network namespace at `netns` or a fresh one.
    ///
    /// # Errors
    /// The namespace cannot be opened, or the process not started.
    pub fn spawn(id: &str, netns: Option<&Path>) -> Result<Self, AnchorError> {
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
        let sandbox = Sandbox {
            namespaces: Namespaces { net: netns.is_none(), mount: true, ipc: true, uts: true },
            no_new_privileges: true,
            no_core: true,
            ..Sandbox::default()
        };
        let mut spawn = Spawn::new("/proc/self/exe").args([ARGUMENT]).sandbox(sandbox);
        spawn = spawn.fd(root, ROOT_FD).stdout(Stdio::Pipe);
        if let Some(path) = netns {
            let file = File::open(path).map_err(|source| AnchorError::Netns { path: path.into(), source })?;
            spawn = spawn.join_netns(file.into());
        }
        let mut child = spawn.start().map_err(AnchorError::Spawn)?;
        let said = OwnedFd::from(child.stdout.take().expect("it was asked for"));
        let said = pipe::Receiver::from_owned_fd(said).map_err(AnchorError::Hear)?;
        Ok(Self { view, child, said })
    }

    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Waits until the process has its root: from then on its pid may be told.
    ///
    /// # Errors
    /// It has not got there.
    pub async fn settled(&mut self) -> Result<(), AnchorError> {
        let mut said = String::new();
        self.said.read_to_string(&mut said).await.map_err(AnchorError::Hear)?;
        if said == SETTLED { Ok(()) } else { Err(AnchorError::Unsettled { said }) }
    }

    /// The container is there to be looked at.
    pub(super) fn attach(&self, guest: ViewGuest) {
        if let Some(view) = &self.view {
            view.attach(guest);
        }
    }

    /// Resolves when the process has ended.
    pub(super) fn ended(&self) -> impl Future<Output = ProcessExit> + Send + 'static {
        self.child.exited()
    }

    /// Ends the view, and then the process.
    ///
    /// # Errors
    /// The kernel refuses to kill it.
    pub(super) async fn end(&mut self) -> Result<(), ProcessError> {
        if let Some(view) = &mut self.view {
            view.end().await;
        }
        self.child.kill().await.map(drop)
    }
}

/// What the anchor does: go where it belongs, give up all privileges, and wait to be killed.
pub fn main() -> ! {
    let said = match settle() {
        Ok(()) => SETTLED.to_owned(),
        Err(error) => error.to_string(),
    };
    // Whoever does not listen any more is about to end this process.
    let heard = io::stdout().write_all(said.as_bytes()).and_then(|()| io::stdout().flush());
    drop((heard, sys::inherit::take(libc::STDOUT_FILENO)));
    loop {
        nix::unistd::pause();
    }
}

/// Makes the mount that this process was given its root, and gives up the host's mounts and all capabilities.
fn settle() -> io::Result<()> {
    let root = sys::inherit::take(ROOT_FD)?;
    move_mount(&root, "", CWD, DOORWAY, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    fchdir(&root)?;
    match pivot_root(".", ".") {
        // The old root is on top of the new one after this (pivot_root(2)).
        Ok(()) => umount2(".", MntFlags::MNT_DETACH)?,
        // It is the kernel's first one (ramfs-rootfs-initramfs.rst): nothing can take its place, but something can cover it.
        Err(Errno::INVAL) => {
            move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
            chroot(".")?;
        }
        Err(error) => return Err(error.into()),
    }
    drop(root);
    sys::child::drop_capabilities()
}
