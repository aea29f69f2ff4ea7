//! The process that builds a template and then becomes its holder. It outlives the process that requested the
//! template.

use std::{
    convert::Infallible,
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use machinen_base::{
    cgroup,
    error::chain,
    fs::{FileError, remove_dir_if_exists, remove_if_exists},
    memfd,
    process::{self, Child, Spawn, Stdio},
    reexec::EntryPoint,
    sys::inherit,
};
use serde::{Deserialize, Serialize};

use super::{
    TemplateError, TemplateShape, hash, holder,
    manifest::{TemplateManifest, VERSION},
    pages,
    store::{self, FoundTemplate, ReadyTemplate, TemplateStore},
};
use crate::{
    VmSnapshot, VmSpec,
    qemu::{slots::SLOTS, snapshot},
};

/// The process that builds a template; a [`BuildRequest`] is its stdin, as JSON.
pub(super) const ENTRY_POINT: EntryPoint = EntryPoint { name: "template-builder", main: |_| main() };

/// Added to the niceness: no start waits for a template, and containers are being started meanwhile.
const NICE: i32 = 10;
/// How many times longer than any other VM the VM of a template may boot: next to busy processes of the host, this priority gives
/// it a small part of a processor, and what waits for it can boot meanwhile.
const PATIENCE: u32 = 3;

/// The number of the first of the disks that a builder inherits.
const FIRST_DISK: i32 = 7;

/// The input of a builder.
#[derive(Debug, Serialize, Deserialize)]
struct BuildRequest {
    dir: PathBuf,
    budget_mib: u64,
    spec: VmSpec,
    /// Directories of the cgroups that the builder moves to.
    cgroups: Vec<PathBuf>,
    /// Whether the builder has inherited disks of which the guest makes a container once.
    has_disks: bool,
}

/// Disks of which the guest of a template makes a container once: an image, and a file system to write to.
pub type RehearsalDisks = [File; SLOTS];

impl TemplateStore {
    /// Starts the build of a template in the background, by a process that outlives this one, in the cgroups with the
    /// directories `cgroups`. Empty: in those of this process.
    ///
    /// # Errors
    /// The builder cannot be started.
    pub fn request(
        &self,
        spec: &VmSpec,
        budget_mib: u64,
        cgroups: &[PathBuf],
        disks: Option<RehearsalDisks>,
    ) -> Result<(), TemplateError> {
        self.start_builder(spec, budget_mib, cgroups, disks).map(drop)
    }

    fn start_builder(
        &self,
        spec: &VmSpec,
        budget_mib: u64,
        cgroups: &[PathBuf],
        disks: Option<RehearsalDisks>,
    ) -> Result<io::PipeReader, TemplateError> {
        let (dir, cgroups) = (self.dir().to_owned(), cgroups.to_vec());
        let request =
            BuildRequest { dir, budget_mib, spec: spec.clone(), cgroups, has_disks: disks.is_some() };
        let request = serde_json::to_vec(&request).map_err(TemplateError::Encode)?;
        let memory = |source| TemplateError::Memory { action: "pass on a request", source };
        let stdin = memfd::holding(&request).map_err(memory)?;
        let (reader, writer) = io::pipe().map_err(memory)?;
        let mut spawn = ENTRY_POINT
            .spawn()
            .dir("/")
            .stdin(Stdio::Fd(reopened(&stdin).map_err(memory)?))
            .fd(writer.into(), holder::REPORT);
        for (disk, number) in disks.into_iter().flatten().zip(FIRST_DISK..) {
            spawn = spawn.fd(disk.into(), number);
        }
        spawn.detach().map_err(TemplateError::Builder)?;
        Ok(reader)
    }
}

/// A descriptor of the same file with a position of its own.
fn reopened(fd: &OwnedFd) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd as _;
    File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).map(Into::into)
}

/// Builds a template of `spec`, unless there is one, and waits for it. Blocks for some seconds.
///
/// # Errors
/// The template cannot be built, or another process is building it.
pub fn build(
    templates: &TemplateStore,
    spec: &VmSpec,
    budget_mib: u64,
    disks: Option<RehearsalDisks>,
    progress: &mut dyn FnMut(String),
) -> Result<ReadyTemplate, TemplateError> {
    let shape = TemplateShape::of(spec)?.ok_or(TemplateError::Vm(crate::VmSnapshotError::Channel))?;
    templates.create()?;
    let failed = templates.names(&shape.key()).failed();
    remove_if_exists(&failed).map_err(FileError::at("remove", failed))?;
    match templates.find(&shape)? {
        FoundTemplate::Ready(template) => return Ok(*template),
        FoundTemplate::Building => return Err(TemplateError::Building),
        FoundTemplate::Absent | FoundTemplate::Failed(_) => {}
    }
    let report = templates.start_builder(spec, budget_mib, &[], disks)?;
    for line in BufReader::new(report).lines() {
        let line = line
            .map_err(|source| TemplateError::Memory { action: "read the progress of the builder", source })?;
        match line.split_once(": ") {
            Some(("failed", reason)) => return Err(TemplateError::Failed(reason.to_owned())),
            _ if line == "busy" => return Err(TemplateError::Building),
            _ if line == "ready" => break,
            _ => progress(line),
        }
    }
    match templates.find(&shape)? {
        FoundTemplate::Ready(template) => Ok(*template),
        _ => Err(TemplateError::Failed("its builder has ended without a result".to_owned())),
    }
}

fn main() -> ExitCode {
    let Ok(report) = inherit::take(holder::REPORT).map(File::from) else { return ExitCode::from(2) };
    let mut text = Vec::new();
    let request =
        io::stdin().lock().read_to_end(&mut text).map(|_| serde_json::from_slice::<BuildRequest>(&text));
    let Ok(Ok(request)) = request else { return ExitCode::from(2) };
    let Err(error) = run(request, &report);
    send_line(&report, &format!("failed: {}", chain(&error)));
    ExitCode::FAILURE
}

