//! The host kernel's vhost-vsock device.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

nix::ioctl_write_ptr!(
    /// VHOST_VSOCK_SET_GUEST_CID of linux/vhost.h.
    set_guest_cid_ioctl,
    0xAF,
    0x60,
    u64
);

/// Gives the guest of a vhost-vsock device its context id (vsock(7)).
///
/// # Errors
/// EADDRINUSE when another device on this host has the CID.
pub fn set_guest_cid(device: BorrowedFd<'_>, cid: u32) -> io::Result<()> {
    let cid = u64::from(cid);
    // SAFETY: the ioctl reads one u64 through the pointer, which lives until it returns.
    unsafe { set_guest_cid_ioctl(device.as_raw_fd(), &raw const cid) }?;
    Ok(())
}
