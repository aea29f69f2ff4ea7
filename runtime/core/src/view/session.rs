//! Forwards the kernel's requests to a server in the guest, and checks its replies. Each has a deadline.

use std::{
    collections::VecDeque,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use machinen_protocol::fuse::{FuseError, MAX_REPLY, REPLY_HEADER, ReplyHeader, RequestHeader};
use machinen_vm::BoxedStream;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::Notify,
    time::{Instant, sleep_until, timeout},
};

use super::{
    REPLY_DEADLINE, answers,
    device::{Device, DeviceRead},
    harden::{HostileReply, harden},
};

/// Requests that the guest may have at once; more wait in the kernel.
const MAX_PENDING: usize = 64;
/// The field with the pid of the calling process (fuse_in_header.pid), which the guest does not get.
const CALLER_PID: std::ops::Range<usize> = 32..36;

/// Why a session is over.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionEnd {
    #[error("it is unmounted")]
    Unmounted,
    #[error("the kernel refuses")]
    Device(#[source] io::Error),
    #[error("the connection to the guest has ended")]
    Stream(#[source] io::Error),
    #[error("the guest sent a malformed reply")]
    Malformed(#[source] FuseError),
    #[error("the guest sent a reply without a request")]
    Unexpected,
    #[error("the guest's reply does not fit its request")]
    Misfit,
    #[error(transparent)]
    Hostile(#[from] HostileReply),
    #[error("the guest did not answer within {REPLY_DEADLINE:?}")]
    Deadline,
}

struct Session<'a> {
    device: &'a Device,
    /// Requests without a reply, oldest first.
    waiting: Mutex<VecDeque<PendingRequest>>,
    asked: Notify,
    answered: Notify,
}

#[derive(Debug, Clone, Copy)]
struct PendingRequest {
    request: RequestHeader,
    until: Instant,
}

/// Runs until the session cannot continue. `first` is in `buffer`. Requests that have no reply by then fail.
pub(super) async fn run(
    device: &Device,
    stream: BoxedStream,
    first: RequestHeader,
    buffer: &mut [u8],
) -> SessionEnd {
    let (from_guest, to_guest) = tokio::io::split(stream);
    let session =
        Session { device, waiting: Mutex::default(), asked: Notify::new(), answered: Notify::new() };
    session.enlist(first);
    let end = tokio::select! {
        end = session.ask(to_guest, first, buffer) => end,
        end = session.answer(from_guest) => end,
        end = session.deadline() => end,
    };
    for waiting in session.waiting().drain(..) {
        if let Err(error) = device.refuse(waiting.request, libc::EIO) {
            return SessionEnd::Device(error);
        }
    }
    end
}

impl Session<'_> {
    fn waiting(&self) -> MutexGuard<'_, VecDeque<PendingRequest>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(
        &self,
        mut guest: impl AsyncWrite + Unpin,
        first: RequestHeader,
        buffer: &mut [u8],
    ) -> SessionEnd {
        let mut request = first;
        loop {
            match timeout(REPLY_DEADLINE, forward(&mut guest, request, buffer)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return SessionEnd::Stream(error),
                Err(_) => return SessionEnd::Deadline,
            }
            while self.waiting().len() >= MAX_PENDING {
                self.answered.notified().await;
            }
            request = match self.next(buffer).await {
                Ok(DeviceRead::Request(request)) => request,
                Ok(DeviceRead::Unmounted) => return SessionEnd::Unmounted,
                Err(error) => return SessionEnd::Device(error),
            };
            self.enlist(request);
        }
    }

    /// The next request that is for the guest.
    async fn next(&self, buffer: &mut [u8]) -> io::Result<DeviceRead> {
        loop {
            match self.device.read(buffer).await? {
                DeviceRead::Request(request) if answers::by_host(self.device, request)? => {}
                read => return Ok(read),
            }
        }
    }

    /// Registers a request. From now on it gets a reply, from the guest or from the host.
    fn enlist(&self, request: RequestHeader) {
        if request.is_answered() {
            self.waiting().push_back(PendingRequest { request, until: Instant::now() + REPLY_DEADLINE });
            self.asked.notify_one();
        }
    }

    async fn answer(&self, mut guest: impl AsyncRead + Unpin) -> SessionEnd {
        let mut buffer = vec![0; MAX_REPLY];
        loop {
            let (header, body) = buffer.split_at_mut(REPLY_HEADER);
            if let Err(error) = guest.read_exact(header).await {
                return SessionEnd::Stream(error);
            }
            let reply = match ReplyHeader::decode(header.as_array().expect("split there")) {
                Ok(reply) => reply,
                Err(error) => return SessionEnd::Malformed(error),
            };
            let asked = |waiting: &PendingRequest| waiting.request.unique == reply.unique;
            let found = self.waiting().iter().find(|waiting| asked(waiting)).copied();
            let Some(PendingRequest { request, .. }) = found else { return SessionEnd::Unexpected };
            let body = &mut body[..reply.length - REPLY_HEADER];
            if let Err(error) = guest.read_exact(body).await {
                return SessionEnd::Stream(error);
            }
            if reply.errno == 0
                && let Err(hostile) = harden(request, body)
            {
                // The request still waits, and fails with the session.
                return hostile.into();
            }
            self.waiting().retain(|waiting| !asked(waiting));
            self.answered.notify_one();
            match self.device.write(&buffer[..reply.length]) {
                Ok(()) => {}
                // The kernel has reported an error to the caller.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return SessionEnd::Misfit,
                Err(error) => return SessionEnd::Device(error),
            }
        }
    }

    /// Resolves when a request has missed its deadline. All requests have the same time, so the oldest misses
    /// it first.
    async fn deadline(&self) -> SessionEnd {
        loop {
            let oldest = self.waiting().front().copied();
            match oldest {
                None => self.asked.notified().await,
                Some(waiting) if waiting.until <= Instant::now() => return SessionEnd::Deadline,
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
    buffer[CALLER_PID].fill(0);
    guest.write_all(&buffer[..request.length]).await?;
    guest.flush().await
}
