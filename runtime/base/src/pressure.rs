//! The event that the host's memory gets scarce (Documentation/accounting/psi.rst of Linux).

use std::{
    fs::File,
    io::{self, Write as _},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt as _},
};

use tokio::io::{Interest, unix::AsyncFd};

use crate::sys;

const FILE: &str = "/proc/pressure/memory";

/// Processes that together wait for memory for 150 ms of two seconds.
const TRIGGER: &[u8] = b"some 150000 2000000\0";

/// A watch for the scarcity of the host's memory.
#[derive(Debug)]
pub struct MemoryPressure(AsyncFd<OwnedFd>);

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
        Ok(Self(sys::async_fd_of_priority(file.into())?))
    }

    /// Returns when the memory has been scarce.
    ///
    /// # Errors
    /// The event loop has ended.
    pub async fn scarce(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_host_with_memory_reports_nothing() {
        let watch = match MemoryPressure::watch() {
            Ok(watch) => watch,
            // Without pressure stall information there is nothing to watch.
            Err(error) => {
                assert!(!std::path::Path::new(FILE).exists(), "{error}");
                return;
            }
        };
        tokio::time::timeout(Duration::from_millis(10), watch.scarce()).await.unwrap_err();
    }
}
