//! Dumps a container's processes onto a disk of the host's.

use std::{
    fs::{self, File},
    io::{BufWriter, Write as _},
    path::{Path, PathBuf},
    time::Instant,
};

use machinen_protocol::{
    api::{CheckpointContainerResponse, CheckpointFacts, CriuOptions, ImageFile},
    copies,
};
use nix::mount::MsFlags;
use protobuf::MessageField;
use rust_criu::rust_criu_protobuf::rpc::{Criu_opts, Criu_req, Criu_req_type};
use tokio::task::spawn_blocking;

use super::{
    CriuError, STDIN,
    check::{FrozenProcesses, check, in_one_mount_namespace},
    cpu,
    duplicate::Duplicate,
    extents,
    files::{self, MovedSocket},
    image_mount::ImageMount,
    mounts::{self, SECRETS_DIR},
    pagemap,
    reason::quote_of_dump,
    recover::recover,
    rpc::Criu,
    sockets, terminals,
    volumes::VolumeDevice,
    watches,
};
use crate::{cgroup::Cgroup, disk::Disk, layer::pack, process::Process, reaper::Reaper, stdio};

const LOG: &str = "dump.log";
/// The file system on the disk.
const FILE_SYSTEM: &str = "ext4";
/// Bytes that are written back before the host learns where they are; whole MiB.
const AT_ONCE: u64 = 32 << 20;
/// Directory on the disk for the memory that was copied before the dump.
const BEFORE: &str = "before";
/// By default CRIU refuses to save unlinked files above 1 MiB.
const GHOST_LIMIT: u32 = 1 << 30;
/// The limits of a container's cgroup that its checkpoint records.
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

/// The container that is dumped.
#[derive(Debug)]
pub(crate) struct DumpSource<'a> {
    pub(crate) init: &'a Process,
    /// The whole cgroup is frozen for a dump.
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) rootfs: &'a Path,
    /// The agent's directory of the container.
    pub(crate) dir: &'a Path,
    /// Where the copies of the host's directories are mounted.
    pub(crate) copies: Vec<PathBuf>,
    /// The directories with what was written to the copies.
    pub(crate) written: Vec<PathBuf>,
    /// The dump is restored on trial while the container continues.
    pub(crate) is_tried: bool,
}

