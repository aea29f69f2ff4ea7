//! What a child process does to itself between fork and exec.

use std::{
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::Command,
};

use seccompiler::BpfProgram;

/// How a process is related to the one that starts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bond {
    /// The process is killed when the thread that started it ends.
    Child,
    /// The process has a session of its own and outlives the one that started it.
    Detached,
    /// The program replaces the current one; the process stays the same.
    Replacement,
}

/// Plain data, complete before the fork: the child of a process with threads may only make system calls.
#[derive(Debug)]
pub struct ChildSetup {
    /// Pid of the process that forks.
    pub parent: u32,
    pub bond: Bond,
    /// A network namespace to enter.
    pub join_netns: Option<OwnedFd>,
    /// CLONE_NEW* flags.
    pub unshare: libc::c_int,
    /// uid, gid, supplementary groups.
    pub identity: Option<(u32, u32, Vec<u32>)>,
    pub drop_capabilities: bool,
    pub no_new_privileges: bool,
    pub no_core: bool,
    /// Decimal digits.
    pub oom_score_adj: Option<Vec<u8>>,
    /// A filter of system calls.
    pub filter: Option<BpfProgram>,
}

/// Makes `command` apply `setup` to itself just before it executes.
pub fn on_fork(command: &mut Command, setup: ChildSetup) {
    // SAFETY: `apply` only makes system calls on data that was complete before the fork; it does not allocate
    // or lock.
    unsafe { command.pre_exec(move || apply(&setup)) };
}

fn apply(setup: &ChildSetup) -> io::Result<()> {
    // SAFETY: plain system calls on values and on memory that `setup` owns.
    unsafe {
        match setup.bond {
            // A process group of its own: Ctrl-C at the terminal is for machinen, which then ends its
            // children in order.
            Bond::Child => check(libc::setpgid(0, 0).into())?,
            Bond::Detached => check(libc::setsid().into())?,
            Bond::Replacement => {}
        }
        // Only the descriptors that are moved to their numbers after this are inherited.
        check(libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC))?;
        if setup.no_core {
            let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            check(libc::setrlimit(libc::RLIMIT_CORE, &none).into())?;
        }
        if let Some(value) = &setup.oom_score_adj {
            let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            check(fd.into())?;
            check(libc::write(fd, value.as_ptr().cast(), value.len()) as i64)?;
            libc::close(fd);
        }
        if let Some(netns) = &setup.join_netns {
            check(libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET).into())?;
        }
        if setup.unshare != 0 {
            check(libc::unshare(setup.unshare).into())?;
        }
        if setup.unshare & libc::CLONE_NEWNS != 0 {
            let flags = libc::MS_SLAVE | libc::MS_REC;
            let none = std::ptr::null();
            check(libc::mount(none, c"/".as_ptr(), none, flags, none.cast()).into())?;
        }
        if setup.drop_capabilities {
            drop_bounding_set()?;
        }
        if let Some((uid, gid, groups)) = &setup.identity {
            // Raw system calls, because the C library's functions would try to change threads that do not
            // exist in this child.
            check(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
            check(libc::syscall(libc::SYS_setresgid, *gid, *gid, *gid))?;
            check(libc::syscall(libc::SYS_setresuid, *uid, *uid, *uid))?;
        }
        if setup.drop_capabilities {
            drop_capability_sets()?;
        }
        if setup.no_new_privileges {
            check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        }
        if let Some(filter) = &setup.filter {
            seccompiler::apply_filter(filter).map_err(|_| io::Error::last_os_error())?;
        }
        if setup.bond == Bond::Child {
            // After the change of identity, which clears it.
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0).into())?;
            if libc::getppid() as u32 != setup.parent {
                libc::_exit(libc::EXIT_FAILURE);
            }
        }
    }
    Ok(())
}

/// Gives up every capability of this process, for good.
pub fn drop_capabilities() -> io::Result<()> {
    drop_bounding_set()?;
    drop_capability_sets()
}

fn drop_bounding_set() -> io::Result<()> {
    // The kernel answers EINVAL for the first capability that it does not know.
    for capability in 0..64 {
        // SAFETY: no memory is involved.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::EINVAL) && capability > 0 {
                break;
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Empties the ambient, inheritable, permitted and effective sets (capabilities(7)).
fn drop_capability_sets() -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header { version: VERSION_3, pid: 0 };
    let none = [0_u32; 6];
    // SAFETY: version 3 of capset(2) reads one header and two triples of 32-bit words.
    unsafe {
        check(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0).into())?;
        check(libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()))
    }
}

fn check(result: i64) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
