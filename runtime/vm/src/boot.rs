//! Waits for the guest agent after QEMU has started, and configures the guest.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::hex,
    sys,
};
use machinen_protocol::api::ConfigureRequest;
use tokio::sync::watch;

use crate::agent::{AgentError, Client};
use crate::{
    VmExit,
    bounded_log::BoundedLog,
    channel::{VmChannel, VmChannelError},
    exit::quoted,
};

/// Bytes of fresh entropy that each guest gets.
const ENTROPY: usize = 64;
/// Bytes of a machine id (machine-id(5)).
const MACHINE_ID: usize = 16;
/// The largest error of a guest's clock that is accepted, and how often the clock is set to get below it on a
/// busy host.
const CLOCK_ERROR: Duration = Duration::from_millis(8);
const CLOCK_TRIES: usize = 8;
/// How long QEMU may take to end after its channel has ended.
const EXIT_GRACE: Duration = Duration::from_secs(2);

/// Why a guest did not become ready.
#[derive(Debug, thiserror::Error)]
pub enum VmBootError {
    /// The VM ended during the boot.
    #[error("the VM ended before its agent answered: {0}")]
    Exited(VmExit),
    /// The guest took longer than [`crate::VmSpec::boot_timeout`].
    #[error("the guest agent did not answer within {timeout:?}{}", quoted("console", .console))]
    Deadline {
        /// How long the host has waited.
        timeout: Duration,
        /// The last lines of the console of the guest.
        console: String,
    },
    /// The channel failed before the agent was ready.
    #[error("cannot communicate with the guest agent{}", quoted("console", .console))]
    Channel {
        /// The last lines of the console of the guest.
        console: String,
        /// How the channel failed.
        source: VmChannelError,
    },
    /// The agent refused its configuration.
    #[error("the guest cannot be configured{}", quoted("console", .console))]
    Configure {
        /// The last lines of the console of the guest.
        console: String,
        /// What the agent answered.
        source: AgentError,
    },
    /// The kernel of the host gave no random bytes (getrandom(2)).
    #[error("cannot get random bytes for the guest")]
    Entropy(#[source] std::io::Error),
}

impl HasKind for VmBootError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Deadline { .. } => ErrorKind::DeadlineExceeded,
            Self::Channel { source: VmChannelError::Version(_), .. } => ErrorKind::FailedPrecondition,
            Self::Exited(_) | Self::Channel { .. } | Self::Configure { .. } => ErrorKind::Unavailable,
            Self::Entropy(_) => ErrorKind::Internal,
        }
    }
}

/// The state of the boot task.
pub(super) struct Boot {
    pub(super) channel: Arc<VmChannel>,
    pub(super) console: BoundedLog,
    pub(super) hostname: String,
    pub(super) timeout: Duration,
    pub(super) exit: watch::Receiver<Option<VmExit>>,
}

impl Boot {
    /// Resolves with a configured agent, or with the reason why the guest is not ready.
    pub(super) async fn run(mut self) -> Result<Client, Arc<VmBootError>> {
        let console = self.console.clone();
        let mut exit = self.exit.clone();
        let exited = async {
            match exit.wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone()) {
                Some(exit) => exit,
                None => std::future::pending().await,
            }
        };
        let ready = tokio::select! {
            // If the VM has ended, that is why the channel failed.
            biased;
            exit = exited => Err(VmBootError::Exited(exit)),
            ready = tokio::time::timeout(self.timeout, self.configured_agent()) => match ready {
                Ok(ready) => ready,
                Err(_) => Err(VmBootError::Deadline { timeout: self.timeout, console: console.excerpt() }),
            },
        };
        match ready {
            Err(error) if self.is_closed(&error) => Err(Arc::new(self.exit_or(error).await)),
            other => other.map_err(Arc::new),
        }
    }

    async fn configured_agent(&self) -> Result<Client, VmBootError> {
        let control = self
            .channel
            .accept_control()
            .await
            .map_err(|source| VmBootError::Channel { console: self.console.excerpt(), source })?;
        let client = Client::new(control);
        configure_guest(&client, &self.hostname, || self.console.excerpt()).await?;
        Ok(client)
    }

    fn is_closed(&self, error: &VmBootError) -> bool {
        matches!(
            error,
            VmBootError::Channel { source: VmChannelError::Closed(_), .. }
                | VmBootError::Configure { source: AgentError::Closed, .. }
        )
    }

    /// The reason of a closed channel: the end of the VM if it has ended, else `error`.
    async fn exit_or(&mut self, error: VmBootError) -> VmBootError {
        let exit = tokio::time::timeout(EXIT_GRACE, self.exit.wait_for(Option::is_some)).await;
        match exit.ok().and_then(Result::ok).and_then(|exit| exit.clone()) {
            Some(exit) => VmBootError::Exited(exit),
            None => error,
        }
    }
}

/// Gives a guest its own hostname, machine id, entropy and time, which replace those that it had before.
pub(super) async fn configure_guest(
    client: &Client,
    hostname: &str,
    console: impl Fn() -> String,
) -> Result<(), VmBootError> {
    let request = configuration(hostname).map_err(VmBootError::Entropy)?;
    let machine_id = request.machine_id.clone();
    let failed = |source| VmBootError::Configure { console: console(), source };
    let response = client.configure(request).await.map_err(failed)?;
    tracing::debug!(
        hostname,
        machine_id,
        kernel = plain(&response.kernel_release),
        agent = plain(&response.agent_version),
        "guest is ready"
    );
    // The clock is late by at most the duration of the call that set it. A guest's first call is slow, so it
    // is repeated.
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

/// What a guest reports about itself, limited to 64 harmless characters.
fn plain(text: &str) -> String {
    let plain = |char: &char| char.is_ascii_alphanumeric() || "-+._".contains(*char);
    text.chars().filter(plain).take(64).collect()
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
        machine_id: hex(&machine_id),
        ..ConfigureRequest::default()
    })
}

/// Nanoseconds since 1970; 0 if the host's clock is before 1970 or after 2262.
fn now_ns() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos());
    i64::try_from(now).unwrap_or_default()
}
