//! AF_VSOCK through the host kernel's vhost-vsock.

use std::{
    fs::File,
    io,
    os::fd::AsFd as _,
    sync::{Mutex as StdMutex, PoisonError},
};

use machinen_base::sys;
use machinen_protocol::{STREAM_PORT, control_port};
use tokio::sync::Mutex;
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
    listener: Mutex<Option<VsockListener>>,
}

impl KernelVsock {
    /// Takes a CID that is free on this host and listens on the port that belongs to it.
    pub(super) fn prepare() -> Result<(Self, GuestEnd), VmChannelError> {
        let failed = |action| move |source| VmChannelError::Host { action, source };
        let device =
            File::options().read(true).write(true).open(DEVICE).map_err(failed("open /dev/vhost-vsock"))?;
        let cid = candidates(std::process::id())
            .find_map(|cid| match sys::vhost::set_guest_cid(device.as_fd(), cid) {
                Ok(()) => Some(Ok(cid)),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => None,
                Err(error) => Some(Err(failed("set a vsock CID")(error))),
            })
            .unwrap_or(Err(VmChannelError::NoCid(TRIES)))?;
        let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, control_port(cid)))
            .map_err(failed("listen on vsock"))?;
        let listener = Mutex::new(Some(listener));
        let fd = device.try_clone().map_err(failed("duplicate a descriptor"))?.into();
        Ok((Self { cid, device: StdMutex::new(Some(device)), listener }, GuestEnd { fd, cid }))
    }

    /// Other guests and programs of this host can dial the port as well; their streams are closed.
    pub(super) async fn accept(&self) -> Result<BoxedStream, VmChannelError> {
        let failed = |source| VmChannelError::Host { action: "accept a vsock stream", source };
        let mut slot = self.listener.lock().await;
        let Some(listener) = slot.as_mut() else {
            return Err(failed(io::ErrorKind::NotConnected.into()));
        };
        let mut warned = false;
        loop {
            let (stream, peer) = listener.accept().await.map_err(failed)?;
            if peer.cid() == self.cid {
                *slot = None;
                return Ok(Box::new(stream));
            }
            if !std::mem::replace(&mut warned, true) {
                tracing::warn!(cid = peer.cid(), "another guest or program dialled this VM's control port");
            }
        }
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

    /// Releases the CID. Nothing is dialled any more.
    pub(super) fn close(&self) {
        self.device().take();
    }

    fn device(&self) -> std::sync::MutexGuard<'_, Option<File>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
}
