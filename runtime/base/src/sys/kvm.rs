//! The parts of KVM that touch raw memory, and the time stamp counter.

use std::{io, num::NonZeroUsize, os::fd::AsRawFd as _, ptr::NonNull};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{VcpuFd, VmFd};
use nix::sys::{
    mman::{MapFlags, ProtFlags, mmap_anonymous, munmap},
    signal::Signal,
};

/// Zeroed memory for a guest.
#[derive(Debug)]
pub struct GuestMemory {
    address: NonNull<libc::c_void>,
    size: NonZeroUsize,
}

impl GuestMemory {
    /// Maps `size` bytes of zeros.
    pub fn new(size: NonZeroUsize) -> io::Result<Self> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new private mapping at an address of the kernel's choice touches no memory in use.
        let address = unsafe { mmap_anonymous(None, size, protection, MapFlags::MAP_PRIVATE) }?;
        Ok(Self { address, size })
    }

    /// Copies bytes into the memory of a guest that does not run.
    ///
    /// # Panics
    /// The bytes do not fit, which is a mistake of the caller.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset.checked_add(bytes.len());
        assert!(end.is_some_and(|end| end <= self.size.get()), "write beyond the guest's memory");
        // SAFETY: the range lies inside the mapping, which only this value and a stopped guest refer to.
        unsafe {
            let to = self.address.as_ptr().cast::<u8>().add(offset);
            to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }

    /// Makes this the guest's physical memory from address 0; it must be kept until the VM is dropped.
    pub fn map_into(&self, vm: &VmFd) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: 0,
            memory_size: self.size.get() as u64,
            userspace_addr: self.address.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region is mapped, and nothing of this process but the guest uses it while the guest
        // runs.
        unsafe { vm.set_user_memory_region(region) }.map_err(os_error)
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, and nothing refers to it any more. Failure would mean that
        // it is not mapped, which leaves nothing to do.
        unsafe { munmap(self.address, self.size.get()) }.ok();
    }
}

/// `struct kvm_signal_mask` of linux/kvm.h with the kernel's 8-byte signal set behind it.
#[repr(C)]
struct SignalMask {
    len: u32,
    blocked: [u8; 8],
}

nix::ioctl_write_ptr!(
    /// KVM_SET_SIGNAL_MASK; its number counts only the fixed part of the structure.
    set_signal_mask,
    0xAE,
    0x8B,
    u32
);

/// While the vCPU runs only `signal` can interrupt it; it is not delivered, `KVM_RUN` just returns EINTR.
pub fn interrupt_only_by(vcpu: &VcpuFd, signal: Signal) -> io::Result<()> {
    let blocked = !(1_u64 << (signal as u32 - 1));
    let mask = SignalMask { len: 8, blocked: blocked.to_ne_bytes() };
    // SAFETY: the kernel reads the length and as many bytes behind it as that says; both are in `mask`.
    unsafe { set_signal_mask(vcpu.as_raw_fd(), (&raw const mask).cast()) }?;
    Ok(())
}

/// The error of a KVM call as an [`io::Error`].
pub fn os_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// The time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux leaves it enabled.
    unsafe { core::arch::x86_64::_rdtsc() }
}