/// Copies the memory of running processes. A [`dump`] onto the same disk then copies only what has changed.
///
/// # Errors
/// CRIU cannot copy the memory; the disk is as before. After [`CriuError::Corrupted`] the processes must be
/// killed.
pub(crate) async fn pre_dump(
    reaper: &Reaper,
    source: &DumpSource<'_>,
    disk: &Disk,
    options: &CriuOptions,
) -> Result<(), CriuError> {
    // CRIU would wait for ever for processes that are still frozen after it has thawed the container. A dump
    // thaws them while the container is frozen; a copy ahead cannot.
    if let Some(path) = source.cgroup.frozen_below()? {
        return Err(CriuError::FrozenBelow { path });
    }
    let mounted = ImageMount::mount(disk, source.dir, FILE_SYSTEM, MsFlags::MS_NOATIME)?;
    let images = directory(&mounted, BEFORE)?;
    let mut opts = opts(&images, source, options)?;
    opts.opts.set_track_mem(true);
    let done = match run(reaper, Criu_req_type::PRE_DUMP, opts, &images).await {
        Err(died @ CriuError::Died { .. }) => {
            Err(recover(source, false, false, &images.join(LOG), died).await)
        }
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

/// The images of a dump on their disk, which is mounted until this is dropped.
#[derive(Debug)]
pub(crate) struct Dumped {
    images: PathBuf,
    /// The memory that was copied before the dump.
    before: Option<PathBuf>,
    /// The images that the host does not know yet, the next one last; None before the images were listed.
    remaining: Option<Vec<Remaining>>,
    _mounted: ImageMount,
}

/// The part of an image behind `from`.
#[derive(Debug)]
struct Remaining {
    name: String,
    size: u64,
    from: u64,
}

impl Dumped {
    /// Writes back some of the images, and locates them on the disk: so much that the host is busy meanwhile.
    /// Also returns the remaining images, if any.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) async fn images(mut self) -> Result<(Vec<ImageFile>, Option<Self>), CriuError> {
        let locate = move || {
            if let Some(before) = &self.before {
                return Ok((merged(&self.images, before)?, None));
            }
            let mut remaining = match self.remaining.take() {
                Some(remaining) => remaining,
                None => images(&self.images)?,
            };
            let (mut files, mut bytes) = (Vec::new(), 0);
            while bytes < AT_ONCE
                && let Some(next) = remaining.pop()
            {
                let to = next.size.min(next.from + AT_ONCE);
                files.push(extents::locate(&next.name, &self.images.join(&next.name), next.from..to)?);
                bytes += to - next.from;
                if to < next.size {
                    remaining.push(Remaining { from: to, ..next });
                }
            }
            let rest =
                if remaining.is_empty() { None } else { Some(Self { remaining: Some(remaining), ..self }) };
            Ok((files, rest))
        };
        // The container runs, and the agent has to answer other calls.
        spawn_blocking(locate).await.map_err(CriuError::Thread)?
    }
}

/// Dumps the container onto a disk. Its processes stay frozen.
///
/// # Errors
/// CRIU cannot dump the container, or could not restore it from the dump; the processes are as before. After
/// [`CriuError::Corrupted`] they must be killed.
pub(crate) async fn dump(
    reaper: &Reaper,
    source: &DumpSource<'_>,
    disk: &Disk,
    options: &CriuOptions,
    stdin_sent: u64,
) -> Result<(Dumped, CheckpointContainerResponse), CriuError> {
    let volumes = VolumeDevice::used_by(source.init.pid())?;
    let Examined { moved, one_namespace, terminals } = examine(source, volumes).await?;
    let mut facts = facts(source)?;
    let mounted = ImageMount::mount(disk, source.dir, FILE_SYSTEM, MsFlags::MS_NOATIME)?;
    let before = Some(mounted.path().join(BEFORE)).filter(|before| before.is_dir());
    let images = directory(&mounted, "images")?;
    let since = Instant::now();
    let mut opts = opts(&images, source, options)?;
    opts.opts.external.extend(facts.mounts.iter().map(|mount| format!("mnt[{0}]:{0}", mount.destination)));
    if before.is_some() {
        opts.opts.set_track_mem(true);
        opts.opts.set_parent_img(format!("../{BEFORE}"));
    }
    source.cgroup.unfreeze(&facts.cgroups)?;
    let ran = match terminals::replace(reaper, source.cgroup, &terminals).await {
        Ok(()) => run(reaper, Criu_req_type::DUMP, opts, &images).await,
        Err(error) => Err(error),
    };
    source.cgroup.refreeze(&facts.cgroups)?;
    match ran {
        Err(died @ CriuError::Died { .. }) => {
            return Err(recover(source, true, options.tcp_established, &images.join(LOG), died).await);
        }
        done => done?,
    }
    files::correct(&images, &moved, one_namespace)?;
    volumes.map_or(Ok(()), |volumes| watches::check(&images, volumes))?;
    let unread = source.init.stdin().unread(stdin_sent).await.map_err(CriuError::Stdin)?;
    let path = images.join(STDIN);
    stdio::save_unread(&unread, &path).map_err(|source| CriuError::File { what: "write", path, source })?;
    save_copies(&images, source.written.clone()).await?;
    facts.criu_version = version(&images.join(LOG));
    let criu_us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
    let response =
        CheckpointContainerResponse { facts: MessageField::some(facts), criu_us, ..Default::default() };
    Ok((Dumped { images, before, remaining: None, _mounted: mounted }, response))
}

/// What CRIU does not find out about the processes.
struct Examined {
    moved: Vec<MovedSocket>,
    /// All processes are in one mount namespace.
    one_namespace: bool,
    /// The descriptors for `/dev/tty` that are replaced.
    terminals: Vec<Duplicate>,
}

/// Examines the frozen processes in a thread of its own. They may use files of a volume, which the agent's main thread
/// must not wait for: it passes the requests for them on.
async fn examine(source: &DumpSource<'_>, volumes: Option<VolumeDevice>) -> Result<Examined, CriuError> {
    let (init, cgroup) = (source.init.pid(), source.cgroup.clone());
    let (copies, is_tried) = (source.copies.clone(), source.is_tried);
    let secrets = VolumeDevice::mounted_at(&source.dir.join(SECRETS_DIR));
    let processes = FrozenProcesses { init, cgroup, volumes, copies, secrets, is_tried };
    let examine = move || {
        check(&processes)?;
        let moved = sockets::moved(&processes)?;
        let one_namespace = in_one_mount_namespace(&processes)?;
        let pids = processes.cgroup.pids()?;
        let terminals = pids.into_iter().flat_map(terminals::replaceable).collect();
        Ok(Examined { moved, one_namespace, terminals })
    };
    spawn_blocking(examine).await.map_err(CriuError::Thread)?
}

/// Saves what was written to the copies of the host's directories. The container is frozen.
async fn save_copies(images: &Path, written: Vec<PathBuf>) -> Result<(), CriuError> {
    if written.is_empty() {
        return Ok(());
    }
    let images = images.to_owned();
    let save = move || {
        written.iter().enumerate().try_for_each(|(number, upper)| {
            let path = images.join(copies::image(number));
            let failed = |source| CriuError::File { what: "write", path: path.clone(), source };
            let mut output = BufWriter::new(File::create(&path).map_err(failed)?);
            pack(upper, &mut output)?;
            output.flush().map_err(failed)
        })
    };
    // The agent has to answer other calls.
    spawn_blocking(save).await.map_err(CriuError::Thread)?
}

/// Creates a directory on the disk, whose root has lost+found.
fn directory(mounted: &ImageMount, name: &str) -> Result<PathBuf, CriuError> {
    let path = mounted.path().join(name);
    match fs::create_dir_all(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(CriuError::File { what: "create", path, source }),
    }
}

/// CRIU's options, and the open directory that they refer to by its descriptor.
struct DumpOptions {
    opts: Criu_opts,
    _dir: File,
}

fn opts(images: &Path, source: &DumpSource<'_>, options: &CriuOptions) -> Result<DumpOptions, CriuError> {
    let dir = File::open(images).map_err(|source| CriuError::File {
        what: "open",
        path: images.to_owned(),
        source,
    })?;
    let mut opts = super::options(&dir, source.rootfs, options);
    opts.set_pid(source.init.pid().as_raw());
    opts.set_leave_running(true);
    opts.set_freeze_cgroup(source.cgroup.path().display().to_string());
    // All cgroups below this one are recorded, wherever the first process is.
    opts.cg_root.push(super::cgroup_root(source.cgroup));
    opts.set_ghost_limit(GHOST_LIMIT);
    opts.set_link_remap(true);
    opts.set_log_file(LOG.to_owned());
    Ok(DumpOptions { opts, _dir: dir })
}

async fn run(
    reaper: &Reaper,
    what: Criu_req_type,
    opts: DumpOptions,
    images: &Path,
) -> Result<(), CriuError> {
    let mut request = Criu_req::new();
    request.set_type(what);
    request.opts = MessageField::some(opts.opts);
    let criu = Criu::start(reaper, &[])?;
    criu.send(&request).await?;
    let outcome = criu.finish("checkpoint", &images.join(LOG), quote_of_dump).await;
    // After a pre-dump CRIU would wait for a request to dump, which may never come.
    if outcome.is_err() || what == Criu_req_type::PRE_DUMP {
        criu.end().await;
    }
    // Only now CRIU has no file open on the disk.
    criu.exit().await;
    outcome
}

fn facts(source: &DumpSource<'_>) -> Result<CheckpointFacts, CriuError> {
    let names = LIMITS.map(str::to_owned);
    let limits = source.cgroup.read_files(&names)?;
    Ok(CheckpointFacts {
        kernel_release: cpu::kernel(),
        cpu_flags: cpu::flags()?,
        descriptors: descriptors(source.init),
        mounts: mounts::external(source.init.pid(), source.dir)?,
        limits,
        cgroups: source.cgroup.record(&LIMITS)?,
        ..Default::default()
    })
}

/// The version at the start of CRIU's log: "(00.001) Version: 4.1.1 (gitid 0)".
fn version(log: &Path) -> String {
    let log = fs::read_to_string(log).unwrap_or_default();
    let version = log.lines().take(16).find_map(|line| line.split_once("Version: "));
    version.map(|(_, version)| version.split(' ').next().unwrap_or_default().to_owned()).unwrap_or_default()
}

/// CRIU's names of the first process's standard streams. Pipes to the agent are named even where the process
/// does not have them open as such; other pipes are not named, since they belong to the container.
fn descriptors(init: &Process) -> Vec<String> {
    let open = |fd: usize| fs::read_link(format!("/proc/{}/fd/{fd}", init.pid()));
    let other = |fd| open(fd).map(|name| name.display().to_string()).unwrap_or_default();
    let name = |(fd, pipe): (usize, &Option<String>)| match pipe {
        Some(pipe) => pipe.clone(),
        None => Some(other(fd)).filter(|name| !name.starts_with("pipe:")).unwrap_or_default(),
    };
    init.pipes().iter().enumerate().map(name).collect()
}

/// Lists the images. The last one is the next to be located, and memory comes first in the list.
fn images(dir: &Path) -> Result<Vec<Remaining>, CriuError> {
    let failed = |source| CriuError::File { what: "read", path: dir.to_owned(), source };
    let mut images = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let status = entry.metadata().map_err(failed)?;
        // The other entry is CRIU's link to the earlier dump.
        if status.is_file() {
            let name = entry.file_name().to_string_lossy().into_owned();
            images.push(Remaining { name, size: status.len(), from: 0 });
        }
    }
    images.sort_by_key(|image| (!image.name.starts_with("pages-"), image.name.clone()));
    Ok(images)
}

/// Locates the images of two dumps as those of one; a merged file of pages consists of pieces of both.
fn merged(dir: &Path, before: &Path) -> Result<Vec<ImageFile>, CriuError> {
    let merged = pagemap::merge(dir, before)?;
    let located = images(dir)?.into_iter().map(|Remaining { name, .. }| {
        match merged.iter().find(|merged| merged.name == name) {
            None => extents::locate(&name, &dir.join(&name), extents::WHOLE),
            Some(merged) => extents::locate_pieces(merged),
        }
    });
    located.collect()
}
