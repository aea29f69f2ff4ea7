//! Twins: processes that continue where another one stands.
//!
//! fork(2) copies the calling thread only. A twin has all threads of its original, each at the instruction where the original's
//! thread stands, and all of its memory, copy on write. So a program that has prepared itself, such as an emulator that has
//! translated code, need not do that again.
//!
//! ```text
//!   original       is stopped by SIGSTOP and never continued; a thread that was added for this is made to call clone(2)
//!   twin           descriptors are replaced; the jail of a twin closes; the other threads are made, each with the registers of
//!                  its original; all threads go on
//! ```
//! This is done from outside, by ptrace(2), so the program need not know. What a process shares with its twin after fork(2), such
//! as sockets, the counters of eventfds and the flags of open files, is replaced, or the two could disturb each other: a twin that
//! would share a descriptor of anything but /dev/null is not made.
//!
//! None of the original's own threads is changed for that. So if the process that makes a twin is killed, the original stands as
//! before, the half-made twin is killed by the kernel, and another process can make the next one.
//!
//! The original has no part in the life of a twin. A thread of this process traces the first thread of the twin for as long as the
//! twin lives: it learns how the twin ends, and the kernel kills the twin if this process ends first (PTRACE_O_EXITKILL).

mod confine;
mod descriptors;
mod keeper;
pub(super) mod memory;

use std::{
    ffi::CString,
    fs::File,
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
};

use nix::sys::ptrace::Options;

use self::{
    descriptors::Descriptors,
    memory::{Memory, Scratch},
};
use super::Jail;
use crate::{
    cgroup, fs,
    sys::{
        pidfd, priority,
        ptrace::{ThreadState, Tracee, reap},
    },
};

use keeper::Living;
pub(super) use keeper::living;

/// The description of a twin.
#[derive(Debug)]
pub struct Twin {
    /// Descriptors that the twin has instead of those of its original, with their numbers.
    pub replaced: Vec<(OwnedFd, Vec<i32>)>,
    /// The name under which the twin is listed (ps(1)), at most 15 bytes.
    pub name: CString,
    /// What the twin's arguments are listed with in place of a part of its original's.
    pub renamed: (String, String),
    /// What the twin may use and call, in addition to what its original may not. Of namespaces only that of pids can be of its
    /// own, files are those of the original, and of capabilities it keeps none or those of the original.
    pub jail: Jail,
    /// A file that is locked while the twin is made, so that two processes do not trace the original at once.
    pub turn: File,
}

/// A process that was stopped by SIGSTOP and is never continued, of which twins are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TwinOriginal {
    /// Its pid.
    pub pid: u32,
    /// The id of its thread that twins fork from, from [`add_forker`].
    pub forker: u32,
}

/// Flags of the threads that the C library makes (pthread_create(3)).
const THREAD: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;
/// Flags of the thread that twins fork from, which never runs.
const FORKER: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_CHILD_CLEARTID;
/// Flags of the twin's first thread. Its parent is that of the original, which need not know it.
const PROCESS: i32 =
    libc::CLONE_PARENT | libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID | libc::SIGCHLD;

/// What ptrace(2) has to report of a thread that is made to call the kernel.
const TRACED: Options =
    Options::PTRACE_O_TRACESYSGOOD.union(Options::PTRACE_O_TRACECLONE).union(Options::PTRACE_O_TRACEFORK);
/// What the forking thread executes: a call of the kernel (`syscall`), and then an instruction that ends the process (`ud2`), in
/// case that a twin is left alone before its registers are set.
const CALL: [u8; 4] = [0x0f, 0x05, 0x0f, 0x0b];
/// The size of a page of memory, bytes, and of what is mapped for [`CALL`].
const PAGE: u64 = 4096;

/// Whether this process may make twins: it is root of the host, and the kernel lets processes be traced and be given
/// descriptors.
pub fn twins_are_possible() -> bool {
    // Yama's mode in which nothing is traced (the kernel's admin-guide/LSM/Yama.rst).
    const NO_ATTACH: &str = "3";
    let yama = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let capable = rustix::thread::capabilities(None).is_ok_and(|sets| {
        use rustix::thread::CapabilitySet as Capability;
        sets.effective.contains(Capability::SYS_PTRACE | Capability::SYS_ADMIN | Capability::SYS_NICE)
    });
    crate::owner::user().is_none() && capable && yama.trim() != NO_ATTACH
}

