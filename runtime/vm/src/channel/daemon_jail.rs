//! The jail of vhost-device-vsock, which a guest reaches through the queues of its device.

use std::path::Path;

use machinen_base::process::{Jail, JailFiles, ResourceLimits, RunAs, SystemCalls};

/// Descriptors: one for each stream, of which a container needs a few.
const OPEN_FILES: u64 = 4096;
/// The daemon has a thread for its device and one for each of the device's queues.
const THREADS: u64 = 32;

/// What the daemon calls besides what every program does: its threads, their events, and Unix sockets.
const CALLS: [i64; 27] = [
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_ioctl,
    libc::SYS_listen,
    libc::SYS_memfd_create,
    libc::SYS_prctl,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];

/// The restrictions of the daemon of one VM, which sees only the directory of its sockets.
pub(super) fn jail(sockets: &Path, identity: RunAs) -> Jail {
    let limits = ResourceLimits {
        file_size: Some(0),
        open_files: Some(OPEN_FILES),
        processes: Some(THREADS),
        locked_memory: Some(0),
        cpu_seconds: None,
    };
    let files = JailFiles { working_dir: Some(sockets.to_owned()), ..JailFiles::default() };
    let calls = SystemCalls::basic().and(&CALLS).and_threads();
    let calls = calls.and_with_argument(libc::SYS_socket, 0, u64::MAX, libc::AF_UNIX as u64);
    Jail { limits, files: Some(files), system_calls: Some(calls), ..Jail::strict(identity) }
}

#[cfg(test)]
mod tests {
    use machinen_base::process::{ReservedUser, probe};

    use super::*;

    #[test]
    fn a_taken_over_daemon_reaches_nothing_but_its_sockets() {
        let dir = tempfile::tempdir().unwrap();
        let user = ReservedUser::reserve().unwrap();
        let jail = jail(dir.path(), user.run_as(Vec::new()));
        assert_eq!(jail.system_calls.as_ref().unwrap().forbidden(), None);
        assert_eq!(probe(&jail, 0).unwrap(), Vec::<String>::new());
    }
}
