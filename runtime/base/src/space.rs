//! The space that containers leave free on the host's file systems.
//!
//! Disks are sparse, so together they may grow far beyond the file system that they are on.

use std::{io, os::fd::AsFd};

use rustix::fs::fstatvfs;

/// The share of a file system that is kept free. The default keeps nothing free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskReserve {
    percent: u64,
}

/// The space of a file system, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FreeSpace {
    /// What processes without privileges can still take (statvfs(3), `f_bavail`).
    pub free: u64,
    /// What is kept of that.
    pub kept: u64,
}

impl FreeSpace {
    /// What containers can still take.
    pub fn usable(self) -> u64 {
        self.free.saturating_sub(self.kept)
    }
}

impl DiskReserve {
    /// `percent` of the whole file system, at most all of it.
    pub const fn percent(percent: u64) -> Self {
        Self { percent: if percent > 100 { 100 } else { percent } }
    }

    /// Whether containers can take all space there is.
    pub fn is_nothing(self) -> bool {
        self.percent == 0
    }

    /// The space of the file system that `file` is on.
    ///
    /// # Errors
    /// The errors of fstatvfs(3).
    pub fn space(self, file: impl AsFd) -> io::Result<FreeSpace> {
        let found = fstatvfs(file)?;
        let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
        Ok(FreeSpace {
            free: bytes(found.f_bavail),
            kept: bytes(found.f_blocks).saturating_mul(self.percent) / 100,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kept_share_is_one_of_the_whole_file_system() {
        let file = tempfile::tempfile().unwrap();
        let nothing = DiskReserve::percent(0).space(&file).unwrap();
        assert_eq!((nothing.kept, nothing.usable()), (0, nothing.free));
        let all = DiskReserve::percent(1000).space(&file).unwrap();
        assert!(all.kept >= all.free && all.usable() == 0, "{all:?}");
        assert!(DiskReserve::default().is_nothing() && !DiskReserve::percent(1).is_nothing());
    }
}
