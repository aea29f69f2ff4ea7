//! The volumes of the pod: a FUSE file system whose requests the host answers.
//!
//! ```text
//!   container ──> kernel ──/dev/fuse──> a task of the agent for each stream ──raw stream──> host
//! ```
//! It is mounted once, where no container sees it, and the engine binds entries of it into containers. The agent
//! has one thread, which also passes the requests on: it must never access a file of a volume itself, or it
//! would wait for its own answer. Other processes do that for it.

mod queue;
mod sockets;

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use machinen_protocol::{
    error::{ErrorKind, HasKind},
    shares::{MOUNT_POINT, QUEUES},
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::Mode,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Mutex,
    task::JoinSet,
};

use self::{queue::Queue, sockets::Sockets};
use crate::{
    channel::{Stream, Unclaimed},
    console, sys,
};

#[derive(Debug, thiserror::Error)]
pub(crate) enum ShareError {
    #[error("the volumes are mounted already")]
    Mounted,
    #[error("{given} streams are given for the volumes; it must be {QUEUES}")]
    Streams { given: usize },
    #[error("no stream has the token {token}")]
    NoStream { token: u64 },
    #[error("cannot create {MOUNT_POINT}")]
    Create(#[source] io::Error),
    #[error("cannot open /dev/fuse")]
    Device(#[source] io::Error),
    #[error("cannot mount the volumes at {MOUNT_POINT}")]
    Mount(#[source] Errno),
}

impl HasKind for ShareError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Mounted => ErrorKind::AlreadyExists,
            Self::Streams { .. } => ErrorKind::InvalidArgument,
            Self::NoStream { .. } => ErrorKind::NotFound,
            Self::Create(_) | Self::Device(_) | Self::Mount(_) => ErrorKind::Internal,
        }
    }
}

/// The volumes of the pod.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    is_mounted: Mutex<bool>,
    sockets: Arc<Sockets>,
}

impl Shares {
    /// Mounts the volumes, and passes requests on from then on.
    ///
    /// # Errors
    /// A stream is missing, the volumes are mounted, or the kernel refuses.
    pub(crate) async fn mount(&self, unclaimed: &Unclaimed, tokens: &[u64]) -> Result<(), ShareError> {
        let mut mounted = self.is_mounted.lock().await;
        let mut streams = Vec::new();
        for token in tokens.iter().copied() {
            streams.push(unclaimed.claim(token).await.ok_or(ShareError::NoStream { token })?);
        }
        if *mounted {
            return Err(ShareError::Mounted);
        }
        if streams.len() != QUEUES {
            return Err(ShareError::Streams { given: streams.len() });
        }
        let device = Arc::new(mount_file_system()?);
        *mounted = true;
        tokio::spawn(pass_on(device, Arc::clone(&self.sockets), streams));
        Ok(())
    }

    /// Keeps a stream for the next connection to a socket of the host.
    ///
    /// # Errors
    /// There is no such stream.
    pub(crate) async fn offer(&self, unclaimed: &Unclaimed, token: u64) -> Result<(), ShareError> {
        let stream = unclaimed.claim(token).await.ok_or(ShareError::NoStream { token })?;
        self.sockets.offer(stream).await;
        Ok(())
    }
}

fn mount_file_system() -> Result<AsyncFd<OwnedFd>, ShareError> {
    fs::create_dir_all(MOUNT_POINT).map_err(ShareError::Create)?;
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let device = open("/dev/fuse", flags, Mode::empty()).map_err(|errno| ShareError::Device(errno.into()))?;
    // The kernel checks permissions, for the users of any container.
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
        device.as_raw_fd()
    );
    let at = Path::new(MOUNT_POINT);
    // A container's own mount says whether programs may be set-user-ID and device nodes be opened there.
    mount(Some("machinen"), at, Some("fuse.machinen"), MsFlags::empty(), Some(options.as_str()))
        .map_err(ShareError::Mount)?;
    sys::register(device, Interest::READABLE | Interest::WRITABLE).map_err(|error| {
        // The error of the device says more than one of the unmounting would.
        let _ = umount2(at, MntFlags::MNT_DETACH);
        ShareError::Device(error)
    })
}

/// Passes requests on until a stream ends; then every access to a volume fails.
async fn pass_on(device: Arc<AsyncFd<OwnedFd>>, sockets: Arc<Sockets>, streams: Vec<Stream>) {
    let mut queues = JoinSet::new();
    for stream in streams {
        let queue = Queue { device: Arc::clone(&device), sockets: Arc::clone(&sockets), stream };
        queues.spawn(queue.run());
    }
    drop(device);
    if let Some(Ok(Err(error))) = queues.join_next().await {
        console::say(&format!("the volumes are lost: {error}"));
    }
    // With the last task the device is closed, and the kernel fails all requests.
    queues.shutdown().await;
}