/// Prepares a process for twins, which share its memory copy on write: what it has mapped of the file behind its descriptor
/// `number` becomes a private mapping of `file`, which has the same content, and `file` is behind `number`. It sees no processes of
/// the host any more (/proc), and neither do its twins.
///
/// # Errors
/// As for [`Twin::start`].
pub fn prepare_for_twins(pid: u32, file: &OwnedFd, number: i32) -> io::Result<()> {
    let original = Original::stop(pid, TRACED | Options::PTRACE_O_EXITKILL)?;
    let memory = Memory::of(original.pid)?;
    let scratch = Scratch::map(original.first, original.syscall, &memory)?;
    let call = |number, arguments| original.first.call(original.syscall, number, arguments);
    let [received] = descriptors::send(original.first, original.syscall, &scratch, &[file.as_raw_fd()])?[..]
    else {
        return Err(io::Error::other("a process has not received a descriptor"));
    };
    let kind = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
    for mapping in memory::mappings(original.pid, number)? {
        let (start, length) = (mapping.start, mapping.length);
        call(libc::SYS_mmap, [start, length, mapping.protection, kind as u64, received, mapping.offset])?;
        call(libc::SYS_madvise, [start, length, libc::MADV_DONTDUMP as u64, 0, 0, 0])?;
    }
    let same = memory::same_file(original.pid, number)?;
    for same in same.into_iter().filter(|number| *number as u64 != received) {
        call(libc::SYS_dup3, [received, same as u64, libc::O_CLOEXEC as u64, 0, 0, 0])?;
    }
    call(libc::SYS_close, [received, 0, 0, 0, 0, 0])?;
    let proc = scratch.put(b"/proc\0")?;
    match call(libc::SYS_umount2, [proc, libc::MNT_DETACH as u64, 0, 0, 0, 0]) {
        // It has none, or no more.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
        result => drop(result?),
    }
    scratch.unmap()
}

/// Gives a process, which was stopped by SIGSTOP and is never continued, the thread that its twins fork from.
///
/// # Errors
/// As for [`Twin::start`].
pub fn add_forker(pid: u32) -> io::Result<TwinOriginal> {
    let original = Original::stop(pid, TRACED | Options::PTRACE_O_EXITKILL)?;
    let call = |number, arguments| original.first.call(original.syscall, number, arguments);
    let (writable, executable) = (libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ | libc::PROT_EXEC);
    let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let code = call(libc::SYS_mmap, [0, PAGE, writable as u64, kind as u64, u64::MAX, 0])?;
    let memory = Memory::of(original.pid)?;
    memory.write(code, &CALL)?;
    call(libc::SYS_mprotect, [code, PAGE, executable as u64, 0, 0, 0])?;
    // Below what the calling convention leaves to functions that call no other (the System V ABI's red zone).
    let place = (original.states[0].interrupted.registers.rsp - PAGE) & !0xf;
    call(libc::SYS_prctl, [libc::PR_GET_TID_ADDRESS as u64, place, 0, 0, 0, 0])?;
    // Twins learn from it where the C library has the id of the first thread.
    let tid = memory.read_number(place)?;
    let arguments = [FORKER as u64, 0, 0, tid, 0, 0];
    let forker = original.first.call_for_thread(original.syscall, libc::SYS_clone, arguments)?;
    forker.go_to(code)?;
    // It stops with all others before it executes anything.
    forker.detach()?;
    Ok(TwinOriginal { pid, forker: forker.pid().cast_unsigned() })
}

/// The threads of the original, which stand while this exists. The first is the one that the process began with.
struct Original {
    pid: i32,
    first: Tracee,
    others: Vec<Tracee>,
    states: Vec<ThreadState>,
    /// An instruction `syscall`, in every process at another address (vdso(7)).
    syscall: u64,
}

