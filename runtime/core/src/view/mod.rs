//! A view of a container's root file system on the host, as it is in the guest at this moment.
//!
//! ```text
//!   tool ──> /proc/PID/root ──> host kernel ──FUSE──> ContainerView ──raw stream──> agent ──> server
//! ```
//! The kernel's FUSE client is made for servers that are not trusted, so it may face the guest. An image of a
//! file system that a guest has written must not be mounted on the host. All messages are checked and bounded
//! nevertheless, and the host itself negotiates the connection, so the guest has no influence on it. Nothing
//! is cached: every access asks the guest.
//!
//! Nothing of the view exists in the guest before the first access. If the guest does not answer, or answers
//! nonsense, the access fails and the next one tries again. One access can be several requests. So when a
//! guest has missed a deadline, a new server is requested at once, and all requests fail until that is
//! answered.

mod answers;
mod device;
mod harden;
mod session;
#[cfg(test)]
mod tests;

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use machinen_base::error::chain;
use machinen_protocol::fuse::MAX_REQUEST;
use machinen_vm::{
    BoxedStream, Vm, VmError,
    agent::{self, AgentError},
};
use tokio::{
    sync::{Semaphore, watch},
    task::JoinHandle,
};

use device::{Device, DeviceRead};

pub(crate) use device::empty;
pub use device::{DeviceError, DeviceStep};

/// The type of a view in /proc/self/mountinfo.
pub(crate) const MOUNT_TYPE: &str = "fuse.machinen";

/// The longest wait for the guest: for the reply to a request, or for a server to be opened.
const REPLY_DEADLINE: Duration = Duration::from_secs(30);

/// A mounted view. Dropping it ends the connection to the kernel.
#[derive(Debug)]
pub(crate) struct ContainerView {
    guest: watch::Sender<Option<ViewGuest>>,
    task: JoinHandle<()>,
}

/// The container whose files a view shows.
#[derive(Debug, Clone)]
pub(crate) struct ViewGuest {
    pub(crate) vm: Vm,
    pub(crate) agent: agent::Client,
    pub(crate) container: String,
    /// Acquired while a stream is open that the agent has not claimed.
    pub(crate) unclaimed: Arc<Semaphore>,
    /// What is mounted in the container's root file system is not shown.
    pub(crate) without_mounts: bool,
}

/// Why no server could be opened in the guest.
#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("the guest did not answer within {REPLY_DEADLINE:?}")]
    Deadline,
}

impl OpenError {
    fn is_timeout(&self) -> bool {
        matches!(self, Self::Deadline | Self::Agent(AgentError::Deadline { .. }))
    }
}

impl ContainerView {
    /// Makes a view for the container `id`, and its mount, which is in no mount namespace yet and is to
    /// become a root directory. Until [`ContainerView::attach`] only the attributes of the root are served.
    /// Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The host has no FUSE.
    pub(crate) fn mount(id: &str) -> Result<(Self, OwnedFd), DeviceError> {
        let (device, root) = Device::mount()?;
        let guest = watch::Sender::new(None);
        let task = tokio::spawn(serve(id.to_owned(), device, guest.subscribe()));
        Ok((Self { guest, task }, root))
    }

    /// Serves the container's files from now on.
    pub(crate) fn attach(&self, guest: ViewGuest) {
        self.guest.send_replace(Some(guest));
    }

    /// Ends the connection: accesses that wait for a reply, and all later ones, fail.
    pub(crate) async fn end(&mut self) {
        self.task.abort();
        // The error that the task was aborted is expected.
        let _ = (&mut self.task).await;
    }
}

