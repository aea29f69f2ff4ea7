//! AF_VSOCK through the host kernel's vhost-vsock.

use std::{
    fs::File,
    future::poll_fn,
    io,
    os::fd::AsFd as _,
    sync::{Mutex as StdMutex, MutexGuard, PoisonError},
    task::Poll,
};

use machinen_base::sys;
use machinen_protocol::{STREAM_PORT, control_port};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use super::{BoxedStream, GuestEnd, VmChannelError};

pub(super) const DEVICE: &str = "/dev/vhost-vsock";

/// The number of CIDs that are tried. A host that runs more VMs than this meets other limits first.
const TRIES: u32 = 1 << 16;
/// CIDs 0 to 2 are reserved, and people choose small ones by hand.
const FIRST: u32 = 1 << 16;

#[derive(Debug)]
pub(super) struct KernelVsock {
    cid: u32,
    /// The device, also open in QEMU. As long as it is open here, no other guest can get the CID, and be dialled in place
    /// of this one when QEMU has ended.
    device: StdMutex<Option<File>>,
    /// None when the control stream is open.
    listener: StdMutex<Option<VsockListener>>,
}

impl KernelVsock {
    /// Takes a CID that is free on this host, and whose port is free, and listens on that port.
    pub(super) fn prepare() -> Result<(Self, GuestEnd), VmChannelError> {
        let failed = |action| move |source| VmChannelError::Host { action, source };
        let device =
            File::options().read(true).write(true).open(DEVICE).map_err(failed("open /dev/vhost-vsock"))?;
        let (cid, listener) = first_free(candidates(std::process::id()), |cid| {
            sys::vhost::set_guest_cid(device.as_fd(), cid).map_err(|error| ("set a vsock CID", error))?;
            VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, control_port(cid)))
                .map_err(|error| ("listen on vsock", error))
        })?;
        let fd = device.try_clone().map_err(failed("duplicate a descriptor"))?.into();
        let (device, listener) = (StdMutex::new(Some(device)), StdMutex::new(Some(listener)));
        Ok((Self { cid, device, listener }, GuestEnd { fd, cid }))
    }

    /// The port that the guest is to dial.
    pub(super) fn control_port(&self) -> u32 {
        control_port(self.cid)
    }

    /// Accepts a stream of the guest. Other guests and programs of this host can dial the port as well; their streams are
    /// closed.
    pub(super) async fn accept(&self) -> Result<BoxedStream, VmChannelError> {
        let mut warned = false;
        loop {
            let accepted = poll_fn(|cx| match &*self.listener() {
                Some(listener) => listener.poll_accept(cx),
                None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
            });
            let accepted = accepted.await;
            let (stream, peer) = accepted
                .map_err(|source| VmChannelError::Host { action: "accept a vsock stream", source })?;
            if peer.cid() == self.cid {
                return Ok(Box::new(stream));
            }
            if !std::mem::replace(&mut warned, true) {
                tracing::warn!(cid = peer.cid(), "another guest or program dialled this VM's control port");
            }
        }
    }

    pub(super) fn stop_listening(&self) {
        self.listener().take();
    }

    pub(super) async fn dial(&self) -> Result<BoxedStream, VmChannelError> {
        if self.device().is_none() {
            return Err(VmChannelError::Closed(io::ErrorKind::NotConnected.into()));
        }
        let stream = VsockStream::connect(VsockAddr::new(self.cid, STREAM_PORT))
            .await
            .map_err(VmChannelError::Closed)?;
        Ok(Box::new(stream))
    }

    /// Releases the CID and its port, so that the VM that is booted in place of this one may have them. Nothing is
    /// dialled any more.
    pub(super) fn close(&self) {
        self.stop_listening();
        self.device().take();
    }

    fn device(&self) -> MutexGuard<'_, Option<File>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listener(&self) -> MutexGuard<'_, Option<VsockListener>> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the first candidate of which nothing is in use. What fails is named next to the error.
fn first_free<T>(
    mut candidates: impl Iterator<Item = u32>,
    take: impl Fn(u32) -> Result<T, (&'static str, io::Error)>,
) -> Result<(u32, T), VmChannelError> {
    let found = candidates.find_map(|cid| match take(cid) {
        Ok(taken) => Some(Ok((cid, taken))),
        Err((_, error)) if error.kind() == io::ErrorKind::AddrInUse => None,
        Err((action, source)) => Some(Err(VmChannelError::Host { action, source })),
    });
    found.unwrap_or(Err(VmChannelError::NoCid(TRIES)))
}

/// Starts at a number that differs between processes, so that VMs that start together seldom try the same
/// CID.
fn candidates(seed: u32) -> impl Iterator<Item = u32> {
    let start = seed.wrapping_mul(0x9e37_79b1);
    (0..TRIES).map(move |step| FIRST + (start.wrapping_add(step) & 0x3fff_ffff))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_valid_and_distinct() {
        for seed in [0, 1, 4242, u32::MAX] {
            let all: std::collections::BTreeSet<u32> = candidates(seed).collect();
            assert_eq!(all.len(), TRIES as usize);
            assert!(*all.first().unwrap() >= FIRST && *all.last().unwrap() < u32::MAX / 2);
            assert!(all.iter().all(|cid| control_port(*cid) > *cid));
        }
    }

    #[test]
    fn a_cid_whose_port_is_in_use_is_passed_over() {
        let found = first_free(3..9, |cid| match cid {
            3 => Err(("set a vsock CID", io::ErrorKind::AddrInUse.into())),
            4 => Err(("listen on vsock", io::ErrorKind::AddrInUse.into())),
            _ => Ok(()),
        });
        assert_eq!(found.unwrap().0, 5);
        let error =
            first_free(3..9, |_| Err::<(), _>(("listen on vsock", io::ErrorKind::OutOfMemory.into())));
        assert!(error.unwrap_err().to_string().starts_with("cannot listen on vsock"));
        let used = first_free(3..5, |_| Err::<(), _>(("set a vsock CID", io::ErrorKind::AddrInUse.into())));
        assert!(matches!(used, Err(VmChannelError::NoCid(_))));
    }
}
