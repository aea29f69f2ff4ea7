//! Checkpoint and restore: CRIU dumps a container's processes into files, and makes processes of them again.
//!
//! ```text
//!   dump      frozen processes ── criu swrk ──> images on a disk of the host's ── where they are on it ──> host
//!   restore   images on a disk ── criu swrk ──> processes that have not run yet ── start ──> they run
//! ```
//! CRIU is spoken to over its RPC socket (`rpc`), one process for each dump or restore. The host reads the images from the
//! disk itself, by the extents that it is told: no byte of them is sent.

mod check;
mod cpu;
mod dump;
mod extents;
mod lazy;
mod locks;
mod mend;
mod mounted;
mod mounts;
mod network;
mod oom;
mod pagemap;
mod reason;
mod restore;
mod rpc;
mod source;
mod task;
mod tmpfs;
mod uts;
mod yard;

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

pub(crate) use self::{
    dump::{Dumped, dump, pre_dump},
    mounts::make_mount_points,
    restore::{Fetching, HeldByCriu, RestoreTarget, Restored, clear, restore},
    rpc::warm_up,
    source::DumpSource,
    task::Task,
    tmpfs::run_as_tar,
};
use crate::{
    cgroup::{self, Cgroup, CgroupError},
    disk::DiskError,
};

/// Image with what the first process has not read of its stdin; none where that is nothing. Not one of CRIU's.
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
    #[error("{died}; one of the container's processes was running its code, so the container has ended")]
    Corrupted { died: Box<CriuError> },
    #[error("criu cannot {what} it{log}")]
    Failed { what: &'static str, log: String },
    #[error("{task} {why}: that cannot be restored")]
    Unrestorable { task: Task, why: String },
    #[error("cannot read the container's limits")]
    Limits(#[from] CgroupError),
    #[error("cannot find out what the container's processes have mounted or open")]
    Inspect(#[source] procfs::ProcError),
    #[error("the checkpoint was taken with CPU features that this VM lacks: {missing}")]
    Cpu { missing: String },
    #[error("the checkpoint was taken on kernel {theirs}, which is newer than this VM's {ours}")]
    Kernel { theirs: String, ours: String },
    #[error("the checkpoint has a file mounted at {destination}, for which the configuration has none")]
    NoFile { destination: String },
    #[error("cannot make the mount point {path}")]
    MountPoint { path: PathBuf, source: Box<pathrs::error::Error> },
    #[error("the page at {address:#x} is in neither of two dumps")]
    Missing { address: u64 },
    #[error("the image {name} has too many pieces")]
    Pieces { name: String },
    #[error("the container's memory cannot be fetched: criu {how}{log}")]
    Pages { how: String, log: String },
    #[error("cannot copy what waits in the container's stdin")]
    Stdin(#[source] io::Error),
    #[error("criu has not sent the terminal's master")]
    NoMaster,
    #[error("criu has not said which process it has restored")]
    NoPid,
    #[error("cannot take CRIU's lock off the container's connections")]
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
            | Self::Died { .. }
            | Self::Corrupted { .. }
            | Self::Pages { .. }
            | Self::Cpu { .. }
            | Self::Kernel { .. }
            | Self::NoFile { .. } => ErrorKind::FailedPrecondition,
            Self::Hostname { .. } => ErrorKind::InvalidArgument,
            Self::Limits(err) => err.kind(),
            Self::Disk(_) | Self::Mount { .. } => ErrorKind::NotFound,
            _ => ErrorKind::Internal,
        }
    }
}

/// What CRIU is to take for the root of the container's cgroups.
fn cgroup_root(cgroup: &Cgroup) -> Cgroup_root {
    let path = cgroup.path();
    let path = path.strip_prefix(cgroup::ROOT).map_or(path.to_owned(), |below| Path::new("/").join(below));
    let mut root = Cgroup_root::new();
    // The one hierarchy of cgroup v2.
    root.set_ctrl(String::new());
    root.set_path(path.display().to_string());
    root
}

/// What a dump and a restore are told alike. CRIU finds the directory of the images, while it starts, by this process's
/// descriptor.
fn options(images: &File, rootfs: &Path, options: &CriuOptions) -> Criu_opts {
    /// CRIU's "info": what it does, without what it reads.
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
