//! From the start of QEMU to an agent that is ready.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use machinen_protocol::api::ConfigureRequest;
use tokio::sync::watch;

use super::VmExit;
use super::capture::Capture;
use super::channel::{Channel, ChannelError};
use super::exit::quoted;
use crate::agent::{AgentError, Client};
use crate::error::{ErrorKind, Kind};
use crate::sys;

/// Bytes of fresh randomness that every guest is given.
const ENTROPY: usize = 64;
/// How long the end of QEMU may be behind the end of its channel.
const SETTLE: Duration = Duration::from_secs(2);

/// Why a guest did not become ready.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("the VM ended before its agent answered: {0}")]
    Exited(VmExit),
    #[error("the guest agent did not answer within {timeout:?}{}", quoted("console", .console))]
    Deadline { timeout: Duration, console: String },
    #[error("the guest agent cannot be talked to{}", quoted("console", .console))]
    Channel { console: String, source: ChannelError },
    #[error("the guest cannot be configured{}", quoted("console", .console))]
    Configure { console: String, source: AgentError },
    #[error("no random bytes for the guest")]
    Entropy(#[source] std::io::Error),
}

impl Kind for BootError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Deadline { .. } => ErrorKind::DeadlineExceeded,
            Self::Channel { source: ChannelError::Version(_), .. } => ErrorKind::FailedPrecondition,
            Self::Exited(_) | Self::Channel { .. } | Self::Configure { .. } => ErrorKind::Unavailable,
            Self::Entropy(_) => ErrorKind::Internal,
        }
    }
}

/// What the boot task works with.
pub(super) struct Boot {
    pub(super) channel: Arc<Channel>,
    pub(super) console: Capture,
    pub(super) hostname: String,
    pub(super) timeout: Duration,
    pub(super) exit: watch::Receiver<Option<VmExit>>,
}

impl Boot {
    /// Resolves with a configured agent or the reason why there is none.
    pub(super) async fn run(mut self) -> Result<Client, Arc<BootError>> {
        let console = self.console.clone();
        let mut exit = self.exit.clone();
        let exited = async {
            match exit.wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone()) {
                Some(exit) => exit,
                None => std::future::pending().await,
            }
        };
        let ready = tokio::select! {
            // The end of the VM explains a channel that failed with it.
            biased;
            exit = exited => Err(BootError::Exited(exit)),
            ready = tokio::time::timeout(self.timeout, self.dialled()) => match ready {
                Ok(ready) => ready,
                Err(_) => Err(BootError::Deadline { timeout: self.timeout, console: console.excerpt() }),
            },
        };
        match ready {
            Err(error) if self.is_closed(&error) => Err(Arc::new(self.settled(error).await)),
            other => other.map_err(Arc::new),
        }
    }

    async fn dialled(&self) -> Result<Client, BootError> {
        let control = self
            .channel
            .accept_control()
            .await
            .map_err(|source| BootError::Channel { console: self.console.excerpt(), source })?;
        let client = Client::new(control);
        let request = configuration(&self.hostname).map_err(BootError::Entropy)?;
        let response = client
            .configure(request)
            .await
            .map_err(|source| BootError::Configure { console: self.console.excerpt(), source })?;
        tracing::debug!(kernel = response.kernel_release, agent = response.agent_version, "guest is ready");
        Ok(client)
    }

    fn is_closed(&self, error: &BootError) -> bool {
        matches!(
            error,
            BootError::Channel { source: ChannelError::Closed(_), .. }
                | BootError::Configure { source: AgentError::Closed, .. }
        )
    }

    /// The channel ended: if that is because the VM did, the latter is the reason.
    async fn settled(&mut self, error: BootError) -> BootError {
        let exit = tokio::time::timeout(SETTLE, self.exit.wait_for(Option::is_some)).await;
        match exit.ok().and_then(Result::ok).and_then(|exit| exit.clone()) {
            Some(exit) => BootError::Exited(exit),
            None => error,
        }
    }
}

fn configuration(hostname: &str) -> std::io::Result<ConfigureRequest> {
    let mut entropy = vec![0; ENTROPY];
    sys::random(&mut entropy)?;
    // A host clock before 1970 or after 2262 is as wrong as no clock.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos());
    Ok(ConfigureRequest {
        realtime_ns: i64::try_from(now).unwrap_or_default(),
        entropy,
        hostname: hostname.to_owned(),
        ..ConfigureRequest::default()
    })
}
