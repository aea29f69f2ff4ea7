//! The event that processes of the host wait for memory (Documentation/accounting/psi.rst of Linux).

use std::{
    fs::File,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
};

use tokio::io::Interest;

use crate::{slow_close::SlowlyClosed, sys};

const FILE: &str = "/proc/pressure/memory";

/// Processes that together wait for memory for 150 ms of two seconds.
const TRIGGER: &[u8] = b"some 150000 2000000\0";

/// A watch for processes that wait for memory.
#[derive(Debug)]
pub struct MemoryPressure(SlowlyClosed);

impl MemoryPressure {
    /// Begins to watch.
    ///
    /// # Errors
    /// The kernel has no pressure stall information (ENOENT, EOPNOTSUPP), or this process may not ask for
    /// events of it (EPERM).
    pub fn watch() -> io::Result<Self> {
        let mut file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(FILE)?;
        // The trigger lives as long as the open file.
        file.write_all(TRIGGER)?;
        Ok(Self(sys::async_fd_of_priority(file.into())?.into()))
    }

    /// Returns when processes have waited. The first event can be about a time before the watch, and memory may be
    /// available all the same, for example outside of a control group with a limit.
    ///
    /// # Errors
    /// The event loop has ended.
    pub async fn stalled(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_kernel_takes_the_trigger_where_it_has_the_information() {
        let kernel_has_it = std::path::Path::new(FILE).exists();
        assert_eq!(MemoryPressure::watch().is_ok(), kernel_has_it);
    }
}
