//! Descriptors that the kernel takes long to close.

use std::{ops::Deref, os::fd::OwnedFd, thread};

use tokio::io::unix::AsyncFd;

/// An inotify instance, or a trigger of pressure stall information. The last close(2) of one waits until no processor of the host
/// can be using it any more (RCU), for 10 to 30 ms, which would hold up the event loop. So a thread of its own closes it.
#[derive(Debug)]
pub(crate) struct SlowlyClosed(Option<AsyncFd<OwnedFd>>);

impl From<AsyncFd<OwnedFd>> for SlowlyClosed {
    fn from(fd: AsyncFd<OwnedFd>) -> Self {
        Self(Some(fd))
    }
}

impl Deref for SlowlyClosed {
    type Target = AsyncFd<OwnedFd>;

    fn deref(&self) -> &Self::Target {
        self.0.as_ref().expect("there until it is dropped")
    }
}

impl Drop for SlowlyClosed {
    fn drop(&mut self) {
        let Some(fd) = self.0.take().map(AsyncFd::into_inner) else { return };
        // Without a thread it is closed here.
        let _ = thread::Builder::new().name("close".to_owned()).spawn(move || drop(fd));
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, os::unix::net::UnixStream};

    use super::*;
    use crate::sys;

    #[tokio::test]
    async fn it_is_closed() {
        let (mut kept, closed) = UnixStream::pair().unwrap();
        drop(SlowlyClosed::from(sys::async_fd(closed.into()).unwrap()));
        assert_eq!(kept.read(&mut [0]).unwrap(), 0);
    }
}
