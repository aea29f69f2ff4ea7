//! What a share server may see, use and call.
//!
//! The server runs as root, because files of any user are read and written for the guest's users. It has the
//! capabilities for that and no other: it cannot mount, make device nodes or reach other processes, and a handle
//! of a file, which would lead out of the volumes, cannot be opened (open_by_handle_at(2) is not among its calls).

use machinen_base::process::{Jail, JailFiles, ResourceLimits, RunAs, SystemCalls};

use rustix::process::{Resource, getrlimit};

use super::root::VOLUMES;

/// See capabilities(7) and linux/capability.h.
const CHOWN: u8 = 0;
const DAC_OVERRIDE: u8 = 1;
const DAC_READ_SEARCH: u8 = 2;
const FOWNER: u8 = 3;
const FSETID: u8 = 4;
const SETGID: u8 = 6;
const SETUID: u8 = 7;
const SETPCAP: u8 = 8;
const LEASE: u8 = 28;
const SETFCAP: u8 = 31;

/// What the server keeps while it serves.
pub(super) const CAPABILITIES: [u8; 9] =
    [CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID, LEASE, SETFCAP];

/// The server has a descriptor for each file and directory that the guest knows, and for each that it has open.
/// This bounds the host's memory for them: some 1.5 KiB each. A guest that goes further gets EMFILE.
pub(super) const MAX_FILES: u64 = 256 << 10;

const CALLS: [i64; 44] = [
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_prctl,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getcpu,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_lremovexattr,
    libc::SYS_lsetxattr,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_removexattr,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_rmdir,
    libc::SYS_setxattr,
    libc::SYS_symlinkat,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    libc::SYS_epoll_create1,
    libc::SYS_eventfd2,
    libc::SYS_pselect6,
    // Connections to sockets in the volumes.
    libc::SYS_connect,
    libc::SYS_openat2,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_setsockopt,
];

/// The jail of a server before it has started to serve.
pub(super) fn jail() -> Jail {
    let mut capabilities = CAPABILITIES.to_vec();
    // To have capabilities not depend on the user; given up before the server reads anything.
    capabilities.push(SETPCAP);
    let strict = Jail::strict(RunAs::default());
    let inherited = getrlimit(Resource::Nofile).maximum.unwrap_or(MAX_FILES);
    Jail {
        files: Some(JailFiles { mount_points: vec![VOLUMES.into()], ..JailFiles::default() }),
        capabilities: Some(capabilities),
        // Without the capability to raise limits, a process cannot exceed what it inherits; see `start.rs`.
        limits: ResourceLimits { open_files: Some(inherited.min(MAX_FILES)), ..strict.limits },
        system_calls: Some(system_calls()),
        ..strict
    }
}

fn system_calls() -> SystemCalls {
    let calls = SystemCalls::basic().and(&CALLS).and_threads().and_missing(&[libc::SYS_ioctl]);
    calls.and_with_argument(libc::SYS_socket, 0, u64::from(u32::MAX), libc::AF_UNIX as u64)
}

#[cfg(test)]
mod tests {
    use machinen_base::process::probe;

    use super::*;

    /// The server is root, with the capabilities that files of any owner take.
    #[test]
    fn a_taken_over_server_reaches_nothing_but_its_volumes() {
        let kept = jail().capabilities.unwrap().iter().fold(0, |mask, bit| mask | 1 << bit);
        assert_eq!(probe(&jail(), kept).unwrap(), ["is user 0"]);
    }

    #[test]
    fn no_call_leads_out_of_the_volumes() {
        assert_eq!(system_calls().forbidden(), None);
    }
}
