//! Dumping a container's processes onto a disk of the host's.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Instant,
};

use machinen_protocol::api::{CheckpointContainerResponse, CheckpointFacts, CriuOptions, ImageFile};
use nix::{
    mount::MsFlags,
    unistd::{Pid, syncfs},
};
use protobuf::MessageField;
use rust_criu::rust_criu_protobuf::rpc::{Criu_opts, Criu_req, Criu_req_type};
use tokio::task::spawn_blocking;

use super::{
    CriuError, cpu, extents,
    mend::mend,
    mounted::Mounted,
    mounts,
    pagemap::{self, Merged},
    rpc::Criu,
};
use crate::{cgroup::Cgroup, disk::Disk, reaper::Reaper};

const LOG: &str = "dump.log";
/// What the disk has.
const FILE_SYSTEM: &str = "ext4";
/// Directory on the disk of what was copied before the dump.
const BEFORE: &str = "before";
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

/// Copies the memory of processes that run, for [`dump`] on the same disk to count on.
///
/// # Errors
/// CRIU cannot; the disk is as before. [`CriuError::Harmed`]: the processes are not, and must end.
pub(crate) async fn pre_dump(
    reaper: &Reaper,
    source: &Source<'_>,
    disk: &Disk,
    options: &CriuOptions,
) -> Result<(), CriuError> {
    let mounted = Mounted::mount(disk, source.dir, FILE_SYSTEM, MsFlags::MS_NOATIME)?;
    let images = directory(&mounted, BEFORE)?;
    let mut opts = opts(&images, source, options)?;
    opts.opts.set_track_mem(true);
    let done = match run(reaper, Criu_req_type::PRE_DUMP, opts, &images).await {
        Err(died @ CriuError::Died { .. }) => Err(mend(source, false, false, &images.join(LOG), died).await),
        done => done,
    };
    if done.is_err() {
        fs::remove_dir_all(&images).map_err(|source| CriuError::File {
            what: "remove",
            path: images,
            source,
        })?;
    }
    done
}

/// What a dump has left on its disk, which is mounted until this is dropped.
#[derive(Debug)]
pub(crate) struct Dumped {
    images: PathBuf,
    /// What was copied before it.
    before: Option<PathBuf>,
    _mounted: Mounted,
}

impl Dumped {
    /// Writes everything back, and says where on the disk it is.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) async fn images(self) -> Result<Vec<ImageFile>, CriuError> {
        let located = move || {
            let merged = match &self.before {
                Some(before) => pagemap::merge(&self.images, before)?,
                None => Vec::new(),
            };
            files(&self.images, &merged)
        };
        // The container runs, and others are to be answered.
        spawn_blocking(located).await.map_err(CriuError::Thread)?
    }
}

/// Dumps onto a disk. The processes stay frozen.
///
/// # Errors
/// CRIU cannot; the processes are as before. [`CriuError::Harmed`]: they are not, and must end.
pub(crate) async fn dump(
    reaper: &Reaper,
    source: &Source<'_>,
    disk: &Disk,
    options: &CriuOptions,
) -> Result<(Dumped, CheckpointContainerResponse), CriuError> {
    let mut facts = facts(source)?;
    let mounted = Mounted::mount(disk, source.dir, FILE_SYSTEM, MsFlags::MS_NOATIME)?;
    let before = Some(mounted.path().join(BEFORE)).filter(|before| before.is_dir());
    let images = directory(&mounted, "images")?;
    let since = Instant::now();
    let mut opts = opts(&images, source, options)?;
    opts.opts.external.extend(facts.mounts.iter().map(|mount| format!("mnt[{0}]:{0}", mount.destination)));
    if before.is_some() {
        opts.opts.set_track_mem(true);
        opts.opts.set_parent_img(format!("../{BEFORE}"));
    }
    match run(reaper, Criu_req_type::DUMP, opts, &images).await {
        Err(died @ CriuError::Died { .. }) => {
            return Err(mend(source, true, options.tcp_established, &images.join(LOG), died).await);
        }
        done => done?,
    }
    facts.criu_version = version(&images.join(LOG));
    let criu_us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
    let response =
        CheckpointContainerResponse { facts: MessageField::some(facts), criu_us, ..Default::default() };
    Ok((Dumped { images, before, _mounted: mounted }, response))
}

/// A directory on the disk, whose root has lost+found.
fn directory(mounted: &Mounted, name: &str) -> Result<PathBuf, CriuError> {
    let path = mounted.path().join(name);
    match fs::create_dir_all(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(CriuError::File { what: "create", path, source }),
    }
}

/// CRIU's options, and the directory that they name by its number.
struct Opts {
    opts: Criu_opts,
    _dir: File,
}

fn opts(images: &Path, source: &Source<'_>, options: &CriuOptions) -> Result<Opts, CriuError> {
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
    Ok(Opts { opts, _dir: dir })
}

async fn run(reaper: &Reaper, what: Criu_req_type, opts: Opts, images: &Path) -> Result<(), CriuError> {
    let mut request = Criu_req::new();
    request.set_type(what);
    request.opts = MessageField::some(opts.opts);
    let criu = Criu::start(reaper, &[])?;
    criu.send(&request).await?;
    let outcome = criu.finish("checkpoint", &images.join(LOG)).await;
    // After a copy it would wait to be asked for the dump, which may never come.
    if outcome.is_err() || what == Criu_req_type::PRE_DUMP {
        criu.end().await;
    }
    // Only then nothing of it is open on the disk any more.
    criu.exit().await;
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

/// Writes everything back, and tells where it is; pages of files in pieces are where the pieces are.
fn files(images: &Path, merged: &[Merged]) -> Result<Vec<ImageFile>, CriuError> {
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| CriuError::File { what, path, source }
    };
    let dir = File::open(images).map_err(failed("open", images))?;
    syncfs(&dir).map_err(|err| failed("write back", images)(err.into()))?;
    let mut files = Vec::new();
    for entry in fs::read_dir(images).map_err(failed("read", images))? {
        let path = entry.map_err(failed("read", images))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let located = match merged.iter().find(|merged| merged.name == name) {
            // CRIU's link to the dump before.
            None if path.is_symlink() => continue,
            None => extents::locate(name, &path)?,
            Some(merged) => extents::locate_pieces(merged)?,
        };
        files.push(located);
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}
