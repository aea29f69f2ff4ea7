//! Waits for a containerd that is being restarted.

use std::{io, time::Duration};

use machinen::{fs::FileError, watch::FileWatch};
use tokio::time::timeout;

use super::{containerd::ContainerdClient, error::ForkError};

/// The restart of containerd takes some seconds, since it looks for the shims of its containers first.
const DEADLINE: Duration = Duration::from_secs(60);

/// Returns when containerd serves requests: at once, or after the next event at its socket.
///
/// # Errors
/// containerd does not serve requests within a minute.
pub(super) async fn serving(containerd: &ContainerdClient) -> Result<(), ForkError> {
    let address = containerd.address.as_path();
    let served = async {
        // Before the first try, so that no event is missed.
        let watch = FileWatch::new()?;
        watch.names(address.parent().unwrap_or(address))?;
        while !containerd.serves().await {
            watch.changed().await?;
        }
        Ok::<_, io::Error>(())
    };
    match timeout(DEADLINE, served).await {
        Ok(served) => Ok(served.map_err(FileError::at("watch", address))?),
        Err(_) => Err(ForkError::NotServing { address: address.to_owned() }),
    }
}
