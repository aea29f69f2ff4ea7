//! From the start of QEMU to an agent that is ready.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use machinen_protocol::api::ConfigureRequest;
use tokio::sync::watch;

use super::{
    VmExit,
    bounded_log::BoundedLog,
    channel::{ChannelError, VmChannel},
    exit::quoted,
};
use crate::{
    agent::{AgentError, Client},
    error::{ErrorKind, Kind},
    sys,
};

/// Bytes of fresh randomness that every guest is given.
const ENTROPY: usize = 64;
/// Bytes of a machine id (machine-id(5)).
const MACHINE_ID: usize = 16;
/// How wrong a guest's clock may be, and how often it is set until it is better on a host that is busy.
const CLOCK_ERROR: Duration = Duration::from_millis(8);
const CLOCK_TRIES: usize = 8;
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
    pub(super) channel: Arc<VmChannel>,
    pub(super) console: BoundedLog,
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
        configure_guest(&client, &self.hostname, || self.console.excerpt()).await?;
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

/// Makes a guest a machine of its own: a name, an id, randomness, the time. What it had of these before is gone.
pub(super) async fn configure_guest(
    client: &Client,
    hostname: &str,
    console: impl Fn() -> String,
) -> Result<(), BootError> {
    let request = configuration(hostname).map_err(BootError::Entropy)?;
    let machine_id = request.machine_id.clone();
    let failed = |source| BootError::Configure { console: console(), source };
    let response = client.configure(request).await.map_err(failed)?;
    tracing::debug!(
        hostname,
        machine_id,
        boot_id = plain(&response.boot_id),
        kernel = plain(&response.kernel_release),
        agent = plain(&response.agent_version),
        "guest is ready"
    );
    // The first call takes a guest long, and its clock is late by as much; an error of the clock is no longer than the
    // call that set it.
    for _ in 0..CLOCK_TRIES {
        let start = Instant::now();
        client.set_clock(now_ns()).await.map_err(failed)?;
        if start.elapsed() <= CLOCK_ERROR {
            return Ok(());
        }
    }
    tracing::debug!(hostname, "the guest's clock may be wrong by more than {CLOCK_ERROR:?}");
    Ok(())
}

/// What a guest says of itself, as far as it is a word of reasonable length.
fn plain(said: &str) -> String {
    let plain = |char: &char| char.is_ascii_alphanumeric() || "-+._".contains(*char);
    said.chars().filter(plain).take(64).collect()
}

fn configuration(hostname: &str) -> std::io::Result<ConfigureRequest> {
    let mut entropy = vec![0; ENTROPY];
    sys::random(&mut entropy)?;
    let mut machine_id = [0; MACHINE_ID];
    sys::random(&mut machine_id)?;
    Ok(ConfigureRequest {
        realtime_ns: now_ns(),
        entropy,
        hostname: hostname.to_owned(),
        machine_id: machine_id.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}")),
        ..ConfigureRequest::default()
    })
}

/// A host clock before 1970 or after 2262 is as wrong as no clock.
fn now_ns() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos());
    i64::try_from(now).unwrap_or_default()
}