impl Drop for ContainerView {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl ViewGuest {
    async fn open(&self) -> Result<BoxedStream, OpenError> {
        let open = async {
            let _unclaimed = self.unclaimed.acquire().await.expect("never closed");
            let (token, stream) = self.vm.open_stream().await?;
            self.agent.open_view(&self.container, token, self.without_mounts).await?;
            Ok(stream)
        };
        tokio::time::timeout(REPLY_DEADLINE, open).await.map_err(|_| OpenError::Deadline)?
    }
}

/// Runs a session with all that a guest sends, from the first request at the device on; for fuzzing.
#[cfg(fuzzing)]
pub async fn session(device: OwnedFd, guest: BoxedStream) {
    let device = Device::over(device).expect("a descriptor that can be watched");
    let mut buffer = vec![0; MAX_REQUEST];
    if let Ok(DeviceRead::Request(first)) = device.read(&mut buffer).await {
        session::run(&device, guest, first, &mut buffer).await;
    }
}

/// Serves the kernel until the view is unmounted.
async fn serve(id: String, device: Device, mut guest: watch::Receiver<Option<ViewGuest>>) {
    match serve_guest(&id, &device, &mut guest).await {
        Ok(DeviceRead::Unmounted) => tracing::debug!(id, "the view of the container's files was unmounted"),
        Ok(DeviceRead::Request(_)) => {}
        Err(error) => tracing::error!(id, "the container's files are not visible any more: {error}"),
    }
}

async fn serve_guest(
    id: &str,
    device: &Device,
    guest: &mut watch::Receiver<Option<ViewGuest>>,
) -> std::io::Result<DeviceRead> {
    let mut buffer = vec![0; MAX_REQUEST];
    // The kernel's first request negotiates the connection, which is not for the guest, attached or not.
    match device.read(&mut buffer).await? {
        DeviceRead::Unmounted => return Ok(DeviceRead::Unmounted),
        DeviceRead::Request(first) => answers::without_guest(device, first, &buffer)?,
    }
    let guest = loop {
        tokio::select! {
            read = device.read(&mut buffer) => match read? {
                DeviceRead::Unmounted => return Ok(DeviceRead::Unmounted),
                DeviceRead::Request(request) => answers::without_guest(device, request, &buffer)?,
            },
            attached = guest.wait_for(Option::is_some) => match attached.ok().and_then(|guest| guest.clone()) {
                Some(guest) => break guest,
                None => return Ok(DeviceRead::Unmounted),
            },
        }
    };
    requests(id, device, &mut buffer, || guest.open()).await
}

/// Serves requests by a server in the guest, which `open` requests.
async fn requests<Opening: Future<Output = Result<BoxedStream, OpenError>>>(
    id: &str,
    device: &Device,
    buffer: &mut [u8],
    open: impl Fn() -> Opening,
) -> std::io::Result<DeviceRead> {
    let mut opened = None;
    // The request for a new server, while the guest is silent.
    let mut reopening = None;
    loop {
        let read = tokio::select! {
            biased;
            found = async { reopening.as_mut().expect("checked").await }, if reopening.is_some() => {
                reopening = None;
                // Without a server, the next access waits for the full deadline again.
                opened = Result::ok(found);
                continue;
            }
            read = device.read(buffer) => read?,
        };
        let DeviceRead::Request(request) = read else { return Ok(DeviceRead::Unmounted) };
        if answers::by_host(device, request)? || !request.is_answered() {
            // FORGET is about an inode of a server that has ended.
            continue;
        }
        if reopening.is_some() {
            device.refuse(request, libc::EIO)?;
            continue;
        }
        let stream = match opened.take() {
            Some(stream) => Ok(stream),
            None => open().await,
        };
        let silent = match stream {
            Ok(stream) => match session::run(device, stream, request, buffer).await {
                session::SessionEnd::Unmounted => return Ok(DeviceRead::Unmounted),
                session::SessionEnd::Device(error) => return Err(error),
                end => {
                    tracing::warn!(id, "an access to the container's files failed: {}", chain(&end));
                    matches!(end, session::SessionEnd::Deadline)
                }
            },
            Err(error) => {
                tracing::warn!(id, "the container's files cannot be accessed: {}", chain(&error));
                device.refuse(request, libc::EIO)?;
                error.is_timeout()
            }
        };
        if silent {
            reopening = Some(Box::pin(open()));
        }
    }
}
