//! A container's files for the host, while it is there.

use super::{Container, ContainerError};
use crate::{agent::Parts, channel::Stream};

impl Container {
    /// Serves the container's files to the host on `stream`, until that ends.
    ///
    /// # Errors
    /// The init has ended.
    pub(crate) async fn open_view(&self, parts: &Parts, stream: Stream) -> Result<(), ContainerError> {
        Ok(self.view.open(parts, self.init.pid(), stream).await?)
    }
}
