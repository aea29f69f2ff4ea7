//! Threads of other processes that are stopped, read, changed and made to call the kernel (ptrace(2)), on x86-64.
//!
//! All of it works for the thread alone that has begun to trace.

use std::{cell::RefCell, collections::HashMap, io, mem::MaybeUninit, path::Path};

use libc::{c_long, c_void, user_regs_struct};
use nix::{
    errno::Errno,
    sys::ptrace::{self, Options},
    unistd::Pid,
};

/// A thread of another process that this thread traces. It is stopped except while a function here runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tracee(Pid);

/// What a call of the kernel that a thread is made to make changes of it.
#[derive(Debug, Clone)]
pub(crate) struct Interrupted {
    /// The general registers. If a system call was interrupted, they are those that call it again.
    pub(crate) registers: user_regs_struct,
    /// The signals that are blocked.
    pub(crate) blocked: u64,
}

/// All that a thread has in its processor and in the kernel, besides its memory and descriptors.
#[derive(Debug, Clone)]
pub(crate) struct ThreadState {
    pub(crate) interrupted: Interrupted,
    /// The other registers, in the processor's own form (NT_X86_XSTATE).
    extended: Vec<u8>,
    /// Address and length of the list of robust locks (set_robust_list(2)).
    robust: [u64; 2],
    /// The area of restartable sequences, if there is one.
    sequences: Option<Sequences>,
}

/// What rseq(2) was called with (`struct ptrace_rseq_configuration`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Sequences {
    address: u64,
    size: u32,
    signature: u32,
    flags: u32,
    padding: u32,
}

/// Why a traced thread has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It enters or leaves a system call.
    Call,
    /// PTRACE_EVENT_*.
    Event(i32),
    /// The whole process stops, by a signal such as SIGSTOP, until SIGCONT.
    Group,
    /// A signal is about to be delivered.
    Signal(i32),
    /// The thread has ended, by this status of waitpid(2).
    Ended(i32),
}

const NT_X86_XSTATE: c_long = 0x202;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
/// More than any processor's registers take, bytes.
const MAX_EXTENDED: usize = 16 << 10;
/// What the kernel leaves in place of a result when a call was interrupted and is to be made again (ERESTARTSYS,
/// ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK).
const RESTART: [i64; 4] = [-512, -513, -514, -516];
/// Length of the instruction `syscall`.
const SYSCALL_LENGTH: u64 = 2;
/// Every signal.
const ALL_SIGNALS: u64 = u64::MAX;

impl Tracee {
    /// Begins to trace a thread, and stops it.
    pub(crate) fn seize(tid: i32, options: Options) -> io::Result<Self> {
        let tracee = Self(Pid::from_raw(tid));
        ptrace::seize(tracee.0, options)?;
        ptrace::interrupt(tracee.0)?;
        tracee.until_stopped()?;
        Ok(tracee)
    }

    /// A thread that the kernel traces because a traced thread has made it, once it has stopped.
    pub(crate) fn of_event(tid: i32) -> io::Result<Self> {
        let tracee = Self(Pid::from_raw(tid));
        tracee.until_stopped()?;
        Ok(tracee)
    }

    pub(crate) fn pid(self) -> i32 {
        self.0.as_raw()
    }

    /// Waits for the stop that was asked for; signals before it are delivered.
    fn until_stopped(self) -> io::Result<()> {
        loop {
            match self.wait()? {
                Stop::Event(libc::PTRACE_EVENT_STOP) | Stop::Group => return Ok(()),
                Stop::Signal(signal) => self.resume(libc::PTRACE_CONT, signal)?,
                Stop::Call | Stop::Event(_) => self.resume(libc::PTRACE_CONT, 0)?,
                Stop::Ended(_) => return Err(Errno::ESRCH.into()),
            }
        }
    }

