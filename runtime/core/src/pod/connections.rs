//! The network connections of a container whose checkpoint has them.
//!
//! If the container ends without having run again, its connections belong to the container that is restored from the
//! checkpoint. So nothing of it may be sent from the dump on: no end of a connection, and no acknowledgement of data that
//! arrived after the dump.

use std::sync::Arc;

use machinen_base::error::chain;

use super::{Container, Pod, PodError};
use crate::{checkpoint::DumpOptions, network::PodNetwork};

/// Connections that are kept for a checkpoint. When this is dropped they stay so.
#[derive(Debug)]
pub(super) struct HeldConnections(Option<Arc<PodNetwork>>);

impl HeldConnections {
    /// Nothing is held.
    pub(super) const NONE: Self = Self(None);

    /// Holds the connections of a frozen container, if the checkpoint is to have them.
    ///
    /// # Errors
    /// The host's kernel refuses.
    pub(super) async fn of(pod: &Pod, container: &Container, options: DumpOptions) -> Result<Self, PodError> {
        let Some(network) = container.network.as_ref().filter(|_| options.tcp_established) else {
            return Ok(Self::NONE);
        };
        if pod.containers().len() > 1 {
            tracing::warn!(
                id = container.id.as_str(),
                "the container shares its network, so its connections end with it although its checkpoint has them"
            );
            return Ok(Self::NONE);
        }
        network.hold().await.map_err(PodError::Network)?;
        Ok(Self(Some(Arc::clone(network))))
    }

    /// The container keeps its connections, since the checkpoint has failed. A failure of this is logged, because the
    /// request reports the first one.
    pub(super) async fn release(self) {
        if let Some(network) = self.0
            && let Err(error) = network.release().await
        {
            tracing::error!("a container stays without its network: {}", chain(&error));
        }
    }
}
