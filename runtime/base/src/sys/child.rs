//! What a child process does to itself between fork and exec.

use std::{
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command},
    sync::mpsc,
    thread,
};

use seccompiler::BpfProgram;

use super::root::{self, RootMounts};

/// How a process is related to the one that starts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bond {
    /// The process is killed when the thread that started it ends.
    Child,
    /// The process has a session of its own and outlives the one that started it.
    Detached,
    /// The program replaces the current one; the process stays the same.
    Replacement,
}

/// Plain data, complete before the fork: the child of a process with threads may only make system calls.
#[derive(Debug)]
pub(crate) struct ChildSetup {
    /// A pidfd of the process that forks.
    pub(crate) parent: OwnedFd,
    /// How the child is related to the process that forks.
    pub(crate) bond: Bond,
    /// Namespaces to enter, of any type but pid.
    pub(crate) join_namespaces: Vec<OwnedFd>,
    /// The files that move the process that writes to them to a cgroup.
    pub(crate) cgroups: Vec<OwnedFd>,
    /// CLONE_NEW* flags.
    pub(crate) unshare: libc::c_int,
    /// The root directory to enter. Needs CLONE_NEWNS, and a pid namespace of the child's own.
    pub(crate) root: Option<RootMounts>,
    /// uid, gid, supplementary groups.
    pub(crate) identity: Option<(u32, u32, Vec<u32>)>,
    /// Join a new session keyring.
    pub(crate) new_keyring: bool,
    /// The only capabilities to keep in every set, the bounding set included, as a mask.
    pub(crate) capabilities: Option<u64>,
    /// Set PR_SET_NO_NEW_PRIVS (prctl(2)).
    pub(crate) no_new_privileges: bool,
    /// Decimal digits.
    pub(crate) oom_score_adj: Option<Vec<u8>>,
}

/// What would restrict the steps of [`ChildSetup`] and the move of the child's descriptors to their numbers.
#[derive(Debug)]
pub(crate) struct LastSetup {
    /// RLIMIT_* and the limit, both the soft and the hard one.
    pub(crate) limits: Vec<(libc::__rlimit_resource_t, u64)>,
    /// Filters of system calls.
    pub(crate) filters: Vec<BpfProgram>,
}

/// Makes `command` apply `setup` to itself just before it executes.
pub(crate) fn on_fork(command: &mut Command, setup: ChildSetup) {
    // SAFETY: `apply` only makes system calls on data that was complete before the fork; it does not allocate
    // or lock.
    unsafe { command.pre_exec(move || apply(&setup)) };
}

/// Makes `command` apply `setup` to itself after everything that was added to it before, and then execute.
pub(crate) fn just_before_exec(command: &mut Command, setup: LastSetup) {
    // SAFETY: as for `on_fork`: the closure only makes system calls on data that was complete before the fork.
    unsafe { command.pre_exec(move || apply_last(&setup)) };
}

fn apply_last(setup: &LastSetup) -> io::Result<()> {
    for (resource, limit) in &setup.limits {
        set_limit(*resource, *limit)?;
    }
    for filter in &setup.filters {
        seccompiler::apply_filter(filter).map_err(|_| io::Error::last_os_error())?;
    }
    Ok(())
}

/// Makes system calls only: see [`ChildSetup`].
fn apply(setup: &ChildSetup) -> io::Result<()> {
    match setup.bond {
        // A process group of its own: Ctrl-C at the terminal is for machinen, which then ends its children
        // in order.
        // SAFETY: no memory is involved.
        Bond::Child => check(unsafe { libc::setpgid(0, 0) }.into())?,
        // SAFETY: no memory is involved.
        Bond::Detached => check(unsafe { libc::setsid() }.into())?,
        Bond::Replacement => {}
    }
    close_on_exec()?;
    if let Some(value) = &setup.oom_score_adj {
        set_oom_score_adj(value)?;
    }
    setup.cgroups.iter().try_for_each(enter_cgroup)?;
    enter_namespaces(setup)?;
    if let Some(root) = &setup.root {
        root::enter(root)?;
    }
    if let Some(kept) = setup.capabilities {
        limit_bounding_set(kept)?;
        keep_capabilities()?;
    }
    if let Some((uid, gid, groups)) = &setup.identity {
        change_identity(*uid, *gid, groups)?;
    }
    if setup.new_keyring {
        // After the change of identity, so that the keyring counts against the quota of the child's user.
        join_new_keyring()?;
    }
    if let Some(kept) = setup.capabilities {
        set_capabilities(kept)?;
    }
    if setup.no_new_privileges {
        // SAFETY: no memory is involved.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    }
    if setup.bond == Bond::Child {
        // After the change of identity, which clears the signal.
        die_with_parent(setup.parent.as_fd())?;
    }
    Ok(())
}

/// Marks all descriptors but the standard streams. Only those that are moved to their numbers after this are
/// inherited.
fn close_on_exec() -> io::Result<()> {
    // SAFETY: no memory is involved, and no descriptor is closed before the program is executed.
    check(unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) })
}