    /// Waits until the thread stops or ends.
    pub(crate) fn wait(self) -> io::Result<Stop> {
        let status = self.wait_for_status()?;
        if !libc::WIFSTOPPED(status) {
            return Ok(Stop::Ended(status));
        }
        let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
        Ok(match (event, signal) {
            (0, signal) if signal == libc::SIGTRAP | 0x80 => Stop::Call,
            (0, signal) => Stop::Signal(signal),
            // The kernel reports the stop that was asked for with SIGTRAP, and so the end of the other one.
            (libc::PTRACE_EVENT_STOP, signal) if signal != libc::SIGTRAP => Stop::Group,
            (event, _) => Stop::Event(event),
        })
    }

    /// As waitpid(2) for the thread. The kernel reports the end of a process only when all of its other threads that are traced have
    /// been waited for. So what is reported of other threads meanwhile is waited for, and kept for the caller that asks for it.
    fn wait_for_status(self) -> io::Result<i32> {
        let pid = self.0.as_raw();
        loop {
            if let Some(status) = REPORTED.with_borrow_mut(|reported| reported.remove(&pid)) {
                return Ok(status);
            }
            let (other, has_ended) = next_report()?;
            // A process that has ended, and is not traced, is a child that this thread has started: it is its owner's to wait for.
            if other == pid || has_ended && is_process(other) {
                return waitpid(pid);
            }
            let status = waitpid(other)?;
            REPORTED.with_borrow_mut(|reported| reported.insert(other, status));
        }
    }

    /// Lets the thread run, with a signal if that is not 0.
    pub(crate) fn resume(self, request: libc::c_uint, signal: i32) -> io::Result<()> {
        self.request(request, std::ptr::null_mut(), signal as usize as *mut c_void)
    }

    /// Stops tracing; the thread runs.
    pub(crate) fn detach(self) -> io::Result<()> {
        Ok(ptrace::detach(self.0, None)?)
    }

    pub(crate) fn set_options(self, options: Options) -> io::Result<()> {
        Ok(ptrace::setoptions(self.0, options)?)
    }

    /// Reads the state of the thread; `robust` is read from the kernel by the id of the thread.
    pub(crate) fn state(self) -> io::Result<ThreadState> {
        Ok(ThreadState {
            interrupted: self.interrupted()?,
            extended: self.extended()?,
            robust: robust_list(self.0)?,
            sequences: self.sequences()?,
        })
    }

    /// Reads what [`Self::call`] changes.
    pub(crate) fn interrupted(self) -> io::Result<Interrupted> {
        let mut registers = ptrace::getregs(self.0)?;
        // As signed numbers, which the kernel means.
        let (call, result) = (registers.orig_rax as i64, registers.rax as i64);
        if call >= 0 && RESTART.contains(&result) {
            registers.rax = registers.orig_rax;
            registers.rip -= SYSCALL_LENGTH;
        }
        registers.orig_rax = u64::MAX;
        Ok(Interrupted { registers, blocked: self.blocked()? })
    }

    /// Gives the thread the registers and the blocked signals of a state.
    pub(crate) fn set_state(self, state: &ThreadState) -> io::Result<()> {
        let mut extended = libc::iovec {
            iov_base: state.extended.as_ptr().cast_mut().cast(),
            iov_len: state.extended.len(),
        };
        let kind = NT_X86_XSTATE as usize as *mut c_void;
        self.request(libc::PTRACE_SETREGSET, kind, (&raw mut extended).cast())?;
        self.go_on(&state.interrupted)
    }

    /// Has the thread go on where it was interrupted when it runs.
    pub(crate) fn go_on(self, interrupted: &Interrupted) -> io::Result<()> {
        self.set_blocked(interrupted.blocked)?;
        Ok(ptrace::setregs(self.0, interrupted.registers)?)
    }

    /// Has the thread go on at this address when it runs.
    pub(crate) fn go_to(self, address: u64) -> io::Result<()> {
        let mut registers = ptrace::getregs(self.0)?;
        (registers.rip, registers.orig_rax) = (address, u64::MAX);
        Ok(ptrace::setregs(self.0, registers)?)
    }

