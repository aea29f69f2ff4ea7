//! Dumping a container's processes onto a disk of the host's.

use std::{
    fs::{self, File},
    path::Path,
    time::Instant,
};

use machinen_protocol::api::{CheckpointContainerResponse, CheckpointFacts, CriuOptions, ImageFile};
use nix::{
    mount::MsFlags,
    unistd::{Pid, syncfs},
};
use protobuf::MessageField;
use rust_criu::rust_criu_protobuf::rpc::{Criu_req, Criu_req_type};

use super::{CriuError, cpu, extents, mounted::Mounted, mounts, rpc::Criu};
use crate::{cgroup::Cgroup, disk::Disk, reaper::Reaper};

const LOG: &str = "dump.log";
/// CRIU refuses to save unlinked files above 1 MiB unless it is told to.
const GHOST_LIMIT: u32 = 1 << 30;
/// Settings of a cgroup that make a restored container like the one that was dumped.
const LIMITS: [&str; 12] = [
    "cpu.max",
    "cpu.weight",
    "cpu.idle",
    "cpuset.cpus",
    "cpuset.mems",
    "io.weight",
    "memory.high",
    "memory.low",
    "memory.max",
    "memory.min",
    "memory.swap.max",
    "pids.max",
];

/// What is to be dumped.
#[derive(Debug)]
pub(crate) struct Source<'a> {
    pub(crate) init: Pid,
    /// All of it is frozen.
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) rootfs: &'a Path,
    /// The agent's directory of the container.
    pub(crate) dir: &'a Path,
}

/// Dumps, writes back, and says where on the disk everything is. The processes stay frozen.
///
/// # Errors
/// CRIU cannot; the processes are as before.
pub(crate) async fn dump(
    reaper: &Reaper,
    source: &Source<'_>,
    disk: &Disk,
    options: &CriuOptions,
) -> Result<CheckpointContainerResponse, CriuError> {
    let mut facts = facts(source)?;
    let mounted = Mounted::mount(disk, source.dir, MsFlags::MS_NOATIME)?;
    // The disk's root has lost+found.
    let images = mounted.path().join("images");
    fs::create_dir_all(&images).map_err(|source| CriuError::File {
        what: "create",
        path: images.clone(),
        source,
    })?;
    let since = Instant::now();
    run(reaper, source, &images, options, &facts).await?;
    facts.criu_version = version(&images.join(LOG));
    let criu_us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
    let files = files(&images)?;
    Ok(CheckpointContainerResponse { files, facts: MessageField::some(facts), criu_us, ..Default::default() })
}

async fn run(
    reaper: &Reaper,
    source: &Source<'_>,
    images: &Path,
    options: &CriuOptions,
    facts: &CheckpointFacts,
) -> Result<(), CriuError> {
    let dir = File::open(images).map_err(|source| CriuError::File {
        what: "open",
        path: images.to_owned(),
        source,
    })?;
    let mut opts = super::options(&dir, source.rootfs, options);
    opts.set_pid(source.init.as_raw());
    opts.set_leave_running(true);
    opts.set_freeze_cgroup(source.cgroup.path().display().to_string());
    opts.set_ghost_limit(GHOST_LIMIT);
    opts.set_link_remap(true);
    opts.set_log_file(LOG.to_owned());
    opts.external.extend(facts.mounts.iter().map(|mount| format!("mnt[{0}]:{0}", mount.destination)));
    let mut request = Criu_req::new();
    request.set_type(Criu_req_type::DUMP);
    request.opts = MessageField::some(opts);
    let criu = Criu::start(reaper, &[])?;
    criu.send(&request).await?;
    let outcome = criu.finish("checkpoint", &images.join(LOG)).await;
    if outcome.is_err() {
        criu.kill();
    }
    // Only then nothing of it is open on the disk any more.
    criu.ended().await;
    outcome
}

fn facts(source: &Source<'_>) -> Result<CheckpointFacts, CriuError> {
    let names = LIMITS.map(str::to_owned);
    let limits = source.cgroup.read_files(&names)?;
    Ok(CheckpointFacts {
        kernel_release: cpu::kernel(),
        cpu_flags: cpu::flags()?,
        descriptors: descriptors(source.init),
        mounts: mounts::external(source.init, &source.dir.join("files"))?,
        limits,
        ..Default::default()
    })
}

/// What CRIU says of itself at the start of its log: "(00.001) Version: 4.1.1 (gitid 0)".
fn version(log: &Path) -> String {
    let log = fs::read_to_string(log).unwrap_or_default();
    let version = log.lines().take(16).find_map(|line| line.split_once("Version: "));
    version.map(|(_, version)| version.split(' ').next().unwrap_or_default().to_owned()).unwrap_or_default()
}

/// What CRIU calls the pipes that the agent has the other ends of.
fn descriptors(init: Pid) -> Vec<String> {
    let name = |fd: u32| fs::read_link(format!("/proc/{init}/fd/{fd}"));
    (0..3).map(|fd| name(fd).map(|name| name.display().to_string()).unwrap_or_default()).collect()
}

fn files(images: &Path) -> Result<Vec<ImageFile>, CriuError> {
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| CriuError::File { what, path, source }
    };
    let dir = File::open(images).map_err(failed("open", images))?;
    syncfs(&dir).map_err(|err| failed("write back", images)(err.into()))?;
    let mut files = Vec::new();
    for entry in fs::read_dir(images).map_err(failed("read", images))? {
        let path = entry.map_err(failed("read", images))?.path();
        let file = File::open(&path).map_err(failed("open", &path))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.push(extents::locate(name, &file)?);
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}
