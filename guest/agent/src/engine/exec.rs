//! Runs one more process in a container.
//!
//! libcontainer could do this too, but would read and write the container's whole configuration and fork
//! three times. Here the zygote forks once, into the container's pid namespace and cgroup, and the child
//! joins the other namespaces, gives up its privileges, and executes its command. The steps have runc's
//! order.

use std::{
    convert::Infallible,
    fs::{self, File},
    io::{self, BufReader},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use libcontainer::{
    capabilities, config::PersonalityDomain, seccomp, syscall::Syscall, syscall::SyscallError,
    syscall::syscall::SyscallType,
};
use machinen_protocol::error::chain;
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sched::{CloneFlags, setns},
    sys::{
        prctl::{set_dumpable, set_keepcaps, set_no_new_privs},
        stat::{Mode, umask},
    },
    unistd::{
        ForkResult, Gid, Uid, chdir, chroot, dup2_stderr, dup2_stdin, dup2_stdout, fchdir, getcwd, setgroups,
        setresgid, setresuid, setsid,
    },
};
use oci_spec::runtime::{LinuxSeccomp, Process};

use super::{
    executor::{self, CommandError},
    inherited, log,
    report::{Refusal, Report, Reporter},
    request::ExecRequest,
    terminal,
};
use crate::{cgroup, console, stdio::ProcessEnds, sys};

/// A request, with the descriptors that came with it.
#[derive(Debug)]
pub(super) struct ExecCall<'a> {
    pub(super) request: &'a ExecRequest,
    pub(super) process: OwnedFd,
    pub(super) init: OwnedFd,
    pub(super) ends: ProcessEnds,
}

