//! Closes the jail of a twin, whose threads stand: what `sys::child` does between fork and exec, but for files and namespaces.

use std::{ffi::CStr, fs, io};

use libc::c_long;
use seccompiler::BpfProgram;

use super::memory::{self, Scratch};
use crate::{
    process::{Jail, RunAs},
    sys::ptrace::Tracee,
};

/// A twin that is made to call the kernel by its first thread.
struct Caller<'a> {
    thread: Tracee,
    syscall: u64,
    scratch: &'a Scratch<'a>,
}

/// Applies `jail` to the twin with this first thread, before it has others, and gives it a name.
pub(super) fn confine(
    thread: Tracee,
    syscall: u64,
    scratch: &Scratch<'_>,
    name: &CStr,
    jail: &Jail,
) -> io::Result<()> {
    let twin = Caller { thread, syscall, scratch };
    // As a process that has been started: Ctrl-C at the terminal is for machinen. The session is not that of this process, into
    // which no other can come.
    twin.call(libc::SYS_setsid, [0; 6])?;
    let name = scratch.put(name.to_bytes_with_nul())?;
    twin.call(libc::SYS_prctl, [libc::PR_SET_NAME as u64, name, 0, 0, 0, 0])?;
    if let Some(value) = jail.oom_score_adj {
        fs::write(format!("/proc/{}/oom_score_adj", thread.pid()), value.to_string())?;
    }
    for (resource, limit) in jail.limits() {
        let both = scratch.put(&[limit.to_ne_bytes(), limit.to_ne_bytes()].concat())?;
        twin.call(libc::SYS_prlimit64, [0, resource.into(), both, 0, 0, 0])?;
    }
    if jail.capabilities.is_some() {
        twin.empty_bounding_set()?;
    }
    if let Some(user) = &jail.identity {
        twin.become_user(user)?;
    }
    if jail.capabilities.is_some() {
        twin.drop_capabilities()?;
    }
    if jail.new_keyring {
        twin.join_new_keyring()?;
    }
    if jail.no_new_privileges {
        twin.call(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0, 0])?;
    }
    jail.filters().iter().try_for_each(|filter| twin.add_filter(filter))
}

impl Caller<'_> {
    fn call(&self, number: c_long, arguments: [u64; 6]) -> io::Result<u64> {
        self.thread.call(self.syscall, number, arguments)
    }

    /// Those that the original needs to make twins.
    fn empty_bounding_set(&self) -> io::Result<()> {
        let bounding = memory::number_of_status(self.thread.pid(), "CapBnd:")?;
        for capability in (0..u64::BITS).filter(|capability| bounding & (1 << capability) != 0) {
            self.call(libc::SYS_prctl, [libc::PR_CAPBSET_DROP as u64, capability.into(), 0, 0, 0, 0])?;
        }
        Ok(())
    }

    fn become_user(&self, user: &RunAs) -> io::Result<()> {
        let groups: Vec<u8> = user.groups.iter().flat_map(|group| group.to_ne_bytes()).collect();
        let (uid, gid) = (u64::from(user.uid), u64::from(user.gid));
        let count = user.groups.len() as u64;
        self.call(libc::SYS_setgroups, [count, self.scratch.put(&groups)?, 0, 0, 0, 0])?;
        self.call(libc::SYS_setresgid, [gid, gid, gid, 0, 0, 0])?;
        self.call(libc::SYS_setresuid, [uid, uid, uid, 0, 0, 0])?;
        Ok(())
    }

    /// Of all sets. The change of the user has emptied some of them, if it was one.
    fn drop_capabilities(&self) -> io::Result<()> {
        const VERSION_3: u32 = 0x2008_0522;
        let header = self.scratch.put(&u64::from(VERSION_3).to_ne_bytes())?;
        self.call(libc::SYS_capset, [header, self.scratch.put(&[0; 24])?, 0, 0, 0, 0])?;
        Ok(())
    }

    /// A kernel without keys has none to leave.
    fn join_new_keyring(&self) -> io::Result<()> {
        const JOIN_SESSION_KEYRING: u64 = 1;
        match self.call(libc::SYS_keyctl, [JOIN_SESSION_KEYRING, 0, 0, 0, 0, 0]) {
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Adds a filter of system calls (struct sock_fprog, struct sock_filter).
    fn add_filter(&self, filter: &BpfProgram) -> io::Result<()> {
        let step = |step: &seccompiler::sock_filter| {
            let jumps = u64::from(step.jt) | u64::from(step.jf) << 8;
            (u64::from(step.code) | jumps << 16 | u64::from(step.k) << 32).to_ne_bytes()
        };
        let steps = self.scratch.put(&filter.iter().flat_map(step).collect::<Vec<_>>())?;
        let program = [filter.len() as u64, steps].map(u64::to_ne_bytes).concat();
        let program = self.scratch.put(&program)?;
        self.call(libc::SYS_seccomp, [libc::SECCOMP_SET_MODE_FILTER.into(), 0, program, 0, 0, 0])?;
        Ok(())
    }
}