/// Builds the template, and replaces this process by the template's holder.
fn run(request: BuildRequest, report: &File) -> Result<Infallible, TemplateError> {
    let BuildRequest { dir, budget_mib, mut spec, cgroups, has_disks } = request;
    let disks = has_disks.then(inherited_disks).transpose();
    let disks =
        disks.map_err(|source| TemplateError::Memory { action: "take the inherited disks", source })?;
    cgroup::enter(&cgroups, std::process::id())?;
    if let Err(error) = rustix::process::nice(NICE) {
        tracing::debug!("cannot lower the priority: {error}");
    }
    let templates = TemplateStore::at(&dir);
    templates.create()?;
    let shape = TemplateShape::of(&spec)?.ok_or(TemplateError::Vm(crate::VmSnapshotError::Channel))?;
    let key = shape.key();
    let Some(lock) = templates.lock(&key)? else {
        send_line(report, "busy");
        std::process::exit(0);
    };
    spec.keep_console = false;
    spec.boot_timeout *= PATIENCE;
    snapshot::ORIGINAL.clone_into(&mut spec.id);
    let built = make(&templates, &shape, &spec, budget_mib, disks, report);
    let spawn = match built {
        Ok(snapshot) => hold(&templates, &key, snapshot, lock, report),
        Err(error) => Err(error),
    };
    let error = match spawn {
        Ok(spawn) => TemplateError::Builder(spawn.replace()),
        Err(error) => error,
    };
    templates.note_failure(&key, &chain(&error))?;
    Err(error)
}

fn inherited_disks() -> io::Result<RehearsalDisks> {
    Ok([inherit::take(FIRST_DISK)?.into(), inherit::take(FIRST_DISK + 1)?.into()])
}

/// Boots and saves the VM, and writes the manifest under a name that is not read yet.
fn make(
    templates: &TemplateStore,
    shape: &TemplateShape,
    spec: &VmSpec,
    budget_mib: u64,
    disks: Option<RehearsalDisks>,
    report: &File,
) -> Result<VmSnapshot, TemplateError> {
    let names = templates.names(&shape.key());
    // Files of a builder or holder that was killed.
    for path in [names.manifest(), names.unpublished(), names.failed(), names.pages()] {
        remove_if_exists(&path).map_err(FileError::at("remove", path))?;
    }
    remove_dir_if_exists(&names.vm()).map_err(FileError::at("remove", names.vm()))?;
    send_line(report, &format!("booting a VM of {} MiB and {} CPUs", spec.memory_mib, spec.vcpus));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime =
        runtime.map_err(|source| TemplateError::Memory { action: "start an event loop", source })?;
    let snapshot = runtime.block_on(VmSnapshot::make(spec, &names.vm(), disks.as_ref()));
    remove_dir_if_exists(&names.vm()).map_err(FileError::at("remove", names.vm()))?;
    let snapshot = snapshot?;
    let memory = |source| TemplateError::Memory { action: "read the memory", source };
    let file = File::from(snapshot.memory.as_fd().try_clone_to_owned().map_err(memory)?);
    let allocated = pages::allocated(&file).map_err(memory)?;
    let original_memory = snapshot.original.as_ref().map_or(0, |original| process::tree_pss(original.pid));
    let taken = allocated + original_memory;
    send_line(report, &format!("saved, {} MiB of memory", taken >> 20));
    if snapshot.unprepared > 0 {
        let failed = snapshot.unprepared;
        send_line(report, &format!("clones will be slow: {failed} preparations of the guest have failed"));
    }
    templates.make_room(taken, budget_mib)?;
    let manifest = TemplateManifest {
        version: VERSION,
        shape: shape.clone(),
        pid: std::process::id(),
        qemu: snapshot.qemu,
        memory_fd: snapshot.memory_fd,
        original: snapshot.original.clone(),
        memory_mib: spec.memory_mib,
        vcpus: spec.vcpus,
        allocated,
        original_memory,
        devices: snapshot.devices.len() as u64,
        sha256: hash::digest(&file, &snapshot.devices).map_err(memory)?,
        created: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
    };
    let text = serde_json::to_vec_pretty(&manifest).map_err(TemplateError::Encode)?;
    store::write(&names.unpublished(), &text)?;
    Ok(snapshot)
}

/// Describes the holder process: this program, with only the descriptors that it is to keep open.
fn hold(
    templates: &TemplateStore,
    key: &str,
    snapshot: VmSnapshot,
    lock: File,
    report: &File,
) -> Result<Spawn, TemplateError> {
    let memory = |source| TemplateError::Memory { action: "pass on the memory", source };
    let devices = memfd::holding(&snapshot.devices).map_err(memory)?;
    let report = report.try_clone().map_err(memory)?;
    // The holder is the same process, and its parent therefore.
    snapshot.original_process.map(Child::release);
    let original = snapshot.original.as_ref().ok();
    let original = original.map(|original| [original.pid.to_string(), snapshot.memory_fd.to_string()]);
    Ok(holder::ENTRY_POINT
        .spawn()
        .args([templates.dir().as_os_str(), key.as_ref()])
        .args(original.into_iter().flatten())
        .dir("/")
        .fd(snapshot.memory, holder::MEMORY)
        .fd(devices, holder::DEVICES)
        .fd(lock.into(), holder::LOCK)
        .fd(report.into(), holder::REPORT))
}

/// Sends a line to the process that waits for the builder, if there is one.
pub(super) fn send_line(mut report: &File, line: &str) {
    drop(writeln!(report, "{}", line.replace('\n', "; ")));
}
