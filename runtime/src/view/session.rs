//! The kernel's requests to somebody in the guest, and what comes back: forwarded, checked, and never waited for too long.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use machinen_protocol::fuse::{FuseError, MAX_REPLY, REPLY_HEADER, ReplyHeader, RequestHeader};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};

use super::PATIENCE;
use super::answers;
use super::device::{Device, Read};
use crate::vm::BoxedStream;

/// Requests that the guest may have at once; more wait in the kernel.
const MOST: usize = 64;
/// Where a request says which process of this host asks (fuse_in_header.pid), which is nothing to tell a guest.
const ASKER: std::ops::Range<usize> = 32..36;

/// Why a session is over.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("it is unmounted")]
    Unmounted,
    #[error("the kernel refuses")]
    Device(#[source] io::Error),
    #[error("the connection to the guest has ended")]
    Stream(#[source] io::Error),
    #[error("the guest sends what is no reply")]
    NoReply(#[source] FuseError),
    #[error("the guest answers what nobody has asked")]
    Unasked,
    #[error("the guest's reply does not fit the request")]
    Misfit,
    #[error("the guest did not answer within {PATIENCE:?}")]
    Deadline,
}

struct Session<'a> {
    device: &'a Device,
    /// Requests without a reply, oldest first.
    waiting: Mutex<VecDeque<Waiting>>,
    asked: Notify,
    answered: Notify,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    request: RequestHeader,
    until: Instant,
}

/// Runs until it cannot go on. `first` is in `buffer`. What is without a reply then has failed.
pub(super) async fn run(
    device: &Device,
    stream: BoxedStream,
    first: RequestHeader,
    buffer: &mut [u8],
) -> End {
    let (from_guest, to_guest) = tokio::io::split(stream);
    let session =
        Session { device, waiting: Mutex::default(), asked: Notify::new(), answered: Notify::new() };
    session.enlist(first);
    let end = tokio::select! {
        end = session.ask(to_guest, first, buffer) => end,
        end = session.answer(from_guest) => end,
        end = session.lose_patience() => end,
    };
    for waiting in session.waiting().drain(..) {
        if let Err(error) = device.refuse(waiting.request, libc::EIO) {
            return End::Device(error);
        }
    }
    end
}

impl Session<'_> {
    fn waiting(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(&self, mut guest: impl AsyncWrite + Unpin, first: RequestHeader, buffer: &mut [u8]) -> End {
        let mut request = first;
        loop {
            match timeout(PATIENCE, forward(&mut guest, request, buffer)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return End::Stream(error),
                Err(_) => return End::Deadline,
            }
            while self.waiting().len() >= MOST {
                self.answered.notified().await;
            }
            request = match self.next(buffer).await {
                Ok(Read::Request(request)) => request,
                Ok(Read::Unmounted) => return End::Unmounted,
                Err(error) => return End::Device(error),
            };
            self.enlist(request);
        }
    }

    /// The next request that is for the guest.
    async fn next(&self, buffer: &mut [u8]) -> io::Result<Read> {
        loop {
            match self.device.read(buffer).await? {
                Read::Request(request) if answers::by_host(self.device, request)? => {}
                read => return Ok(read),
            }
        }
    }

    /// From now on there will be a reply to it, whosoever.
    fn enlist(&self, request: RequestHeader) {
        if request.is_answered() {
            self.waiting().push_back(Waiting { request, until: Instant::now() + PATIENCE });
            self.asked.notify_one();
        }
    }

    async fn answer(&self, mut guest: impl AsyncRead + Unpin) -> End {
        let mut buffer = vec![0; MAX_REPLY];
        loop {
            let (header, body) = buffer.split_at_mut(REPLY_HEADER);
            if let Err(error) = guest.read_exact(header).await {
                return End::Stream(error);
            }
            let reply = match ReplyHeader::decode(header.as_array().expect("split there")) {
                Ok(reply) => reply,
                Err(error) => return End::NoReply(error),
            };
            let asked = |waiting: &Waiting| waiting.request.unique == reply.unique;
            if !self.waiting().iter().any(asked) {
                return End::Unasked;
            }
            if let Err(error) = guest.read_exact(&mut body[..reply.length - REPLY_HEADER]).await {
                return End::Stream(error);
            }
            self.waiting().retain(|waiting| !asked(waiting));
            self.answered.notify_one();
            match self.device.write(&buffer[..reply.length]) {
                Ok(()) => {}
                // The kernel has told whoever asked.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return End::Misfit,
                Err(error) => return End::Device(error),
            }
        }
    }

    /// Every request has the same time, so it is the oldest that runs out of it first.
    async fn lose_patience(&self) -> End {
        loop {
            let oldest = self.waiting().front().copied();
            match oldest {
                None => self.asked.notified().await,
                Some(waiting) if waiting.until <= Instant::now() => return End::Deadline,
                Some(waiting) => sleep_until(waiting.until).await,
            }
        }
    }
}

async fn forward(
    guest: &mut (impl AsyncWrite + Unpin),
    request: RequestHeader,
    buffer: &mut [u8],
) -> io::Result<()> {
    buffer[ASKER].fill(0);
    guest.write_all(&buffer[..request.length]).await?;
    guest.flush().await
}