fn set_limit(resource: libc::__rlimit_resource_t, limit: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
    // SAFETY: setrlimit(2) reads the structure, which lives until the call returns.
    check(unsafe { libc::setrlimit(resource, &raw const limit) }.into())
}

/// Leaves the session keyring of the parent. A kernel without keys has nothing to leave.
fn join_new_keyring() -> io::Result<()> {
    const JOIN_SESSION_KEYRING: libc::c_int = 1;
    let anonymous = std::ptr::null::<libc::c_char>();
    // SAFETY: keyctl(2) reads no memory when the keyring has no name.
    let joined = check(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, anonymous) });
    match joined {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        result => result,
    }
}

fn set_oom_score_adj(value: &[u8]) -> io::Result<()> {
    // SAFETY: the path is a C string, which lives as long as the program.
    let fd = unsafe { libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    check(fd.into())?;
    // SAFETY: write(2) reads as many bytes as `value` has.
    check(unsafe { libc::write(fd, value.as_ptr().cast(), value.len()) } as i64)?;
    // SAFETY: this function has opened the descriptor, and nothing else uses it.
    unsafe { libc::close(fd) };
    Ok(())
}

fn enter_cgroup(procs: &OwnedFd) -> io::Result<()> {
    // 0 stands for the process that writes (cgroups(7)).
    let own = b"0";
    // SAFETY: write(2) reads as many bytes as `own` has.
    check(unsafe { libc::write(procs.as_raw_fd(), own.as_ptr().cast(), own.len()) } as i64)
}

fn enter_namespaces(setup: &ChildSetup) -> io::Result<()> {
    for namespace in &setup.join_namespaces {
        // SAFETY: no memory is involved; `namespace` keeps its descriptor open.
        check(unsafe { libc::setns(namespace.as_raw_fd(), 0) }.into())?;
    }
    if setup.unshare != 0 {
        // SAFETY: no memory is involved. The flags are those of namespaces, and the child has one thread.
        check(unsafe { libc::unshare(setup.unshare) }.into())?;
    }
    if setup.unshare & libc::CLONE_NEWNS != 0 {
        let flags = libc::MS_SLAVE | libc::MS_REC;
        let none = std::ptr::null();
        // SAFETY: the target is a C string; mount(2) reads no other text to change how mounts propagate.
        check(unsafe { libc::mount(none, c"/".as_ptr(), none, flags, none.cast()) }.into())?;
    }
    Ok(())
}

/// Makes raw system calls, because the C library's functions would try to change threads that do not exist in
/// this child.
fn change_identity(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: setgroups(2) reads as many numbers as `groups` has.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    // SAFETY: no memory is involved.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: no memory is involved.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })
}

/// Has the kernel kill this process when the thread that started it ends, and ends now if `parent` has ended
/// before. The pid of the parent is not known in another pid namespace, but its pidfd is.
fn die_with_parent(parent: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) }.into())?;
    let mut ended = libc::pollfd { fd: parent.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: poll(2) reads and writes one structure, which lives until the call returns.
    let count = unsafe { libc::poll(&raw mut ended, 1, 0) };
    check(count.into())?;
    if count > 0 {
        // SAFETY: _exit(2) does not return and runs no code of this program.
        unsafe { libc::_exit(libc::EXIT_FAILURE) };
    }
    Ok(())
}

