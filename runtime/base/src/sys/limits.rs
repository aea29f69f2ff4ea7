//! Resource limits of other processes (prlimit(2)).

use std::io;

use rustix::thread::{CapabilitySet, capabilities};

/// Whether this process may raise the limits of others, which needs CAP_SYS_RESOURCE: root in a container, for
/// example, often has no such capability. The one that root of another user namespace has does not count.
pub fn can_raise() -> bool {
    crate::owner::user().is_none()
        && capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_RESOURCE))
}

/// Raises RLIMIT_FSIZE of a process to `bytes`, unless it is higher already.
///
/// `pid` must be a child that has not been reaped.
pub fn raise_file_size(pid: u32, bytes: u64) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: prlimit(2) writes the structure, which lives until the call returns, and reads none.
    let read = unsafe { libc::prlimit(pid, libc::RLIMIT_FSIZE, std::ptr::null(), &raw mut limit) };
    check(read)?;
    if limit.rlim_cur >= bytes {
        return Ok(());
    }
    limit = libc::rlimit { rlim_cur: bytes, rlim_max: limit.rlim_max.max(bytes) };
    // SAFETY: prlimit(2) reads the structure, which lives until the call returns, and writes none.
    check(unsafe { libc::prlimit(pid, libc::RLIMIT_FSIZE, &raw const limit, std::ptr::null_mut()) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
