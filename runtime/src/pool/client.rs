//! Whether the containerd that a member is to serve still exists.
//!
//! A connection to its socket ends when containerd does: that is the event. A restart brings a socket of the same name back
//! within seconds; if there is none for longer, containerd has gone for good.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    net::UnixStream,
    time::{Instant, timeout_at},
};

use crate::watch::Watch;

/// Returns when nothing has listened on `socket` for as long as `patience`.
///
/// # Errors
/// The socket's directory is there and cannot be watched.
pub(super) async fn gone(socket: &Path, patience: Duration) -> io::Result<()> {
    let mut connected = UnixStream::connect(socket).await;
    loop {
        if let Ok(stream) = connected {
            closed(&stream).await;
        }
        connected = again(socket, Instant::now() + patience).await?;
        if connected.is_err() {
            return Ok(());
        }
    }
}

/// Returns when the other side has closed a connection on which it has nothing to say.
async fn closed(stream: &UnixStream) {
    let mut ignored = [0; 64];
    loop {
        let readable = stream.readable().await;
        match readable.and_then(|()| stream.try_read(&mut ignored)) {
            Ok(1..) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(0) | Err(_) => return,
        }
    }
}

/// The next connection, or the error of the last try, which is at the deadline.
async fn again(socket: &Path, deadline: Instant) -> io::Result<io::Result<UnixStream>> {
    // Before the first try, so that no event is missed.
    let watch = Watch::new()?;
    let dir = socket.parent().map(PathBuf::from).unwrap_or_default();
    match watch.names(&dir) {
        // It went with containerd, so nothing is to be seen until the deadline.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        watched => watched?,
    }
    loop {
        let connected = UnixStream::connect(socket).await;
        if connected.is_ok() {
            return Ok(connected);
        }
        match timeout_at(deadline, watch.changed()).await {
            Ok(changed) => changed?,
            Err(_) => return Ok(UnixStream::connect(socket).await),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{net::UnixListener, time::timeout};

    use super::*;

    const PATIENCE: Duration = Duration::from_millis(300);
    const LONG: Duration = Duration::from_secs(20);

    async fn is_gone(socket: &Path, within: Duration) -> bool {
        timeout(within, gone(socket, PATIENCE)).await.is_ok()
    }

    #[tokio::test]
    async fn a_containerd_that_is_never_there_is_gone_after_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let started = Instant::now();
        assert!(is_gone(&dir.path().join("sock"), LONG).await);
        assert!(started.elapsed() >= PATIENCE);
        assert!(is_gone(&dir.path().join("no/sock"), LONG).await);
    }

    #[tokio::test]
    async fn one_that_is_restarted_is_not_gone() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("sock");
        let first = UnixListener::bind(&socket).unwrap();
        let (ended, path) = (tokio::sync::Notify::new(), socket.clone());
        let watched = async {
            gone(&path, PATIENCE).await.unwrap();
            ended.notify_one();
        };
        let life = async {
            for _ in 0..3 {
                drop(first.accept().await.unwrap());
            }
            // The name stays, and nothing listens.
            let connection = first.accept().await.unwrap();
            drop((first, connection));
            std::fs::remove_file(&socket).unwrap();
            let second = UnixListener::bind(&socket).unwrap();
            let connection = second.accept().await.unwrap();
            // Longer than the patience: it is there.
            assert!(timeout(2 * PATIENCE, ended.notified()).await.is_err());
            drop((second, connection));
        };
        timeout(LONG, async { tokio::join!(watched, life) }).await.unwrap();
    }
}
