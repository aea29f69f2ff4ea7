//! Filters of system calls (seccomp(2)).

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// The system calls that a program may make. Any other one kills it, with SIGSYS.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SystemCalls {
    /// Calls, each with the arguments that it may have; without a list, it may have any.
    allowed: BTreeMap<i64, Vec<Argument>>,
    /// Calls that fail as if the kernel did not have them.
    missing: Vec<i64>,
    /// The requests of ioctl(2), where others than these fail as if no device had them.
    requests: Option<Vec<u32>>,
}

/// A condition on an argument of a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Argument {
    number: u8,
    mask: u64,
    value: u64,
}

/// What the C library, the dynamic linker and the standard libraries of C and Rust call in any program: memory, threads'
/// locks, signals and their own files, and the way to an abnormal end.
const BASIC: [i64; 79] = [
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_brk,
    libc::SYS_chdir,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_execve,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_futex,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getgroups,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_getrlimit,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_kill,
    libc::SYS_lseek,
    libc::SYS_lstat,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_pipe2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_prlimit64,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_sigaltstack,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_sysinfo,
    libc::SYS_tgkill,
    libc::SYS_time,
    libc::SYS_umask,
    libc::SYS_uname,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Calls that no list may have.
const FORBIDDEN: [i64; 30] = [
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_clone3,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_fork,
    libc::SYS_fsopen,
    libc::SYS_init_module,
    libc::SYS_io_uring_setup,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_request_key,
    libc::SYS_setns,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
    libc::SYS_vfork,
];

impl SystemCalls {
    /// The calls that every program needs.
    pub fn basic() -> Self {
        Self::default().and(&BASIC)
    }

    /// Also allows these calls, with any arguments.
    pub fn and(mut self, calls: &[i64]) -> Self {
        self.allowed.extend(calls.iter().map(|call| (*call, Vec::new())));
        self
    }

    /// Also allows `call` where the bits `mask` of the argument `number`, counted from 0, are `value`.
    pub fn and_with_argument(mut self, call: i64, number: u8, mask: u64, value: u64) -> Self {
        self.allowed.entry(call).or_default().push(Argument { number, mask, value });
        self
    }

    /// Also allows threads. There are no new processes: the call that could make both has its flags in memory, where a
    /// filter cannot read them, and is answered as by an older kernel, on which the C library uses clone(2).
    pub fn and_threads(self) -> Self {
        let thread = libc::CLONE_THREAD as u64;
        self.and_with_argument(libc::SYS_clone, 0, thread, thread).and_missing(&[libc::SYS_clone3])
    }

    /// These calls fail with ENOSYS: the program tries them, and does without them.
    pub fn and_missing(self, calls: &[i64]) -> Self {
        let mut all = self.and(calls);
        all.missing.extend(calls);
        all
    }

    /// Also allows ioctl(2) with these requests; with others it fails with ENOTTY.
    pub fn and_requests(self, requests: &[u32]) -> Self {
        Self { requests: Some(requests.to_vec()), ..self.and(&[libc::SYS_ioctl]) }
    }

    /// Whether the program may make this call with some arguments.
    pub fn allows(&self, call: i64) -> bool {
        self.allowed.contains_key(&call) && !self.missing.contains(&call)
    }

    /// Whether any call is allowed that changes what the program sees, or reaches other processes or rarely used parts of
    /// the kernel. For the tests of lists.
    pub fn forbidden(&self) -> Option<i64> {
        FORBIDDEN.into_iter().find(|call| self.allows(*call))
    }

    /// The filters, of which the strictest verdict counts. The last one must be applied last, since it may forbid to
    /// apply more.
    pub(super) fn programs(&self) -> Vec<BpfProgram> {
        let mut programs = Vec::new();
        if !self.missing.is_empty() {
            let calls = self.missing.iter().map(|call| (*call, Vec::new())).collect();
            let enosys = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
            programs.push(program(calls, SeccompAction::Allow, enosys));
        }
        if let Some(requests) = &self.requests {
            let other = |request: &u32| condition(1, SeccompCmpOp::Ne, u64::from(*request));
            let calls = vec![rule(requests.iter().map(other).collect())];
            let enotty = SeccompAction::Errno(libc::ENOTTY.cast_unsigned());
            programs.push(program([(libc::SYS_ioctl, calls)].into(), SeccompAction::Allow, enotty));
        }
        let allowed = self.allowed.iter().map(|(call, arguments)| {
            let one = |argument: &Argument| {
                let op = SeccompCmpOp::MaskedEq(argument.mask);
                rule(vec![condition(argument.number, op, argument.value)])
            };
            (*call, arguments.iter().map(one).collect())
        });
        programs.push(program(allowed.collect(), SeccompAction::KillProcess, SeccompAction::Allow));
        programs
    }
}

/// A filter that makes fallocate(2) with FALLOC_FL_PUNCH_HOLE a success without effect for one descriptor.
pub(super) fn no_holes(fd: i32) -> BpfProgram {
    let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64;
    let holes = rule(vec![
        condition(0, SeccompCmpOp::Eq, u64::from(fd.cast_unsigned())),
        condition(1, SeccompCmpOp::Eq, punch),
    ]);
    let calls = [(libc::SYS_fallocate, vec![holes])].into();
    program(calls, SeccompAction::Allow, SeccompAction::Errno(0))
}

fn condition(argument: u8, op: SeccompCmpOp, value: u64) -> SeccompCondition {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value);
    condition.expect("a system call has six arguments")
}

fn rule(conditions: Vec<SeccompCondition>) -> SeccompRule {
    SeccompRule::new(conditions).expect("a rule has a condition")
}

fn program(
    calls: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    verdict: SeccompAction,
) -> BpfProgram {
    let filter = SeccompFilter::new(calls, otherwise, verdict, TargetArch::x86_64);
    filter.and_then(TryInto::try_into).expect("constant rules for a supported architecture")
}