    /// Tells the kernel what the C library has told it for the thread that `state` is of.
    pub(crate) fn register(self, syscall: u64, state: &ThreadState) -> io::Result<()> {
        let [list, length] = state.robust;
        if list != 0 {
            self.call(syscall, libc::SYS_set_robust_list, [list, length, 0, 0, 0, 0])?;
        }
        if let Some(Sequences { address, size, signature, flags, .. }) = state.sequences {
            let arguments = [address, size.into(), flags.into(), signature.into(), 0, 0];
            self.call(syscall, libc::SYS_rseq, arguments)?;
        }
        Ok(())
    }

    /// Has the thread call the kernel, by the instruction `syscall` at this address. No signal is delivered meanwhile. The
    /// registers are those of the call afterwards.
    ///
    /// # Errors
    /// What the call answers, and those of ptrace(2).
    pub(crate) fn call(self, syscall: u64, number: c_long, arguments: [u64; 6]) -> io::Result<u64> {
        self.call_with(syscall, number, arguments, |_| Ok(())).map(|(result, _)| result)
    }

    /// As [`Self::call`], for a call that makes a process or thread, which is returned as it has stopped.
    pub(crate) fn call_for_thread(
        self,
        syscall: u64,
        number: c_long,
        arguments: [u64; 6],
    ) -> io::Result<Self> {
        match self.call_with(syscall, number, arguments, Self::of_event)? {
            (_, Some(made)) => Ok(made),
            (_, None) => Err(io::Error::other("the kernel has reported no new thread")),
        }
    }

    fn call_with<T>(
        self,
        syscall: u64,
        number: c_long,
        arguments: [u64; 6],
        on_thread: impl Fn(i32) -> io::Result<T>,
    ) -> io::Result<(u64, Option<T>)> {
        self.set_blocked(ALL_SIGNALS)?;
        let mut registers = ptrace::getregs(self.0)?;
        let [first, second, third, fourth, fifth, sixth] = arguments;
        registers.rip = syscall;
        registers.rax = number as u64;
        registers.orig_rax = u64::MAX;
        (registers.rdi, registers.rsi, registers.rdx) = (first, second, third);
        (registers.r10, registers.r8, registers.r9) = (fourth, fifth, sixth);
        ptrace::setregs(self.0, registers)?;
        let (mut entered, mut made) = (false, None);
        loop {
            self.resume(libc::PTRACE_SYSCALL, 0)?;
            match self.wait()? {
                Stop::Call if entered => break,
                Stop::Call => entered = true,
                Stop::Event(
                    libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK,
                ) => {
                    made = Some(on_thread(ptrace::getevent(self.0)? as i32)?);
                }
                Stop::Event(_) | Stop::Group => {}
                Stop::Signal(signal) => {
                    return Err(io::Error::other(format!("signal {signal} in the middle of a system call")));
                }
                Stop::Ended(_) => return Err(Errno::ESRCH.into()),
            }
        }
        let result = ptrace::getregs(self.0)?.rax;
        match result as i64 {
            -4095..=-1 => Err(io::Error::from_raw_os_error(-(result as i64) as i32)),
            _ => Ok((result, made)),
        }
    }

    fn blocked(self) -> io::Result<u64> {
        let mut blocked = 0_u64;
        let size = size_of::<u64>() as *mut c_void;
        self.request(libc::PTRACE_GETSIGMASK, size, (&raw mut blocked).cast())?;
        Ok(blocked)
    }

    fn set_blocked(self, mut blocked: u64) -> io::Result<()> {
        let size = size_of::<u64>() as *mut c_void;
        self.request(libc::PTRACE_SETSIGMASK, size, (&raw mut blocked).cast())
    }

