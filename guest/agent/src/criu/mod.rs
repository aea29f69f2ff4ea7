//! Checkpoint and restore: CRIU dumps a container's processes into files, and restores processes from them.
//!
//! ```text
//!   dump      frozen processes ── criu swrk ──> images on a disk of the host's ── their extents ──> host
//!   restore   images on a disk ── criu swrk ──> processes that wait ── start ──> they run
//! ```
//! Each dump and each restore runs one CRIU process, which is controlled over its RPC socket (`rpc`). The
//! host reads the images directly from the disk, at the extents that the agent reports: no byte of them is
//! sent.

mod bound;
mod check;
mod cpu;
mod dump;
mod duplicate;
mod extents;
mod files;
mod image;
mod image_mount;
mod lazy;
mod locks;
mod mounts;
mod network;
mod oom;
mod pagemap;
mod reason;
mod recover;
mod restore;
mod rpc;
mod sockets;
mod task;
mod terminals;
mod tmp_dirs;
mod tmpfs;
mod uts;
mod volumes;
mod watches;

use std::{
    fs::File,
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use machinen_protocol::{
    api::CriuOptions,
    error::{ErrorKind, HasKind},
};
use nix::errno::Errno;
use rust_criu::rust_criu_protobuf::rpc::{Cgroup_root, Criu_cg_mode, Criu_network_lock_method, Criu_opts};

use self::bound::UnboundSockets;
pub(crate) use self::{
    dump::{DumpSource, Dumped, dump, pre_dump},
    duplicate::run_as_duplicate,
    mounts::{SECRETS_DIR, make_mount_points, make_points_in_volumes},
    restore::{Fetching, HeldByCriu, RestoreTarget, Restored, clear, restore},
    rpc::warm_up,
    task::Task,
    tmpfs::run_as_tar,
};
use crate::{
    cgroup::{self, Cgroup, CgroupError},
    disk::DiskError,
    layer::PackError,
};

/// Image with the unread bytes of the first process's stdin; missing when there are none. CRIU does not know
/// it.
const STDIN: &str = "machinen-stdin";

#[derive(Debug, thiserror::Error)]
pub(crate) enum CriuError {
    #[error("a thread failed")]
    Thread(#[source] tokio::task::JoinError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("cannot {what} {path}")]
    File { what: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot mount the checkpoint's disk {device}")]
    Mount { device: PathBuf, source: Errno },
    #[error("cannot run criu")]
    Run(#[source] io::Error),
    #[error("cannot talk to criu")]
    Talk(#[source] io::Error),
    #[error("criu {how}{log}")]
    Died { how: String, log: String },
    #[error("{died}; it has corrupted one of the container's processes, so the container was killed")]
    Corrupted { died: Box<CriuError> },
    #[error("criu cannot {what} it{log}")]
    Failed { what: &'static str, log: String },
    #[error("{task} {why}: that cannot be restored")]
    Unrestorable { task: Task, why: String },
    #[error(
        "a process watches a file of a volume (inotify, fanotify) that has no known name: that cannot be restored"
    )]
    NamelessWatch,
    #[error("cannot save what the container has written to a copy of a directory")]
    Copy(#[from] PackError),
    #[error("cannot examine the UNIX sockets of {task}")]
    Sockets { task: Task, source: io::Error },
    #[error("criu has not saved the UNIX socket {name}")]
    NoSocket { name: PathBuf },
    #[error("the container has frozen its cgroup {path}, whose memory is copied in the dump only")]
    FrozenBelow { path: PathBuf },
    #[error("cannot read the container's limits")]
    Limits(#[from] CgroupError),
    #[error("cannot examine the mounts and open files of the container's processes")]
    Inspect(#[source] procfs::ProcError),
    #[error(
        "the checkpoint was taken with CPU features that this VM lacks: {missing} (hosts that exchange checkpoints need the same vm.cpu)"
    )]
    Cpu { missing: String },
    #[error("the checkpoint was taken on kernel {theirs}, which is newer than this VM's {ours}")]
    Kernel { theirs: String, ours: String },
    #[error("the checkpoint has a file mounted at {destination}, for which the configuration has none")]
    NoFile { destination: String },
    #[error(
        "the checkpoint mounts {path:?} of the VM at {destination:?}, which belongs to no container: only devices, \
         and files and volumes of the container's own configuration are mounted"
    )]
    ForeignMount { destination: String, path: String },
    #[error("cannot make the mount point {path}")]
    MountPoint { path: PathBuf, source: Box<pathrs::error::Error> },
    #[error("the page at {address:#x} is in neither of the two dumps")]
    Missing { address: u64 },
    #[error("the image {name} has too many pieces")]
    Pieces { name: String },
    #[error("the container's memory cannot be fetched: criu {how}{log}")]
    Pages { how: String, log: String },
    #[error("cannot copy the unread bytes of the container's stdin")]
    Stdin(#[source] io::Error),
    #[error("criu has not sent the terminal's master")]
    NoMaster,
    #[error("criu has not reported which process it has restored")]
    NoPid,
    #[error("the checkpoint has sockets that are bound to {0}")]
    Unbound(UnboundSockets),
    #[error("cannot examine the container's network")]
    Network(#[from] machinen_netlink::NetlinkError),
    #[error("cannot remove CRIU's lock on the container's connections")]
    Unlock(#[source] Errno),
    #[error("cannot examine the UTS namespace of the restored processes")]
    Namespace(#[source] io::Error),
    #[error("cannot set the hostname {name:?} of the restored processes")]
    Hostname { name: String, source: Errno },
}

impl HasKind for CriuError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Failed { .. }
            | Self::Unrestorable { .. }
            | Self::NamelessWatch
            | Self::Died { .. }
            | Self::Corrupted { .. }
            | Self::Pages { .. }
            | Self::Cpu { .. }
            | Self::Kernel { .. }
            | Self::NoFile { .. }
            | Self::Unbound(_)
            | Self::ForeignMount { .. } => ErrorKind::FailedPrecondition,
            Self::Hostname { .. } => ErrorKind::InvalidArgument,
            Self::Limits(err) => err.kind(),
            Self::Disk(_) | Self::Mount { .. } => ErrorKind::NotFound,
            _ => ErrorKind::Internal,
        }
    }
}

/// The root of the container's cgroups, for CRIU.
fn cgroup_root(cgroup: &Cgroup) -> Cgroup_root {
    let path = cgroup.path();
    let path = path.strip_prefix(cgroup::ROOT).map_or(path.to_owned(), |below| Path::new("/").join(below));
    let mut root = Cgroup_root::new();
    // The one hierarchy of cgroup v2.
    root.set_ctrl(String::new());
    root.set_path(path.display().to_string());
    root
}

/// The options that dumps and restores share. CRIU finds the images' directory by this process's descriptor
/// while it starts.
fn options(images: &File, rootfs: &Path, options: &CriuOptions) -> Criu_opts {
    /// CRIU's level "info": what it does, but not what it reads.
    const LOG_LEVEL: i32 = 3;
    let mut opts = Criu_opts::new();
    opts.set_images_dir_fd(images.as_raw_fd());
    opts.set_root(rootfs.display().to_string());
    opts.set_log_level(LOG_LEVEL);
    opts.set_notify_scripts(true);
    opts.set_orphan_pts_master(true);
    opts.set_manage_cgroups_mode(Criu_cg_mode::SOFT);
    opts.set_manage_cgroups(true);
    opts.set_network_lock(Criu_network_lock_method::NFTABLES);
    opts.set_tcp_established(options.tcp_established);
    opts.set_tcp_close(options.tcp_close);
    opts.set_ext_unix_sk(options.ext_unix_sk);
    opts.set_shell_job(options.shell_job);
    opts.set_file_locks(options.file_locks);
    opts
}