#[derive(Debug, thiserror::Error)]
enum ExecError {
    #[error("cannot join the container's namespaces: its init has ended")]
    Gone,
    #[error("cannot join the container's namespaces")]
    Join(#[source] Errno),
    #[error("cannot use cgroup {path}")]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("cannot fork into the container")]
    Fork(#[source] Errno),
    #[error("the process cannot be parsed")]
    Process(#[source] serde_json::Error),
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("the process's umask {umask:o} is invalid")]
    Umask { umask: u32 },
    #[error("the personality {domain} is unknown")]
    Personality { domain: String },
    #[error("chdir to cwd ({cwd:?}) set in config.json failed: {}", .errno.desc().to_lowercase())]
    Cwd { cwd: PathBuf, errno: Errno },
    #[error("cannot {what}")]
    Step { what: &'static str, source: Errno },
    #[error("cannot {what}")]
    Syscall { what: &'static str, source: SyscallError },
    #[error("cannot prepare the process")]
    Inherited(#[source] inherited::InheritedError),
    #[error("cannot open the process's standard streams")]
    Stdio(#[source] io::Error),
    #[error("cannot make the process's terminal")]
    Terminal(#[source] terminal::TerminalError),
    #[error("cannot install the container's seccomp filter")]
    Seccomp(#[source] seccomp::SeccompError),
    #[error(transparent)]
    Command(#[from] CommandError),
}

impl ExecError {
    /// The refusal to report, if the request caused the error.
    fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Command(err) => Some(err.refusal()),
            Self::Process(_) | Self::Umask { .. } | Self::Cwd { .. } => Some(Refusal::Spec),
            _ => None,
        }
    }
}

/// A step that the kernel refused.
fn step(what: &'static str) -> impl FnOnce(Errno) -> ExecError {
    move |source| ExecError::Step { what, source }
}

fn syscall(what: &'static str) -> impl FnOnce(SyscallError) -> ExecError {
    move |source| ExecError::Syscall { what, source }
}

/// Forks the process. Called in the zygote, whose own pid namespace is `pids`.
pub(super) fn spawn(exec: ExecCall<'_>, reporter: &Reporter, pids: &OwnedFd) {
    match fork(&exec, pids) {
        Ok(ForkResult::Parent { child }) => reporter.send(Report::Created { pid: child.as_raw() }),
        Ok(ForkResult::Child) => run(exec, reporter),
        Err(err) => reporter.send(Report::Failed { text: chain(&err) }),
    }
}

fn fork(exec: &ExecCall<'_>, pids: &OwnedFd) -> Result<ForkResult, ExecError> {
    let ExecCall { request, init, .. } = exec;
    let own_pids = request.namespaces & libc::CLONE_NEWPID != 0;
    let cgroup = open_cgroup(&request.cgroup)?;
    if own_pids {
        setns(init, CloneFlags::CLONE_NEWPID).map_err(join)?;
    }
    let forked = match sys::fork_sibling_into(cgroup.as_fd()) {
        // The container has enabled controllers in cgroups below its own, which then may hold no processes:
        // its init is in one of those cgroups, and the new process goes there too.
        Err(Errno::EBUSY | Errno::EOPNOTSUPP) => cgroup_of(request.init)
            .and_then(|path| open_cgroup(&path))
            .and_then(|cgroup| sys::fork_sibling_into(cgroup.as_fd()).map_err(ExecError::Fork)),
        forked => forked.map_err(ExecError::Fork),
    };
    if own_pids
        && !matches!(forked, Ok(ForkResult::Child))
        && let Err(err) = setns(pids, CloneFlags::CLONE_NEWPID)
    {
        // Otherwise every later fork would be in this container.
        console::fail(&format!("the engine's process cannot return to its pid namespace: {err}"));
    }
    forked
}

fn join(errno: Errno) -> ExecError {
    match errno {
        Errno::ESRCH => ExecError::Gone,
        errno => ExecError::Join(errno),
    }
}

fn open_cgroup(path: &Path) -> Result<File, ExecError> {
    File::open(path).map_err(|source| ExecError::Cgroup { path: path.to_owned(), source })
}

fn cgroup_of(pid: i32) -> Result<PathBuf, ExecError> {
    let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let text = fs::read_to_string(&path).map_err(|source| ExecError::Read { path, source })?;
    let below_root = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    Ok(Path::new(cgroup::ROOT).join(below_root))
}

fn run(exec: ExecCall<'_>, reporter: &Reporter) -> ! {
    log::install(reporter.clone());
    let Err(err) = become_process(exec);
    let text = chain(&err);
    if let Some(refusal) = err.refusal() {
        reporter.send(Report::Refused { refusal, text: text.clone() });
    }
    reporter.send(Report::Failed { text });
    sys::exit_now(1)
}

fn become_process(exec: ExecCall<'_>) -> Result<Infallible, ExecError> {
    let ExecCall { request, process, init, ends } = exec;
    let process: Process =
        serde_json::from_reader(BufReader::new(File::from(process))).map_err(ExecError::Process)?;
    let filter = request.seccomp.as_deref().map(read_filter).transpose()?;
    let kernel = SyscallType::default().create_syscall();
    limit(request, &process, &*kernel)?;
    enter(request, &init)?;
    setsid().map_err(step("make a session"))?;
    connect(request, ends)?;
    if let Some(domain) = &request.personality {
        kernel.personality(personality(domain)?).map_err(syscall("set the personality"))?;
    }
    let confined = process.no_new_privileges() == Some(true);
    if confined {
        set_no_new_privs().map_err(step("set no_new_privs"))?;
    }
    if let Some(mask) = process.user().umask() {
        umask(Mode::from_bits(mask).ok_or(ExecError::Umask { umask: mask })?);
    }
    // Try as root first: root may enter directories that the user may not. If root may not enter, the user
    // tries later.
    let cwd = process.cwd();
    let entered = chdir(cwd);
    if let Err(errno) = entered
        && errno != Errno::EPERM
        && errno != Errno::EACCES
    {
        return Err(ExecError::Cwd { cwd: cwd.clone(), errno });
    }
    become_user(&process, &*kernel)?;
    kernel.close_range(0).map_err(syscall("close other descriptors"))?;
    // Without no_new_privs, installing a filter needs privileges that are given up next. With it, the filter
    // is installed as late as possible.
    if !confined {
        install(filter.as_ref())?;
    }
    capabilities::reset_effective(&*kernel).map_err(syscall("reset capabilities"))?;
    if let Some(wanted) = process.capabilities() {
        capabilities::drop_privileges(wanted, &*kernel).map_err(syscall("drop capabilities"))?;
    }
    if entered.is_err() {
        chdir(cwd).map_err(|errno| ExecError::Cwd { cwd: cwd.clone(), errno })?;
    }
    // A directory outside the container's root has no path.
    match getcwd() {
        Ok(path) if path.is_absolute() => {}
        Ok(_) => return Err(ExecError::Cwd { cwd: cwd.clone(), errno: Errno::ENOENT }),
        Err(errno) => return Err(ExecError::Cwd { cwd: cwd.clone(), errno }),
    }
    if confined {
        install(filter.as_ref())?;
    }
    Ok(executor::execute(&process, request.path.as_deref())?)
}

fn read_filter(path: &Path) -> Result<LinuxSeccomp, ExecError> {
    let failed = |source| ExecError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    serde_json::from_reader(BufReader::new(file)).map_err(|err| failed(err.into()))
}

fn install(filter: Option<&LinuxSeccomp>) -> Result<(), ExecError> {
    match filter {
        None => Ok(()),
        Some(filter) => seccomp::initialize_seccomp(filter).map(drop).map_err(ExecError::Seccomp),
    }
}

/// Applies the settings that need the VM's privileges or its /proc.
fn limit(request: &ExecRequest, process: &Process, kernel: &dyn Syscall) -> Result<(), ExecError> {
    inherited::give_up().map_err(ExecError::Inherited)?;
    let score = match process.oom_score_adj() {
        Some(score) => score.to_string(),
        None => {
            let path = PathBuf::from(format!("/proc/{}/oom_score_adj", request.init));
            fs::read_to_string(&path).map_err(|source| ExecError::Read { path, source })?
        }
    };
    inherited::set_oom_score(score.trim()).map_err(ExecError::Inherited)?;
    for rlimit in process.rlimits().iter().flatten() {
        kernel.set_rlimit(rlimit).map_err(syscall("set a resource limit"))?;
    }
    // The container can see this process from now on, but must not inspect it.
    set_dumpable(false).map_err(step("protect the process"))
}

fn enter(request: &ExecRequest, init: &OwnedFd) -> Result<(), ExecError> {
    let namespaces = CloneFlags::from_bits_retain(request.namespaces & !libc::CLONE_NEWPID);
    // A container that shares the VM's mount namespace has only a root directory of its own.
    let root = if namespaces.contains(CloneFlags::CLONE_NEWNS) {
        None
    } else {
        let path = format!("/proc/{}/root", request.init);
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Some(open(path.as_str(), flags, Mode::empty()).map_err(join)?)
    };
    if !namespaces.is_empty() {
        setns(init, namespaces).map_err(join)?;
    }
    if let Some(root) = root {
        fchdir(root).and_then(|()| chroot(".")).map_err(step("change the root directory"))?;
    }
    if namespaces.contains(CloneFlags::CLONE_NEWUSER) {
        let (user, group) = (Uid::from_raw(0), Gid::from_raw(0));
        setresgid(group, group, group)
            .and_then(|()| setresuid(user, user, user))
            .map_err(step("become root of the user namespace"))?;
    }
    Ok(())
}

fn connect(request: &ExecRequest, ends: ProcessEnds) -> Result<(), ExecError> {
    match ends {
        ProcessEnds::Files([stdin, stdout, stderr]) => {
            dup2_stdin(stdin)
                .and_then(|()| dup2_stdout(stdout))
                .and_then(|()| dup2_stderr(stderr))
                .map_err(step("connect the standard streams"))?;
            executor::reopen_null().map_err(ExecError::Stdio)
        }
        ProcessEnds::Terminal(socket) => {
            terminal::make(socket.as_fd(), request.console.unwrap_or_default()).map_err(ExecError::Terminal)
        }
    }
}

fn personality(domain: &str) -> Result<PersonalityDomain, ExecError> {
    match domain {
        "LINUX" => Ok(PersonalityDomain::Linux),
        "LINUX32" => Ok(PersonalityDomain::Linux32),
        _ => Err(ExecError::Personality { domain: domain.to_owned() }),
    }
}

fn become_user(process: &Process, kernel: &dyn Syscall) -> Result<(), ExecError> {
    let groups: Vec<Gid> =
        process.user().additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
    if !groups.is_empty() {
        setgroups(&groups).map_err(step("set the supplementary groups"))?;
    }
    let (user, group) = (Uid::from_raw(process.user().uid()), Gid::from_raw(process.user().gid()));
    // Capabilities are dropped later, by their own rules.
    set_keepcaps(true)
        .and_then(|()| setresgid(group, group, group))
        .and_then(|()| setresuid(user, user, user))
        .map_err(step("become the process's user"))?;
    capabilities::reset_effective(kernel).map_err(syscall("keep capabilities"))?;
    set_keepcaps(false).map_err(step("become the process's user"))
}