/// Starts `command` as the first process of a new pid namespace. This thread stays in its own pid namespace.
///
/// # Errors
/// There can be no more pid namespaces, or the program cannot be started.
///
/// # Panics
/// The thread cannot return to the pid namespace that its process is in, which would be a mistake of the kernel.
pub(crate) fn spawn_in_new_pid_namespace(mut command: Command) -> io::Result<Child> {
    let own = super::pidfd::open(std::process::id())?;
    // SAFETY: no memory is involved; `own` keeps its descriptor open.
    let enter_own = || check(unsafe { libc::setns(own.as_raw_fd(), libc::CLONE_NEWPID) }.into());
    // What is not allowed now would not be allowed after the change either.
    match enter_own() {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => return spawn_from_a_thread(command),
        allowed => allowed?,
    }
    unshare_pids()?;
    let result = command.spawn();
    enter_own().expect("a thread may return to the pid namespace of its process");
    result
}

/// As [`spawn_in_new_pid_namespace`], for a process in a user namespace that does not own its pid namespace: no thread of it
/// can return there. So the child is the only one of a new thread, which stays for as long as the child does, because the
/// child would end with it.
fn spawn_from_a_thread(mut command: Command) -> io::Result<Child> {
    let (sender, spawned) = mpsc::sync_channel(1);
    let start = move || {
        let started = unshare_pids().and_then(|()| {
            let mut child = command.spawn()?;
            match super::pidfd::open(child.id()) {
                Ok(pidfd) => Ok((child, pidfd)),
                Err(error) => child.kill().and_then(|()| child.wait()).and(Err(error)),
            }
        });
        match started {
            Ok((child, pidfd)) => {
                if sender.send(Ok(child)).is_ok() {
                    wait_readable(&pidfd);
                }
            }
            Err(error) => drop(sender.send(Err(error))),
        }
    };
    thread::Builder::new().name("child".to_owned()).spawn(start)?;
    spawned.recv().unwrap_or_else(|_| Err(io::Error::other("the thread that starts a child has ended")))
}

/// The children of this thread are in a new pid namespace after this.
fn unshare_pids() -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::unshare(libc::CLONE_NEWPID) }.into())
}

/// Returns when the process of a pidfd has ended.
fn wait_readable(pidfd: &OwnedFd) {
    let mut ended = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: poll(2) reads and writes one structure, which lives until the call returns.
    while unsafe { libc::poll(&raw mut ended, 1, -1) } < 0 {
        // Only a signal ends the call early.
    }
}

/// Gives up every capability of this process, for good.
pub fn drop_capabilities() -> io::Result<()> {
    limit_bounding_set(0)?;
    set_capabilities(0)
}

/// Gives up all capabilities of this thread but those with these numbers (capabilities(7)). To be called before other
/// threads are started.
pub fn keep_only_capabilities(kept: &[u8]) -> io::Result<()> {
    set_capabilities(kept.iter().fold(0, |mask, capability| mask | 1 << capability))
}

/// Has the capabilities of this thread stay as they are when its user changes, and of the threads that it starts. Needs
/// CAP_SETPCAP.
pub fn ignore_user_for_capabilities() -> io::Result<()> {
    const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: no memory is involved.
    check(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0) }.into())
}

/// Keeps the permitted capabilities when the user changes; exec(3) ends this.
fn keep_capabilities() -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) }.into())
}

fn limit_bounding_set(kept: u64) -> io::Result<()> {
    // The kernel answers EINVAL for the first capability that it does not know.
    for capability in (0..64).filter(|capability| kept & (1 << capability) == 0) {
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

/// Sets the ambient, inheritable, permitted and effective sets (capabilities(7)). A program that is executed keeps them,
/// whatever its user.
fn set_capabilities(kept: u64) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header { version: VERSION_3, pid: 0 };
    let (low, high) = (kept as u32, (kept >> 32) as u32);
    let sets = [low, low, low, high, high, high];
    // SAFETY: no memory is involved.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) }.into())?;
    // SAFETY: version 3 of capset(2) reads one header and two triples of 32-bit words.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) })?;
    for capability in (0..64).filter(|capability| kept & (1 << capability) != 0) {
        // SAFETY: no memory is involved.
        let raised =
            unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, capability, 0, 0) };
        check(raised.into())?;
    }
    Ok(())
}

fn check(result: i64) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