/// A twin whose threads do not run yet. It is killed when it is dropped before that.
struct Unborn {
    first: Tracee,
    others: Vec<Tracee>,
    syscall: u64,
    armed: bool,
}

impl Twin {
    /// Makes the twin of the process `original`, and lets it run. To be called on the thread that keeps it.
    fn make(&self, original: TwinOriginal) -> io::Result<(Tracee, Living)> {
        fs::lock(&self.turn)?;
        let made = self.make_alone(original);
        self.turn.unlock()?;
        made
    }

    fn make_alone(&self, TwinOriginal { pid, forker }: TwinOriginal) -> io::Result<(Tracee, Living)> {
        // If this process is killed, the original is only let go.
        let original = Original::stop(pid, TRACED)?;
        let descriptors = Descriptors::read(original.pid)?;
        let (mut twin, tid) = original.fork(forker.cast_signed(), self.jail.namespaces.pid)?;
        // Before its cgroups are chosen: see `follow`.
        let living = Living::add(twin.first.pid());
        let memory = Memory::of(twin.first.pid())?;
        let scratch = Scratch::map(twin.first, twin.syscall, &memory)?;
        follow(twin.first.pid().cast_unsigned())?;
        descriptors.replace(&twin, &scratch, &self.replaced)?;
        memory.rename_arguments(twin.first.pid(), &self.renamed)?;
        confine::confine(twin.first, twin.syscall, &scratch, &self.name, &self.jail)?;
        twin.make_threads(&original, forker.cast_signed(), tid)?;
        scratch.unmap()?;
        twin.first.register(twin.syscall, &original.states[0])?;
        twin.first.set_state(&original.states[0])?;
        drop(original);
        Ok((twin.run()?, living))
    }
}

/// Gives a twin the cgroups and the priority that a child of this process has.
fn follow(twin: u32) -> io::Result<()> {
    let of = |pid: u32| cgroup::of_process(pid).map_err(io::Error::other);
    let mut groups = of(std::process::id())?;
    loop {
        // The kernel lets no process fork while one is moved, so none is moved in vain.
        let there = of(twin)?;
        let others: Vec<_> = groups.iter().filter(|group| !there.contains(group)).cloned().collect();
        cgroup::enter(&others, twin).map_err(io::Error::other)?;
        let now = of(std::process::id())?;
        // This process may have been moved meanwhile, with all of its twins that were known.
        if now == groups {
            break;
        }
        groups = now;
    }
    priority::set(twin, priority::own()?)
}

impl Original {
    fn stop(pid: u32, options: Options) -> io::Result<Self> {
        let pid = pid.cast_signed();
        let syscall = memory::syscall(pid)?;
        let first = Tracee::seize(pid, options)?;
        // From here on the threads are let go whatever fails.
        let mut original = Self { pid, first, others: Vec::new(), states: Vec::new(), syscall };
        original.states.push(first.state()?);
        // Threads that stand make no new ones, so that the list is complete when it has no thread that runs.
        while original.stop_others(options)? {}
        Ok(original)
    }

    /// Stops the threads that run yet; whether there were any.
    fn stop_others(&mut self, options: Options) -> io::Result<bool> {
        let known = self.others.len();
        for entry in std::fs::read_dir(format!("/proc/{}/task", self.pid))? {
            let tid = entry?.file_name().to_str().and_then(|name| name.parse().ok()).unwrap_or(self.pid);
            if tid == self.pid || self.others.iter().any(|thread| thread.pid() == tid) {
                continue;
            }
            let thread = match Tracee::seize(tid, options) {
                // It has ended meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => continue,
                thread => thread?,
            };
            self.others.push(thread);
            self.states.push(thread.state()?);
        }
        Ok(self.others.len() > known)
    }

