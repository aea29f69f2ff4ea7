//! The programs with which cgroups decide about devices.

use std::{
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::OnceLock,
};

use nix::errno::Errno;

use crate::sys;

/// One instruction of the kernel's BPF machine, encoded.
pub(crate) type Instruction = u64;

/// Programs that the kernel has checked and translated already. A container that asks for one of them gets that one: it
/// takes the kernel longer to check a program than to make the cgroup.
#[derive(Debug, Default)]
pub(crate) struct DeviceFilters {
    usual: OnceLock<(Vec<Instruction>, OwnedFd)>,
}

impl DeviceFilters {
    /// Loads the program that most containers have. A second call does nothing.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub(crate) fn warm_up(&self, code: Vec<Instruction>) -> Result<(), Errno> {
        let program = sys::load_device_filter(&code)?;
        self.usual.get_or_init(|| (code, program));
        Ok(())
    }

    /// Lets a cgroup have only the devices that the program `code` allows.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub(super) fn attach(&self, cgroup: BorrowedFd<'_>, code: &[Instruction]) -> Result<(), Errno> {
        match self.usual.get() {
            Some((usual, program)) if usual == code => sys::attach_device_filter(cgroup, program.as_fd()),
            _ => sys::attach_device_filter(cgroup, sys::load_device_filter(code)?.as_fd()),
        }
    }
}
