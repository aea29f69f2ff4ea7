//! Boots user space until the agent can dial the host: mounts, limits and the loopback interface.
//!
//! Every system call here delays the first container, so this does only what the channel and the first
//! container need.

mod isolate;
mod mounts;
mod sysctl;

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::OnceLock,
};

use nix::{
    errno::Errno,
    fcntl::{PosixFadviseAdvice, posix_fadvise},
    sys::{
        resource::{Resource, setrlimit},
        socket::{AddressFamily, SockFlag, SockType, socket},
    },
    unistd::{Pid, setsid},
};

use crate::{
    cgroup::CgroupError,
    console::{self, LastResort},
    disk::DiskSource,
    options::{ChannelKind, KernelArgs, Options, OptionsError},
    sys,
};

/// Limit on open files of the agent, which has pipes and streams of every process of the pod.
const AGENT_FILES: u64 = 1 << 20;

/// The machine that the agent runs on.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) channel: ChannelSource,
    pub(crate) disks: DiskSource,
    /// The clock and the random number generator belong to this machine, and not to a host.
    pub(crate) owns_kernel: bool,
    /// The agent waits on the wake port before it dials the host.
    pub(crate) waits: bool,
}

#[derive(Debug)]
pub(crate) enum ChannelSource {
    Vsock,
    /// The virtserialport of the VM.
    Port,
    /// Any byte stream, which a test passes instead of a port.
    Stream(OwnedFd),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error("cannot mount {fstype} on {target}")]
    Mount { fstype: &'static str, target: PathBuf, source: Errno },
    #[error("cannot read {path}")]
    Read { path: &'static str, source: io::Error },
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot create {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("cannot bring up the loopback interface")]
    Loopback(#[source] Errno),
    #[error("cannot raise the limit of open files")]
    Limit(#[source] Errno),
    #[error("cannot enter namespaces of its own")]
    Namespaces(#[source] Errno),
    #[error("cannot fork")]
    Fork(#[source] Errno),
    #[error("no cgroup v2 hierarchy is mounted on this host")]
    NoCgroup2,
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Options(#[from] OptionsError),
}

/// Boots the VM, or prepares the process of a test.
///
/// # Errors
/// Something that the agent needs is missing.
pub(crate) fn boot(options: Options) -> Result<Machine, BootError> {
    match options {
        Options::Machine => machine(),
        Options::Process { serial, disks } => {
            console::set_last_resort(LastResort::Exit);
            isolate::enter()?;
            finish()?;
            Ok(Machine {
                channel: ChannelSource::Stream(serial),
                disks: DiskSource::Directory(disks),
                owns_kernel: false,
                waits: false,
            })
        }
    }
}

fn machine() -> Result<Machine, BootError> {
    console::set_last_resort(LastResort::PowerOff);
    read_ahead();
    // Processes of containers get sessions of their own; a hang-up of the console must not reach them. This
    // fails only if the kernel has made init a session leader already.
    let _ = setsid();
    mounts::mount_all()?;
    let cmdline = fs::read_to_string("/proc/cmdline")
        .map_err(|source| BootError::Read { path: "/proc/cmdline", source })?;
    let args = KernelArgs::parse(&cmdline)?;
    if args.trace {
        console::enable_trace();
    }
    if args.power_off {
        console::end(0);
    }
    // The agent owns all containers: the OOM killer must never choose it.
    write("/proc/self/oom_score_adj", "-1000")?;
    sysctl::set_all()?;
    setrlimit(Resource::RLIMIT_NOFILE, AGENT_FILES, AGENT_FILES).map_err(BootError::Limit)?;
    finish()?;
    let channel = match args.channel {
        ChannelKind::Vsock => ChannelSource::Vsock,
        ChannelKind::Serial => ChannelSource::Port,
    };
    Ok(Machine {
        channel,
        disks: DiskSource::Scsi { of_template: OnceLock::new() },
        owns_kernel: true,
        waits: args.waits,
    })
}

/// Makes the kernel read the agent's whole file now, in a few large requests in the background. Page faults
/// would read it in a hundred small ones, each of which delays the boot.
fn read_ahead() {
    // /proc is not mounted yet, but the kernel starts init by its path.
    let Some(Ok(file)) = std::env::args_os().next().map(fs::File::open) else { return };
    // A failure only makes the boot slower.
    let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
}

/// The steps that a VM and a test's process share.
fn finish() -> Result<(), BootError> {
    mounts::prepare_cgroups()?;
    let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .map_err(BootError::Loopback)?;
    sys::loopback_up(any.as_fd()).map_err(BootError::Loopback)
}

fn write(path: impl Into<PathBuf>, text: &str) -> Result<(), BootError> {
    let path = path.into();
    fs::write(&path, text).map_err(|source| BootError::Write { path, source })
}

/// A pid in the format of cgroup files.
fn pid_text(pid: Pid) -> String {
    pid.as_raw().to_string()
}
