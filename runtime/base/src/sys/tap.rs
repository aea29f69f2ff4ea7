//! Tap devices (the kernel's networking/tuntap.rst).

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

/// The file that tap devices are made with.
pub const DEVICE: &str = "/dev/net/tun";

/// Whether this process may make tap devices: the file exists, and may be opened.
pub fn is_usable() -> bool {
    File::options().read(true).write(true).open(DEVICE).is_ok()
}

/// Makes a tap device in the network namespace of this thread. It carries virtio's header before each packet, so that
/// the other side can leave checksums and segments to the host. The device is removed when the last copy of the
/// descriptor is closed.
///
/// # Errors
/// The errors of open(2) and of TUNSETIFF. A name of 16 bytes or more is not valid.
pub fn create(name: &str) -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open(DEVICE)?;
    // SAFETY: all bytes zero is a valid value of this structure of numbers and bytes.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains('\0') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a name of a network device"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one structure, which lives until the call returns.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(file.into()) }
}

/// Sets the length of the header before each packet, bytes (TUNSETVNETHDRSZ).
///
/// # Errors
/// Those of ioctl(2).
pub fn set_header(device: &OwnedFd, length: i32) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one integer, which lives until the call returns.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Tells the device that the other side takes packets without checksums, and segments of TCP that are to be cut
/// (TUNSETOFFLOAD).
///
/// # Errors
/// Those of ioctl(2).
pub fn set_offloads(device: &OwnedFd) -> io::Result<()> {
    let offloads = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    // SAFETY: no memory is involved.
    let result =
        unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
