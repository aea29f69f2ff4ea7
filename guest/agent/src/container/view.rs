//! Serving a container's files to the host.

use super::{Container, ContainerError};
use crate::{channel::Stream, engine::Engine, reaper::Reaper, view::ViewedRoot};

impl Container {
    /// Serves the container's files to the host on `stream` until the stream ends, with what is mounted in its root file
    /// system or without.
    ///
    /// # Errors
    /// The container has ended.
    pub(crate) async fn open_view(
        &self,
        engine: &Engine,
        reaper: &Reaper,
        stream: Stream,
        without_mounts: bool,
    ) -> Result<(), ContainerError> {
        let root = if without_mounts {
            ViewedRoot::WithoutMounts(self.rootfs.path())
        } else {
            ViewedRoot::OfInit(self.init.pid())
        };
        Ok(self.view.open(engine, reaper, root, stream).await?)
    }
}
