//! Serving a container's files to the host.

use super::{Container, ContainerError};
use crate::{channel::Stream, engine::Engine, reaper::Reaper};

impl Container {
    /// Serves the container's files to the host on `stream` until the stream ends.
    ///
    /// # Errors
    /// The container has ended.
    pub(crate) async fn open_view(
        &self,
        engine: &Engine,
        reaper: &Reaper,
        stream: Stream,
    ) -> Result<(), ContainerError> {
        Ok(self.view.open(engine, reaper, self.init.pid(), stream).await?)
    }
}
