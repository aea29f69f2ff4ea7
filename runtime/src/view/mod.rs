//! A container's root file system on the host, as it is in the guest at this moment.
//!
//! ```text
//!   tool ──> /proc/PID/root ──> host's kernel ──FUSE──> View ──raw stream──> agent ──> a process in the guest
//! ```
//! The kernel's FUSE client is made for servers that nobody trusts, so it may face the guest; no file system image of the
//! guest's may be mounted here. What passes is checked and bounded all the same, and what is negotiated is answered on this
//! side, so that the guest has no say in it. Nothing is cached: every access asks the guest.
//!
//! Until somebody looks, nothing of it exists in the guest. A guest that does not answer, or answers nonsense, costs whoever
//! looks an error; the next access asks anew. One access can be several requests, so a guest that has missed a deadline is
//! asked once more, for somebody who serves requests, and until that is answered every request fails at once.

mod answers;
mod device;
mod session;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::agent::{self, AgentError};
use crate::error::chain;
use crate::vm::{BoxedStream, Vm, VmError};
pub(crate) use device::empty;
use device::{Device, Read};
pub use device::{DeviceError, Step};
use machinen_protocol::fuse::MAX_REQUEST;

/// Longest wait for the guest: for one request, or for somebody there who serves requests.
const PATIENCE: Duration = Duration::from_secs(30);

/// A mounted view; who holds it holds the connection to the kernel.
#[derive(Debug)]
pub(crate) struct View {
    guest: watch::Sender<Option<Guest>>,
    task: JoinHandle<()>,
}

/// Where the files are.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) vm: Vm,
    pub(crate) agent: agent::Client,
    pub(crate) container: String,
    /// Held while a stream is open that the agent has not claimed.
    pub(crate) unclaimed: Arc<Semaphore>,
}

/// Why nobody in the guest serves a view.
#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("the guest did not answer within {PATIENCE:?}")]
    Deadline,
}

impl OpenError {
    fn is_silence(&self) -> bool {
        matches!(self, Self::Deadline | Self::Agent(AgentError::Deadline { .. }))
    }
}

impl View {
    /// A view for the container `id`, and the mount to be made a root of; it is mounted nowhere yet. Requests wait until the
    /// container is there. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The host has no FUSE.
    pub(crate) fn mount(id: &str) -> Result<(Self, OwnedFd), DeviceError> {
        let (device, root) = Device::mount()?;
        let guest = watch::Sender::new(None);
        let task = tokio::spawn(serve(id.to_owned(), device, guest.subscribe()));
        Ok((Self { guest, task }, root))
    }

    /// The container is there.
    pub(crate) fn attach(&self, guest: Guest) {
        self.guest.send_replace(Some(guest));
    }

    /// Ends the connection: whoever waits for a reply, or asks from now on, gets an error.
    pub(crate) async fn end(&mut self) {
        self.task.abort();
        // Being stopped is how it ends.
        let _ = (&mut self.task).await;
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Guest {
    async fn open(&self) -> Result<BoxedStream, OpenError> {
        let open = async {
            let _unclaimed = self.unclaimed.acquire().await.expect("never closed");
            let (token, stream) = self.vm.open_stream().await?;
            self.agent.open_view(&self.container, token).await?;
            Ok(stream)
        };
        tokio::time::timeout(PATIENCE, open).await.map_err(|_| OpenError::Deadline)?
    }
}

/// What the host does with all that a guest sends, from the first request at the device on; for fuzzing.
#[cfg(fuzzing)]
pub async fn session(device: OwnedFd, guest: BoxedStream) {
    let device = Device::over(device).expect("a descriptor that can be watched");
    let mut buffer = vec![0; MAX_REQUEST];
    if let Ok(Read::Request(first)) = device.read(&mut buffer).await {
        session::run(&device, guest, first, &mut buffer).await;
    }
}

/// Serves the kernel until the view is unmounted.
async fn serve(id: String, device: Device, mut guest: watch::Receiver<Option<Guest>>) {
    match serve_guest(&id, &device, &mut guest).await {
        Ok(Read::Unmounted) => tracing::debug!(id, "nobody can look at the container's files any more"),
        Ok(Read::Request(_)) => {}
        Err(error) => tracing::error!(id, "the container's files are not visible any more: {error}"),
    }
}

async fn serve_guest(
    id: &str,
    device: &Device,
    guest: &mut watch::Receiver<Option<Guest>>,
) -> std::io::Result<Read> {
    let mut buffer = vec![0; MAX_REQUEST];
    let guest = loop {
        tokio::select! {
            read = device.read(&mut buffer) => match read? {
                Read::Unmounted => return Ok(Read::Unmounted),
                Read::Request(request) => answers::without_guest(device, request, &buffer)?,
            },
            attached = guest.wait_for(Option::is_some) => match attached.ok().and_then(|guest| guest.clone()) {
                Some(guest) => break guest,
                None => return Ok(Read::Unmounted),
            },
        }
    };
    requests(id, device, &mut buffer, || guest.open()).await
}

/// Has them served by who is opened in the guest.
async fn requests<Opening: Future<Output = Result<BoxedStream, OpenError>>>(
    id: &str,
    device: &Device,
    buffer: &mut [u8],
    open: impl Fn() -> Opening,
) -> std::io::Result<Read> {
    let mut opened = None;
    // While the guest is silent.
    let mut word = None;
    loop {
        let read = tokio::select! {
            biased;
            found = async { word.as_mut().expect("checked").await }, if word.is_some() => {
                word = None;
                // Without one, the next access waits as long as this did.
                opened = Result::ok(found);
                continue;
            }
            read = device.read(buffer) => read?,
        };
        let Read::Request(request) = read else { return Ok(Read::Unmounted) };
        if answers::by_host(device, request)? || !request.is_answered() {
            // What is forgotten was known to a process that is gone.
            continue;
        }
        if word.is_some() {
            device.refuse(request, libc::EIO)?;
            continue;
        }
        let stream = match opened.take() {
            Some(stream) => Ok(stream),
            None => open().await,
        };
        let silent = match stream {
            Ok(stream) => match session::run(device, stream, request, buffer).await {
                session::End::Unmounted => return Ok(Read::Unmounted),
                session::End::Device(error) => return Err(error),
                end => {
                    tracing::warn!(id, "an access to the container's files failed: {}", chain(&end));
                    matches!(end, session::End::Deadline)
                }
            },
            Err(error) => {
                tracing::warn!(id, "the container's files cannot be accessed: {}", chain(&error));
                device.refuse(request, libc::EIO)?;
                error.is_silence()
            }
        };
        if silent {
            word = Some(Box::pin(open()));
        }
    }
}
