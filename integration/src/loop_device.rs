//! A block device of the host, for containers that get one.

use std::{fs::File, path::Path};

use anyhow::Result;

use crate::process::Invocation;

/// A loop device with an ext4, which is detached in the end.
#[derive(Debug)]
pub struct LoopDevice {
    pub path: String,
    /// Major and minor.
    pub numbers: (u64, u64),
}

impl LoopDevice {
    /// With the files of a directory.
    ///
    /// # Errors
    /// mke2fs or losetup fails.
    pub fn new(image: &Path, files: &Path) -> Result<Self> {
        File::create(image)?.set_len(32 << 20)?;
        Invocation::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).args([files, image]).run()?.ok()?;
        let attached = Invocation::new("losetup").args(["--find", "--show"]).arg(image).run()?.ok()?;
        let path = attached.text().trim().to_owned();
        let numbers = nix::sys::stat::stat(path.as_str())?.st_rdev;
        Ok(Self { path, numbers: (nix::sys::stat::major(numbers), nix::sys::stat::minor(numbers)) })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // The device is released when its last user has closed it; the inventory finds one that is left.
        let _detached = Invocation::new("losetup").args(["--detach", &self.path]).run();
    }
}
