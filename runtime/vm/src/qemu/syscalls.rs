//! The system calls that QEMU may make.
//!
//! The list has what QEMU 7.2 calls to boot, save and restore VMs, to add, use and remove disks and sockets, and to end;
//! and what it and its libraries call on the same paths elsewhere. Where a newer QEMU is killed by SIGSYS, the kernel's
//! log has the number of the call.

use machinen_base::process::SystemCalls;

use crate::{accel::Accelerator, spec::ChannelKind};

const CALLS: [i64; 66] = [
    // The event loop.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_pselect6,
    libc::SYS_signalfd4,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    libc::SYS_timer_create,
    libc::SYS_timer_delete,
    libc::SYS_timer_getoverrun,
    libc::SYS_timer_gettime,
    libc::SYS_timer_settime,
    // Signals between threads, and a vCPU's wait for one.
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_tkill,
    libc::SYS_pause,
    libc::SYS_alarm,
    // Threads: names, priorities, CPUs.
    libc::SYS_prctl,
    libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_getattr,
    libc::SYS_getcpu,
    // Disks.
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_sync_file_range,
    libc::SYS_fchdir,
    libc::SYS_flock,
    libc::SYS_syncfs,
    // Memory of the guest.
    libc::SYS_memfd_create,
    libc::SYS_mincore,
    libc::SYS_msync,
    libc::SYS_mlock,
    libc::SYS_munlock,
    // The monitor, the console, the channel, a disk that is served.
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
    // QEMU adds a filter of its own.
    libc::SYS_seccomp,
    // What glibc and GLib read about the process.
    libc::SYS_times,
    libc::SYS_getpgrp,
];

/// What QEMU and GLib try, and do without.
const MISSING: [i64; 5] = [
    libc::SYS_io_uring_setup,
    libc::SYS_get_mempolicy,
    libc::SYS_set_mempolicy,
    libc::SYS_mbind,
    libc::SYS_sched_setattr,
];

/// Requests of ioctl(2) without KVM: of sockets, pipes, terminals, disks, and of the tap device, whose name, owner and
/// namespace none of them changes.
const REQUESTS: [u32; 17] = [
    0x5421,      // FIONBIO
    0x541b,      // FIONREAD
    0x5401,      // TCGETS
    0x125e,      // BLKROGET
    0x1261,      // BLKFLSBUF
    0x1268,      // BLKSSZGET
    0x127b,      // BLKPBSZGET
    0x1277,      // BLKDISCARD
    0x127f,      // BLKZEROOUT
    0x8008_1272, // BLKGETSIZE64
    0x8004_54cf, // TUNGETFEATURES
    0x8004_54d2, // TUNGETIFF
    0x4004_54d0, // TUNSETOFFLOAD
    0x8004_54d7, // TUNGETVNETHDRSZ
    0x4004_54d8, // TUNSETVNETHDRSZ
    0x4004_54dc, // TUNSETVNETLE
    0x4004_54de, // TUNSETVNETBE
];

/// Requests of the kernel's devices that move data for a guest (linux/vhost.h).
const VHOST_REQUESTS: [u32; 16] = [
    0x8008_af00, // VHOST_GET_FEATURES
    0x4008_af00, // VHOST_SET_FEATURES
    0x0000_af01, // VHOST_SET_OWNER
    0x4008_af03, // VHOST_SET_MEM_TABLE
    0x4008_af10, // VHOST_SET_VRING_NUM
    0x4028_af11, // VHOST_SET_VRING_ADDR
    0x4008_af12, // VHOST_SET_VRING_BASE
    0xc008_af12, // VHOST_GET_VRING_BASE
    0x4008_af20, // VHOST_SET_VRING_KICK
    0x4008_af21, // VHOST_SET_VRING_CALL
    0x4008_af22, // VHOST_SET_VRING_ERR
    0x4008_af23, // VHOST_SET_VRING_BUSYLOOP_TIMEOUT
    0x4008_af25, // VHOST_SET_BACKEND_FEATURES
    0x8008_af26, // VHOST_GET_BACKEND_FEATURES
    0x4008_af60, // VHOST_VSOCK_SET_GUEST_CID
    0x4004_af61, // VHOST_VSOCK_SET_RUNNING
];

/// The system calls of a QEMU that uses `accel` and `channel`.
pub(super) fn allowed(accel: Accelerator, channel: &ChannelKind) -> SystemCalls {
    let calls = SystemCalls::basic().and(&CALLS).and_threads().and_missing(&MISSING);
    // A socket of this kind reaches nothing: the network namespace has no other process, and the root no socket.
    let calls = calls.and_with_argument(libc::SYS_socket, 0, u64::MAX, libc::AF_UNIX as u64);
    match (accel, channel) {
        (Accelerator::Kvm, _) => calls.and(&[libc::SYS_ioctl]),
        (Accelerator::Tcg { .. }, ChannelKind::KernelVsock) => {
            calls.and_requests(&[&REQUESTS[..], &VHOST_REQUESTS].concat())
        }
        (Accelerator::Tcg { .. }, _) => calls.and_requests(&REQUESTS),
    }
}
