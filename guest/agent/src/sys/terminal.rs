//! Terminal calls of the kernel that no crate wraps (tty_ioctl(2), ioctl_tty(2)).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

/// Of the kernel's include/uapi/asm-generic/ioctls.h.
const TIOCGDEV: libc::Ioctl = 0x8004_5432;

/// Lets the slave of a fresh pair be opened.
///
/// # Errors
/// Those of the ioctl.
pub(crate) fn unlock(master: BorrowedFd<'_>) -> Result<(), Errno> {
    let no: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const no) }).map(drop)
}

/// Opens the slave of a master, whatever there is at its path, and not as controlling terminal.
///
/// # Errors
/// Those of the ioctl, and of opening a terminal.
pub(crate) fn peer(master: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open(2)'s flags as its argument.
    let fd = Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the kernel has made the descriptor for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a terminal the controlling one of this process, which leads a session without one.
///
/// # Errors
/// Those of the ioctl.
pub(crate) fn control(slave: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: TIOCSCTTY takes an int by value.
    Errno::result(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// Sets the size, in characters.
///
/// # Errors
/// Those of the ioctl.
pub(crate) fn set_size(terminal: BorrowedFd<'_>, width: u16, height: u16) -> Result<(), Errno> {
    let size = libc::winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }).map(drop)
}

/// The number of the terminal that a descriptor of another process leads to, also by `/dev/tty` (TIOCGDEV).
///
/// # Errors
/// Those of pidfd_getfd(2) and of the ioctl; ENOTTY for what is not a terminal.
pub(crate) fn device_of_process(process: &OwnedFd, number: i32) -> Result<u32, Errno> {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
    let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: the kernel has made the descriptor for this call.
    let terminal = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut device: libc::c_uint = 0;
    // SAFETY: TIOCGDEV writes an unsigned int.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), TIOCGDEV, &raw mut device) }).map(|_| device)
}