    /// Has the thread `forker` fork. Returns the twin, and how far behind its area in memory the C library has the id of a
    /// thread.
    fn fork(&self, forker: i32, new_pids: bool) -> io::Result<(Unborn, u64)> {
        let missing = || io::Error::other("the thread that twins fork from has gone");
        let number = self.others.iter().position(|thread| thread.pid() == forker).ok_or_else(missing)?;
        let (forker, state) = (self.others[number], &self.states[number + 1]);
        // Wherever in CALL it was left.
        let syscall = state.interrupted.registers.rip & !(PAGE - 1);
        let first = &self.states[0].interrupted.registers;
        let place = (first.rsp - PAGE) & !0xf;
        forker.call(syscall, libc::SYS_prctl, [libc::PR_GET_TID_ADDRESS as u64, place, 0, 0, 0, 0])?;
        let tid = Memory::of(self.pid)?.read_number(place)?;
        let flags = PROCESS | if new_pids { libc::CLONE_NEWPID } else { 0 };
        let made = forker.call_for_thread(syscall, libc::SYS_clone, [flags as u64, 0, 0, tid, 0, 0])?;
        let twin = Unborn { first: made, others: Vec::new(), syscall, armed: true };
        made.set_options(TRACED | Options::PTRACE_O_EXITKILL)?;
        Ok((twin, tid.wrapping_sub(first.fs_base)))
    }
}

impl Drop for Original {
    /// Lets the original go on as if nothing had happened.
    fn drop(&mut self) {
        let threads = std::iter::once(self.first).chain(self.others.iter().copied());
        for (number, thread) in threads.enumerate() {
            // The last one may have none, if it could not be read.
            let restored = self.states.get(number).map_or(Ok(()), |state| thread.set_state(state));
            let released = restored.and(thread.detach());
            if let Err(error) = released {
                tracing::debug!(pid = self.pid, "cannot let a process go on: {error}");
            }
        }
    }
}

impl Unborn {
    fn make_threads(&mut self, original: &Original, forker: i32, tid: u64) -> io::Result<()> {
        for (thread, state) in original.others.iter().zip(&original.states[1..]) {
            if thread.pid() == forker {
                continue;
            }
            let registers = &state.interrupted.registers;
            let own = registers.fs_base.wrapping_add(tid);
            let arguments = [THREAD as u64, registers.rsp, own, own, registers.fs_base, 0];
            let thread = self.first.call_for_thread(self.syscall, libc::SYS_clone, arguments)?;
            self.others.push(thread);
            thread.register(self.syscall, state)?;
            thread.set_state(state)?;
        }
        Ok(())
    }

    /// Lets all threads run; only the first is traced further.
    fn run(mut self) -> io::Result<Tracee> {
        for thread in &self.others {
            thread.detach()?;
        }
        self.first.set_options(Options::PTRACE_O_EXITKILL)?;
        self.first.resume(libc::PTRACE_CONT, 0)?;
        self.armed = false;
        Ok(self.first)
    }
}

