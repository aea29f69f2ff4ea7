//! Output that is still in a fifo when its process has ended.
//!
//! containerd's clients open a fifo in the background, and give up when they receive the exit event. The
//! output of a short process would be lost then, so the exit is reported only after the fifo was read.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Duration,
};

use machinen_base::sys;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use rustix::io::ioctl_fionread;
use tokio::{net::unix::pipe, time::timeout};

/// A client that is present reads at once; an absent client must not delay the exit for long.
const GRACE: Duration = Duration::from_secs(1);

/// A fifo whose reader is waited for.
#[derive(Debug)]
pub(super) struct Unread(OwnedFd);

impl Unread {
    /// Returns None for an unnamed pipe, because its reader, a logging program, has had it open from the
    /// start. Also returns None for a fifo that cannot be watched; the fifo remains usable.
    pub(super) fn of(fifo: &pipe::Sender) -> Option<Self> {
        let fd = fifo.as_fd().try_clone_to_owned().ok()?;
        let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
        path.is_absolute().then_some(Self(fd))
    }

    /// Returns when the fifo is empty, or its reader takes nothing within the grace period.
    pub(super) async fn read(self) {
        match timeout(GRACE, self.emptied()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!("cannot wait for the reader of a fifo: {error}"),
            Err(_) => tracing::debug!("a fifo has no reader, or one that reads nothing"),
        }
    }

    async fn emptied(&self) -> io::Result<()> {
        if ioctl_fionread(&self.0)? == 0 {
            return Ok(());
        }
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        inotify.add_watch(path.as_str(), AddWatchFlags::IN_ACCESS)?;
        let events = sys::async_fd(inotify.as_fd().try_clone_to_owned()?)?;
        // The fifo is checked again after the watch was added, so no read is missed.
        while ioctl_fionread(&self.0)? > 0 {
            let mut ready = events.readable().await?;
            match inotify.read_events() {
                Ok(_) => {}
                Err(nix::Error::EAGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::OpenOptions, io::Read, os::unix::fs::OpenOptionsExt};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    fn fifo(path: &std::path::Path) -> pipe::Sender {
        mkfifo(path, Mode::S_IRWXU).unwrap();
        let open =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap();
        pipe::Sender::from_file(open).unwrap()
    }

    #[tokio::test]
    async fn a_late_reader_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let fifo = fifo(&path);
        nix::unistd::write(&fifo, b"text").unwrap();
        let unread = Unread::of(&fifo).unwrap();
        let (waited, text) = tokio::join!(timeout(GRACE / 2, unread.emptied()), async {
            // By now the other future is waiting.
            tokio::task::yield_now().await;
            let mut text = [0; 4];
            OpenOptions::new().read(true).open(&path).unwrap().read_exact(&mut text).unwrap();
            text
        });
        waited.unwrap().unwrap();
        assert_eq!(&text, b"text");
    }

    #[tokio::test(start_paused = true)]
    async fn an_absent_reader_delays_the_exit_only_briefly() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = fifo(&dir.path().join("out"));
        Unread::of(&fifo).unwrap().read().await;
        nix::unistd::write(&fifo, b"text").unwrap();
        let start = tokio::time::Instant::now();
        Unread::of(&fifo).unwrap().read().await;
        assert_eq!(start.elapsed().as_secs(), GRACE.as_secs());
    }
}
