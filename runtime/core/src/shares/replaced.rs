//! Tells the guest when all files of a volume are replaced, as kubelet does with ConfigMaps and Secrets: by another link
//! `..data`. Processes of the guest that watch the volume are notified then.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use machinen_base::{error::chain, watch::FileWatch};
use machinen_protocol::shares::{DATA_LINK, ShareEntry};
use machinen_vm::agent;
use rustix::{fs::readlinkat, io::Errno};
use tokio::{sync::watch, task::spawn_blocking};

use super::Volume;

/// A task that follows the link of one volume.
#[derive(Debug)]
pub(super) struct Follower {
    stop: watch::Sender<()>,
}

impl Follower {
    /// Follows the volume from now on, if it has such a link. What happens before a container with the volume is started is
    /// not missed.
    ///
    /// # Errors
    /// The directory cannot be watched.
    pub(super) async fn start(
        volume: &Volume,
        entry: ShareEntry,
        agent: &agent::Client,
    ) -> io::Result<Option<Self>> {
        if volume.is_file || link(&volume.source).await?.is_none() {
            return Ok(None);
        }
        let watch = FileWatch::new()?;
        watch.names(&Path::new("/proc/self/fd").join(volume.source.as_raw_fd().to_string()))?;
        let Some(target) = link(&volume.source).await? else { return Ok(None) };
        let stop = watch::Sender::new(());
        let (agent, entry, path) = (agent.clone(), entry.name(), volume.path.clone());
        let followed = Followed { source: Arc::clone(&volume.source), path, watch, agent, entry };
        tokio::spawn(followed.follow(target, stop.subscribe()));
        Ok(Some(Self { stop }))
    }

    /// Ends the task, and the guest keeps nothing of the volume.
    pub(super) async fn stop(&self) {
        self.stop.send_replace(());
        self.stop.closed().await;
    }
}

struct Followed {
    source: Arc<OwnedFd>,
    path: PathBuf,
    watch: FileWatch,
    agent: agent::Client,
    entry: String,
}

impl Followed {
    /// Follows the link until it is told to stop, or the VM has ended.
    async fn follow(self, mut target: Vec<u8>, mut stop: watch::Receiver<()>) {
        self.tell(target.clone()).await;
        loop {
            let changed = tokio::select! {
                stopped = stop.changed() => match stopped {
                    Ok(()) => break self.tell(Vec::new()).await,
                    // The container is gone with its VM.
                    Err(_) => return,
                },
                changed = self.watch.changed() => changed,
            };
            let found = match changed {
                Ok(()) => link(&self.source).await,
                Err(error) => Err(error),
            };
            match found {
                Ok(Some(found)) if found != target => {
                    target.clone_from(&found);
                    self.tell(found).await;
                }
                Ok(_) => {}
                Err(error) => break self.warn(&error.to_string()),
            }
        }
    }

    async fn tell(&self, target: Vec<u8>) {
        if let Err(error) = self.agent.replace_volume_data(self.entry.clone(), target).await {
            self.warn(&chain(&error));
        }
    }

    /// What the volume has is seen all the same, so the container continues.
    fn warn(&self, error: &str) {
        let path = self.path.display();
        tracing::warn!("processes that watch {path} in a container were not notified of a change: {error}");
    }
}

/// Where the link leads. None: there is no link, for example because it is being replaced.
async fn link(volume: &Arc<OwnedFd>) -> io::Result<Option<Vec<u8>>> {
    let volume = Arc::clone(volume);
    // The file system of the host may not answer for long.
    let found = spawn_blocking(move || readlinkat(&volume, DATA_LINK, Vec::new())).await;
    match found.map_err(io::Error::other)? {
        Ok(target) => Ok(Some(target.into_bytes())),
        Err(Errno::NOENT | Errno::INVAL | Errno::ACCESS) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}
