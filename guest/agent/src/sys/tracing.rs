//! Calls of ptrace(2) that no crate wraps.

use nix::{errno::Errno, unistd::Pid};

/// The tracee's system calls pass no seccomp filter (ptrace(2)).
pub(crate) const PTRACE_O_SUSPEND_SECCOMP: libc::c_int = libc::PTRACE_O_SUSPEND_SECCOMP;

/// The signals that a stopped thread blocks, a bit each; bit 0 is signal 1.
///
/// # Errors
/// Those of ptrace(2).
pub(crate) fn signal_mask(thread: Pid) -> Result<u64, Errno> {
    let mut mask = 0_u64;
    // SAFETY: the kernel writes as many bytes to `mask` as the third argument says.
    let done =
        unsafe { libc::ptrace(libc::PTRACE_GETSIGMASK, thread.as_raw(), size_of::<u64>(), &raw mut mask) };
    Errno::result(done).map(|_| mask)
}

/// Sets the signals that a stopped thread blocks.
///
/// # Errors
/// Those of ptrace(2).
pub(crate) fn set_signal_mask(thread: Pid, mask: u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads as many bytes of `mask` as the third argument says.
    let done =
        unsafe { libc::ptrace(libc::PTRACE_SETSIGMASK, thread.as_raw(), size_of::<u64>(), &raw const mask) };
    Errno::result(done).map(drop)
}
