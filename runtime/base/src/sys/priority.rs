//! The priority of threads (setpriority(2)).

use std::io;

use nix::errno::Errno;

/// That of this thread: -20 (the highest) to 19.
pub(crate) fn own() -> io::Result<i32> {
    Errno::clear();
    // SAFETY: no memory is involved.
    let priority = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    // -1 is a priority, too.
    match Errno::last() {
        Errno::UnknownErrno => Ok(priority),
        error if priority == -1 => Err(error.into()),
        _ => Ok(priority),
    }
}

/// Sets that of another thread, whose new threads and children inherit it. `tid` must not have been reaped.
pub(crate) fn set(tid: u32, priority: i32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, tid, priority) })?;
    Ok(())
}
