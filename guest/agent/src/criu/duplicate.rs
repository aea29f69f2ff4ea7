//! Makes processes of a frozen container duplicate a descriptor onto another one: dup3(2), called in each of them by
//! ptrace(2).
//!
//! A process must run to call it, and a frozen one does not. All threads of the container are therefore stopped by
//! ptrace before the container is thawed, and are let go when it is frozen again, as CRIU does. This is a program of its
//! own, since the agent's reaper would take the reports on traced threads.

use std::{
    env, fmt,
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::Path,
    process::ExitCode,
    str::FromStr,
};

use nix::{
    errno::Errno,
    sys::{
        ptrace::{self, Options},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use procfs::process::{MMapPath, Process};

use crate::{
    cgroup::{self, Cgroup},
    sys::tracing,
};

/// The name that the agent's program is called by for this.
pub(super) const NAME: &str = "machinen-duplicate";
/// The machine code of the instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Selector of the code segment of 64-bit programs (the kernel's `__USER_CS`).
const USER_CS: u64 = 0x33;
/// Most bytes of a vDSO that are searched. It has a few pages.
const MAX_VDSO: u64 = 64 << 10;

/// A call of dup3(2) in a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Duplicate {
    pub(super) pid: Pid,
    pub(super) from: i32,
    pub(super) to: i32,
    pub(super) closed_on_exec: bool,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum DuplicateError {
    #[error("the arguments are not those of the agent")]
    Arguments,
    #[error(transparent)]
    Cgroup(#[from] cgroup::CgroupError),
    #[error("cannot {what} thread {thread}")]
    Trace { what: &'static str, thread: Pid, source: Errno },
    #[error("cannot find the vDSO of process {pid}")]
    Vdso { pid: Pid, source: procfs::ProcError },
    #[error("process {pid} has no 64-bit system call to use")]
    NoCall { pid: Pid },
    #[error("thread {thread} has reported {status:?}")]
    Status { thread: Pid, status: WaitStatus },
    #[error("process {pid} cannot duplicate its descriptor {from}")]
    Refused { pid: Pid, from: i32, source: Errno },
}

/// The arguments of the program.
pub(super) fn arguments(cgroup: &Cgroup, wanted: &[Duplicate]) -> Vec<String> {
    let path = cgroup.path().strip_prefix(cgroup::ROOT).unwrap_or(cgroup.path()).display().to_string();
    [path].into_iter().chain(wanted.iter().map(ToString::to_string)).collect()
}

/// Does the work, if this program was started by its name.
pub(crate) fn run_as_duplicate() -> Option<ExitCode> {
    let mut args = env::args_os();
    let name = args.next()?;
    if Path::new(&name).file_name()? != NAME {
        return None;
    }
    let args: Option<Vec<String>> = args.map(|arg| arg.into_string().ok()).collect();
    match run(&args.unwrap_or_default()) {
        Ok(()) => Some(ExitCode::SUCCESS),
        Err(error) => {
            eprintln!("{NAME}: {error:?}");
            Some(ExitCode::FAILURE)
        }
    }
}

fn run(args: &[String]) -> Result<(), DuplicateError> {
    let (path, wanted) = args.split_first().ok_or(DuplicateError::Arguments)?;
    let wanted: Result<Vec<Duplicate>, _> = wanted.iter().map(|text| text.parse()).collect();
    let (cgroup, wanted) = (Cgroup::new(Path::new(path)), wanted?);
    let mut stopped = Stopped::default();
    for pid in cgroup.pids()? {
        stopped.stop_all_of(pid)?;
    }
    cgroup.thaw()?;
    // Each is tried. The first failure is reported.
    let done = wanted.iter().map(call).fold(Ok(()), Result::and);
    cgroup.begin_to_freeze()?;
    drop(stopped);
    done
}

/// Threads that are stopped by ptrace. They are let go when this is dropped.
#[derive(Debug, Default)]
struct Stopped {
    threads: Vec<Pid>,
}

impl Stopped {
    /// Stops all threads of a frozen process. One that has ended needs no stop.
    fn stop_all_of(&mut self, pid: Pid) -> Result<(), DuplicateError> {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { return Ok(()) };
        for entry in entries.flatten() {
            let Some(thread) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let thread = Pid::from_raw(thread);
            let failed = |what| move |source| DuplicateError::Trace { what, thread, source };
            // A filter of the process may not allow dup3, and may kill for it.
            let options =
                Options::PTRACE_O_TRACESYSGOOD | Options::from_bits_retain(tracing::PTRACE_O_SUSPEND_SECCOMP);
            match ptrace::seize(thread, options) {
                Err(Errno::ESRCH) => continue,
                seized => seized.map_err(failed("trace"))?,
            }
            self.threads.push(thread);
            ptrace::interrupt(thread).map_err(failed("interrupt"))?;
            wait(thread)?;
        }
        Ok(())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for thread in &self.threads {
            // One that was killed meanwhile needs nothing.
            let _ = ptrace::detach(*thread, None);
        }
    }
}

/// Calls dup3 in a stopped process, which is stopped as before afterwards.
fn call(wanted: &Duplicate) -> Result<(), DuplicateError> {
    let Duplicate { pid: thread, from, to, closed_on_exec } = *wanted;
    let failed = |what| move |source| DuplicateError::Trace { what, thread, source };
    let before = ptrace::getregs(thread).map_err(failed("read the registers of"))?;
    let instruction = syscall_instruction(thread)?;
    if before.cs != USER_CS {
        return Err(DuplicateError::NoCall { pid: thread });
    }
    let mut during = before;
    during.rip = instruction;
    during.rax = libc::SYS_dup3.cast_unsigned();
    // The kernel does not begin the interrupted system call again before this one.
    during.orig_rax = u64::MAX;
    during.rdi = u64::from(from.cast_unsigned());
    during.rsi = u64::from(to.cast_unsigned());
    during.rdx = if closed_on_exec { u64::from(libc::O_CLOEXEC.cast_unsigned()) } else { 0 };
    // No handler of a signal may run first.
    let mask = tracing::signal_mask(thread).map_err(failed("read the signal mask of"))?;
    tracing::set_signal_mask(thread, u64::MAX).map_err(failed("block the signals of"))?;
    let returned = ptrace::setregs(thread, during)
        .map_err(failed("set the registers of"))
        .and_then(|()| return_of_call(thread));
    ptrace::setregs(thread, before).map_err(failed("restore the registers of"))?;
    tracing::set_signal_mask(thread, mask).map_err(failed("restore the signal mask of"))?;
    let returned = returned?;
    // From a stop like the first one, the kernel begins the interrupted system call again.
    ptrace::interrupt(thread).map_err(failed("interrupt"))?;
    ptrace::cont(thread, None).map_err(failed("continue"))?;
    wait(thread)?;
    match returned.cast_signed() {
        error @ ..0 => {
            let source = Errno::from_raw(i32::try_from(-error).unwrap_or(i32::MAX));
            Err(DuplicateError::Refused { pid: thread, from, source })
        }
        _ => Ok(()),
    }
}

/// Lets a thread enter its next system call and leave it, and returns the call's result.
fn return_of_call(thread: Pid) -> Result<u64, DuplicateError> {
    for _ in 0..2 {
        ptrace::syscall(thread, None).map_err(|source| DuplicateError::Trace {
            what: "continue",
            thread,
            source,
        })?;
        match wait(thread)? {
            WaitStatus::PtraceSyscall(_) => {}
            status => return Err(DuplicateError::Status { thread, status }),
        }
    }
    let registers = ptrace::getregs(thread);
    registers.map(|registers| registers.rax).map_err(|source| DuplicateError::Trace {
        what: "read the registers of",
        thread,
        source,
    })
}

/// Waits until a thread has stopped.
fn wait(thread: Pid) -> Result<WaitStatus, DuplicateError> {
    let status = waitpid(thread, Some(WaitPidFlag::__WALL)).map_err(|source| DuplicateError::Trace {
        what: "wait for",
        thread,
        source,
    })?;
    match status {
        WaitStatus::Exited(..) | WaitStatus::Signaled(..) => Err(DuplicateError::Status { thread, status }),
        status => Ok(status),
    }
}

/// The address of an instruction for system calls. Every process has the kernel's vDSO mapped, which has some.
fn syscall_instruction(pid: Pid) -> Result<u64, DuplicateError> {
    let failed = |source| DuplicateError::Vdso { pid, source };
    let maps = Process::new(pid.as_raw()).and_then(|process| process.maps()).map_err(failed)?;
    let vdso = maps.into_iter().find(|map| map.pathname == MMapPath::Vdso);
    let (start, end) = vdso.ok_or(DuplicateError::NoCall { pid })?.address;
    let mut code = vec![0; usize::try_from((end - start).min(MAX_VDSO)).unwrap_or(0)];
    let memory = File::open(format!("/proc/{pid}/mem"));
    memory.and_then(|memory| memory.read_exact_at(&mut code, start)).map_err(|error| failed(error.into()))?;
    let found = code.windows(SYSCALL.len()).position(|bytes| bytes == SYSCALL);
    found.map(|offset| start + offset as u64).ok_or(DuplicateError::NoCall { pid })
}

impl fmt::Display for Duplicate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, from, to, closed_on_exec } = self;
        write!(f, "{pid}:{from}:{to}:{closed_on_exec}")
    }
}

impl FromStr for Duplicate {
    type Err = DuplicateError;

    fn from_str(text: &str) -> Result<Self, DuplicateError> {
        let mut parts = text.split(':');
        let mut number = || parts.next().and_then(|part| part.parse().ok()).ok_or(DuplicateError::Arguments);
        let (pid, from, to) = (Pid::from_raw(number()?), number()?, number()?);
        let closed_on_exec =
            parts.next().and_then(|part| part.parse().ok()).ok_or(DuplicateError::Arguments)?;
        Ok(Self { pid, from, to, closed_on_exec })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_understood() {
        let wanted = Duplicate { pid: Pid::from_raw(7), from: 0, to: 10, closed_on_exec: true };
        let arguments = arguments(&Cgroup::new(Path::new("/a/b")), std::slice::from_ref(&wanted));
        assert_eq!(arguments, ["a/b", "7:0:10:true"]);
        assert_eq!(arguments[1].parse::<Duplicate>().unwrap(), wanted);
        assert!("7:0:10".parse::<Duplicate>().is_err());
        assert!(run(&[]).is_err());
    }

    #[test]
    fn a_process_has_an_instruction_for_system_calls() {
        assert!(syscall_instruction(nix::unistd::getpid()).unwrap() > 0);
    }
}
