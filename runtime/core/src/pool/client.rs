//! Detects when the containerd that a member is for has ended.
//!
//! A connection to containerd's socket ends when containerd does, which is the event. A restart creates a
//! socket of the same name within seconds; if there is none for longer, containerd is not coming back.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use machinen_base::{fs::if_exists, watch::FileWatch};
use tokio::{
    net::UnixStream,
    time::{Instant, timeout_at},
};

/// Returns when nothing has listened on `socket` for as long as `patience`.
///
/// # Errors
/// The socket's directory exists and cannot be watched.
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

/// Returns when the peer has closed a connection. Data that arrives is ignored.
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

/// Returns the next connection, or the error of the last attempt, which is made at the deadline.
async fn again(socket: &Path, deadline: Instant) -> io::Result<io::Result<UnixStream>> {
    // The watch starts before the first attempt, so that no event is missed.
    let watch = FileWatch::new()?;
    let dir = socket.parent().map(PathBuf::from).unwrap_or_default();
    // If the directory was removed with the socket, there are no events until the deadline.
    if_exists(watch.names(&dir))?;
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
    async fn a_containerd_that_never_listens_is_gone_after_the_patience() {
        let dir = tempfile::tempdir().unwrap();
        let started = Instant::now();
        assert!(is_gone(&dir.path().join("sock"), LONG).await);
        assert!(started.elapsed() >= PATIENCE);
        assert!(is_gone(&dir.path().join("no/sock"), LONG).await);
    }

    #[tokio::test]
    async fn a_containerd_that_restarts_is_not_gone() {
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
            // The name remains, and nothing listens.
            let connection = first.accept().await.unwrap();
            drop((first, connection));
            std::fs::remove_file(&socket).unwrap();
            let second = UnixListener::bind(&socket).unwrap();
            let connection = second.accept().await.unwrap();
            // A connection that lasts longer than the patience is not an absence.
            assert!(timeout(2 * PATIENCE, ended.notified()).await.is_err());
            drop((second, connection));
        };
        timeout(LONG, async { tokio::join!(watched, life) }).await.unwrap();
    }
}
