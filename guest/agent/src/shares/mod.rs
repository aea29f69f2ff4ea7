//! The volumes of the pod: a FUSE file system whose requests the host answers.
//!
//! ```text
//!   container ──> kernel ──/dev/fuse──> a task of the agent for each stream ──raw stream──> host
//! ```
//! It is mounted once, where no container sees it, and the engine binds entries of it into containers. The agent
//! has one thread, which also passes the requests on: it must never access a file of a volume itself, or it
//! would wait for its own answer. Other processes do that for it.

mod queue;
mod replaced;
mod sockets;

use std::{
    collections::HashMap,
    ffi::OsString,
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStringExt as _,
    },
    path::Path,
    sync::{Arc, Weak},
};

use machinen_protocol::{
    error::{ErrorKind, HasKind},
    shares::{MOUNT_POINT, QUEUES, ShareEntry},
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
    task::{JoinSet, spawn_blocking},
};

use self::{
    queue::Queue,
    replaced::{Data, Renaming},
    sockets::Sockets,
};
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
    #[error("{entry:?} is no directory of the host in the volumes")]
    Entry { entry: String },
    #[error("cannot notify the processes that watch the volume {entry}")]
    Notify { entry: String, source: io::Error },
}

impl HasKind for ShareError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Mounted => ErrorKind::AlreadyExists,
            Self::Streams { .. } | Self::Entry { .. } => ErrorKind::InvalidArgument,
            Self::Notify { .. } => ErrorKind::FailedPrecondition,
            Self::NoStream { .. } => ErrorKind::NotFound,
            Self::Create(_) | Self::Device(_) | Self::Mount(_) => ErrorKind::Internal,
        }
    }
}

/// The volumes of the pod.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    /// The device of the file system, which is closed when a stream ends.
    device: Mutex<Option<Weak<AsyncFd<OwnedFd>>>>,
    sockets: Arc<Sockets>,
    renaming: Arc<Renaming>,
    /// What the links `..data` lead to. Locked while processes are notified.
    data: Mutex<HashMap<ShareEntry, Data>>,
}

impl Shares {
    /// Mounts the volumes, and passes requests on from then on.
    ///
    /// # Errors
    /// A stream is missing, the volumes are mounted, or the kernel refuses.
    pub(crate) async fn mount(&self, unclaimed: &Unclaimed, tokens: &[u64]) -> Result<(), ShareError> {
        let mut mounted = self.device.lock().await;
        let mut streams = Vec::new();
        for token in tokens.iter().copied() {
            streams.push(unclaimed.claim(token).await.ok_or(ShareError::NoStream { token })?);
        }
        if mounted.is_some() {
            return Err(ShareError::Mounted);
        }
        if streams.len() != QUEUES {
            return Err(ShareError::Streams { given: streams.len() });
        }
        let device = Arc::new(mount_file_system()?);
        *mounted = Some(Arc::downgrade(&device));
        tokio::spawn(pass_on(device, Arc::clone(&self.sockets), Arc::clone(&self.renaming), streams));
        Ok(())
    }

    /// Learns where the link `..data` of a volume leads, and notifies the processes that watch the volume if it has led
    /// elsewhere. Without a target the volume is not needed any more.
    ///
    /// # Errors
    /// There is no such volume, or the kernel refuses a notification.
    pub(crate) async fn replace_data(&self, name: &str, target: Vec<u8>) -> Result<(), ShareError> {
        let entry = ShareEntry::of_name(name).filter(|entry| !entry.is_file);
        let device = self.device.lock().await.clone();
        let (Some(entry), Some(device)) = (entry, device) else {
            return Err(ShareError::Entry { entry: name.to_owned() });
        };
        let mut data = self.data.lock().await;
        let former = data.remove(&entry);
        if target.is_empty() {
            return Ok(());
        }
        let renaming = Arc::clone(&self.renaming);
        let target = OsString::from_vec(target);
        let replace = move || Data::replace(entry, target, former, &renaming, &device);
        let failed = |source| ShareError::Notify { entry: name.to_owned(), source };
        let (replaced, notified) =
            spawn_blocking(replace).await.map_err(|error| failed(io::Error::other(error)))?;
        data.insert(entry, replaced);
        notified.map_err(failed)
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
async fn pass_on(
    device: Arc<AsyncFd<OwnedFd>>,
    sockets: Arc<Sockets>,
    renaming: Arc<Renaming>,
    streams: Vec<Stream>,
) {
    let mut queues = JoinSet::new();
    let turn = Arc::new(Mutex::new(()));
    for stream in streams {
        let (device, sockets) = (Arc::clone(&device), Arc::clone(&sockets));
        let (renaming, turn) = (Arc::clone(&renaming), Arc::clone(&turn));
        let queue = Queue { device, sockets, renaming, turn, stream, unsent: Vec::new() };
        queues.spawn(queue.run());
    }
    drop(device);
    if let Some(Ok(Err(error))) = queues.join_next().await {
        console::say(&format!("the volumes are lost: {error}"));
    }
    // With the last task the device is closed, and the kernel fails all requests.
    queues.shutdown().await;
}
