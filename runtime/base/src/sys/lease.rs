//! Leases on files (fcntl(2), "Leases").

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

/// Takes a read lease on a file that is open for reading only. False: the lease is refused, because some process has the
/// file open for writing, or the file system has no leases. It ends with the descriptor; SIGIO asks for that.
///
/// # Errors
/// Those of fcntl(2), F_SETLEASE. Files of other users need CAP_LEASE.
pub fn take_read_lease(file: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: the descriptor is open, and no memory is involved.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINVAL | libc::ENOLCK)) => {
            Ok(false)
        }
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd as _};

    use super::*;

    #[test]
    fn a_file_that_is_open_for_writing_has_no_lease() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(!take_read_lease(File::open(file.path()).unwrap().as_fd()).unwrap(), "its maker has it open");
        let path = file.into_temp_path();
        let leased = || take_read_lease(File::open(&path).unwrap().as_fd()).unwrap();
        assert!(leased() && leased(), "each ends with its descriptor");
    }
}
