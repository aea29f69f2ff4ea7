//! The calls for the volumes of a pod.

use machinen_protocol::api::{MountSharesRequest, OfferSocketStreamRequest, ReplaceVolumeDataRequest};

use super::{AgentError, Client, QUICK, finish, nothing};

impl Client {
    /// Has the agent mount the pod's volumes, which are served on the streams with these tokens.
    ///
    /// # Errors
    /// A stream does not exist, or the volumes are mounted already.
    pub async fn mount_shares(&self, streams: Vec<u64>) -> Result<(), AgentError> {
        let request = MountSharesRequest { streams, ..MountSharesRequest::default() };
        call!(self.mount_shares(request), Some(QUICK)).map(nothing)
    }

    /// Gives the agent a stream for the next connection of a container to a socket of the host.
    ///
    /// # Errors
    /// The stream does not exist.
    pub async fn offer_socket_stream(&self, stream: u64) -> Result<(), AgentError> {
        let request = OfferSocketStreamRequest { stream, ..OfferSocketStreamRequest::default() };
        call!(self.offer_socket_stream(request), Some(QUICK)).map(nothing)
    }

    /// Reports where the link `..data` of a volume leads, or with an empty target that the volume is not needed any more.
    ///
    /// # Errors
    /// The guest's kernel refuses a notification.
    pub async fn replace_volume_data(&self, entry: String, target: Vec<u8>) -> Result<(), AgentError> {
        let request = ReplaceVolumeDataRequest { entry, target, ..ReplaceVolumeDataRequest::default() };
        call!(self.replace_volume_data(request), Some(QUICK)).map(nothing)
    }
}