impl Drop for Unborn {
    fn drop(&mut self) {
        if self.armed {
            let pid = self.first.pid();
            let killed = pidfd::open(pid.cast_unsigned())
                .and_then(|pidfd| pidfd::send_signal(pidfd.as_fd(), nix::sys::signal::Signal::SIGKILL));
            match killed {
                Ok(()) => reap(pid),
                Err(error) => tracing::warn!(pid, "cannot kill a process that was not completed: {error}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};

    use super::*;
    use nix::sys::signal::Signal;

    use crate::process::{ProcessExit, RunAs, Spawn, Stdio, SystemCalls};

    const PROGRAM: &str = r#"
import os, sys, threading
lock = threading.Lock(); lock.acquire()
count = 0
def work():
    global count
    while True:
        lock.acquire(); count += 1
        os.write(1, b"thread %d of %d, user %d, %.1f\n" % (count, threading.active_count(), os.getuid(), 0.5 + count))
for i in range(2): threading.Thread(target=work, daemon=True).start()
os.write(1, b"ready\n")
for line in sys.stdin:
    if line == "exit\n": os._exit(7)
    lock.release()
"#;

    fn until_state(pid: u32, state: char) {
        let is = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.rsplit_once(") ").unwrap().1.starts_with(state) || stat.contains(") t ")
        };
        while !is() {
            std::thread::yield_now();
        }
    }

    #[tokio::test]
    async fn a_twin_has_all_threads() {
        let (stdin, to_original) = io::pipe().unwrap();
        let (from_original, stdout) = io::pipe().unwrap();
        let process = Spawn::new("python3")
            .args(["-c", PROGRAM])
            .stdin(Stdio::Fd(stdin.into()))
            .stdout(Stdio::Fd(stdout.into()))
            .stderr(Stdio::Inherit)
            .start()
            .unwrap();
        let mut line = String::new();
        BufReader::new(from_original).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        process.stop().unwrap();
        let original = add_forker(process.pid()).unwrap();
        for round in 0..20 {
            abandon(original, round);
            let (stdin, mut to_twin) = io::pipe().unwrap();
            let (from_twin, stdout) = io::pipe().unwrap();
            let mut from_twin = BufReader::new(from_twin);
            let identity = RunAs { uid: 0x7000_0001, gid: 0x7000_0001, groups: vec![] };
            let jail = Jail {
                no_new_privileges: true,
                identity: Some(identity),
                namespaces: crate::process::Namespaces { pid: true, ..Default::default() },
                system_calls: Some(SystemCalls::basic().and_threads()),
                no_core: true,
                ..Jail::default()
            };
            let stderr = File::options().write(true).open("/dev/null").unwrap();
            let twin = Twin {
                replaced: vec![(stdin.into(), vec![0]), (stdout.into(), vec![1]), (stderr.into(), vec![2])],
                name: c"twin".to_owned(),
                renamed: ("threading".to_owned(), "in a twin".to_owned()),
                jail,
                turn: tempfile::tempfile().unwrap(),
            };
            let begun = std::time::Instant::now();
            let twin = twin.start(original).await.unwrap();
            eprintln!("round {round}: {:?}", begun.elapsed());
            for count in 1..4 {
                to_twin.write_all(b"go\n").unwrap();
                let mut line = String::new();
                from_twin.read_line(&mut line).unwrap();
                assert_eq!(line, format!("thread {count} of 3, user 1879048193, {count}.5\n"));
            }
            let arguments = std::fs::read_to_string(format!("/proc/{}/cmdline", twin.pid())).unwrap();
            assert!(arguments.contains("in a twin.Lock()"), "{arguments}");
            // It stands and goes on as any process.
            twin.signal(Signal::SIGSTOP).unwrap();
            to_twin.write_all(b"go\n").unwrap();
            until_state(twin.pid(), 'T');
            twin.signal(Signal::SIGCONT).unwrap();
            let mut line = String::new();
            from_twin.read_line(&mut line).unwrap();
            assert_eq!(line, "thread 4 of 3, user 1879048193, 4.5\n");
            to_twin.write_all(b"exit\n").unwrap();
            assert_eq!(twin.exited().await, ProcessExit::Code(7));
        }
        drop(to_original);
    }

    /// Begins to make a twin, and ends the tracing thread as if its process was killed: at first or when there is a twin. Or the twin
    /// is killed when it has all of its threads.
    fn abandon(original: TwinOriginal, round: usize) {
        let begin = move || {
            let stopped = Original::stop(original.pid, TRACED).unwrap();
            if round % 3 == 2 {
                let forker = original.forker.cast_signed();
                let (mut twin, tid) = stopped.fork(forker, true).unwrap();
                twin.make_threads(&stopped, forker, tid).unwrap();
                let pidfd = pidfd::open(twin.first.pid().cast_unsigned()).unwrap();
                pidfd::send_signal(pidfd.as_fd(), Signal::SIGKILL).unwrap();
                assert!(twin.first.call(twin.syscall, libc::SYS_getpid, [0; 6]).is_err());
                return None;
            }
            let pid = (round % 3 == 1).then(|| {
                let (twin, _) = stopped.fork(original.forker.cast_signed(), true).unwrap();
                let pid = twin.first.pid();
                std::mem::forget(twin);
                pid
            });
            std::mem::forget(stopped);
            pid
        };
        let twin = std::thread::spawn(begin).join().unwrap();
        if let Some(pid) = twin {
            // It is a child of this process, as the original is.
            reap(pid);
        }
        until_state(original.pid, 'T');
    }
}
