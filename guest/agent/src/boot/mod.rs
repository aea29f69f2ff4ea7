//! From exec to a machine that can dial the host: mounts, limits and the loopback interface.
//!
//! Every system call here delays the first container, so only what the channel and the first container need is
//! done, and nothing twice.

mod isolate;
mod mounts;

use std::{fs, io, os::fd::OwnedFd, path::PathBuf};

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

/// Open files of the agent itself: pipes and streams of every process of the pod.
const AGENT_FILES: u64 = 1 << 20;

/// What the agent runs on, once booted.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) channel: ChannelSource,
    pub(crate) disks: DiskSource,
    /// The clock and the random number generator are this machine's own, not somebody else's.
    pub(crate) owns_kernel: bool,
    /// The agent is to wait on the wake port before it dials the host.
    pub(crate) waits: bool,
}

#[derive(Debug)]
pub(crate) enum ChannelSource {
    Vsock,
    /// The virtserialport of the VM.
    Port,
    /// Any byte stream: what a test gives instead of a port.
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

/// # Errors
/// What the agent cannot do without is missing.
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
    // Processes of containers get sessions of their own; a hang-up of the console must not reach them.
    // It fails only where the kernel has made init a session leader already.
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
    // The agent owns all containers: memory pressure of one must never end it.
    write("/proc/self/oom_score_adj", "-1000")?;
    // The kernel's messages are of the VM: a container reads them if it may on a host that keeps them from its users.
    write("/proc/sys/kernel/dmesg_restrict", "1")?;
    setrlimit(Resource::RLIMIT_NOFILE, AGENT_FILES, AGENT_FILES).map_err(BootError::Limit)?;
    finish()?;
    let channel = match args.channel {
        ChannelKind::Vsock => ChannelSource::Vsock,
        ChannelKind::Serial => ChannelSource::Port,
    };
    Ok(Machine { channel, disks: DiskSource::Scsi, owns_kernel: true, waits: args.waits })
}

/// Has the kernel read all of the agent now, in a few large requests while it boots on: page faults would ask for
/// it in a hundred small ones, each of them in somebody's way.
fn read_ahead() {
    // /proc is not mounted yet, and the kernel starts init by its path.
    let Some(Ok(file)) = std::env::args_os().next().map(fs::File::open) else { return };
    // Only a matter of speed.
    let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
}

/// The steps that a VM and a test's process have in common.
fn finish() -> Result<(), BootError> {
    mounts::prepare_cgroups()?;
    let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .map_err(BootError::Loopback)?;
    use std::os::fd::AsFd;
    sys::loopback_up(any.as_fd()).map_err(BootError::Loopback)
}

fn write(path: impl Into<PathBuf>, text: &str) -> Result<(), BootError> {
    let path = path.into();
    fs::write(&path, text).map_err(|source| BootError::Write { path, source })
}

/// The text of a pid, as cgroup files want it.
fn pid_text(pid: Pid) -> String {
    pid.as_raw().to_string()
}