    fn extended(self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0_u8; MAX_EXTENDED];
        let mut vector = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let kind = NT_X86_XSTATE as usize as *mut c_void;
        self.request(libc::PTRACE_GETREGSET, kind, (&raw mut vector).cast())?;
        bytes.truncate(vector.iov_len);
        Ok(bytes)
    }

    fn sequences(self) -> io::Result<Option<Sequences>> {
        let mut read = Sequences::default();
        let size = size_of::<Sequences>() as *mut c_void;
        match self.request(PTRACE_GET_RSEQ_CONFIGURATION, size, (&raw mut read).cast()) {
            // A kernel without them.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(None),
            result => result.map(|()| Some(read).filter(|read| read.address != 0)),
        }
    }

    /// ptrace(2) with arguments that are addresses of this function's caller, or numbers.
    fn request(self, request: libc::c_uint, address: *mut c_void, data: *mut c_void) -> io::Result<()> {
        // SAFETY: the callers give requests that read or write memory the address of a value of the request's type,
        // which lives until the call returns.
        let answer = unsafe { libc::ptrace(request, self.0.as_raw(), address, data) };
        Errno::result(answer)?;
        Ok(())
    }
}

/// The list of robust locks of a thread, and its length.
fn robust_list(tid: Pid) -> io::Result<[u64; 2]> {
    let (mut list, mut length) = (MaybeUninit::<u64>::uninit(), MaybeUninit::<u64>::uninit());
    // SAFETY: get_robust_list(2) writes an address and a length, which are kept as numbers.
    let answer = unsafe {
        libc::syscall(libc::SYS_get_robust_list, tid.as_raw(), list.as_mut_ptr(), length.as_mut_ptr())
    };
    Errno::result(answer)?;
    // SAFETY: the call succeeded, and has written both.
    Ok(unsafe { [list.assume_init(), length.assume_init()] })
}

thread_local! {
    /// The last status of threads that was reported while this thread waited for another one.
    static REPORTED: RefCell<HashMap<i32, i32>> = RefCell::default();
}

/// Waits until the kernel has something to report of a child or tracee of this thread, which stays to be reported. Returns its
/// id, and whether it has ended.
fn next_report() -> io::Result<(i32, bool)> {
    // WEXITED alone: stops are reported of tracees only.
    let flags = libc::WEXITED | libc::WNOWAIT | libc::__WALL | libc::__WNOTHREAD;
    let mut report = MaybeUninit::<libc::siginfo_t>::zeroed();
    loop {
        // SAFETY: waitid(2) writes the structure, which lives until the call returns.
        let answer = unsafe { libc::waitid(libc::P_ALL, 0, report.as_mut_ptr(), flags) };
        match Errno::result(answer) {
            Err(Errno::EINTR) => {}
            result => {
                result?;
                // SAFETY: zeros are a valid value, and the call has written the fields of a child.
                let (report, pid) = unsafe { (report.assume_init(), report.assume_init().si_pid()) };
                let ends = [libc::CLD_EXITED, libc::CLD_KILLED, libc::CLD_DUMPED];
                return Ok((pid, ends.contains(&report.si_code)));
            }
        }
    }
}

/// Whether the id is that of a process, not of a further thread of one.
fn is_process(pid: i32) -> bool {
    let status = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"));
    let group =
        |status: String| status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    status.ok().and_then(group).is_none_or(|group: i32| group == pid)
}

/// The status of a child or tracee.
fn waitpid(pid: i32) -> io::Result<i32> {
    let mut status = 0;
    loop {
        // SAFETY: waitpid(2) writes one integer, which lives until the call returns.
        let waited = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
        match Errno::result(waited) {
            Err(Errno::EINTR) => {}
            result => return Ok(result.map(|_| status)?),
        }
    }
}

/// Waits for the end of a process that was killed: a child, or one that this thread traces.
pub(crate) fn reap(pid: i32) {
    while matches!(Tracee(Pid::from_raw(pid)).wait(), Ok(stop) if !matches!(stop, Stop::Ended(_))) {}
}
