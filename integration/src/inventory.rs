//! The resources that a private containerd has on the machine now: processes, mounts, files and control
//! groups.
//!
//! Only resources of one harness root are counted, so tests may run in parallel.

use std::{
    collections::BTreeSet,
    fmt, fs,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, umount2};

/// The sockets of the shims of every containerd of the machine.
pub const SHIM_SOCKETS: &str = "/run/containerd/s";

/// A process of the machine.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    pub pid: u32,
    pub parent: u32,
    /// Command line, or the name in brackets for a zombie.
    pub command: String,
}

impl Process {
    fn is_same(&self, later: &Self) -> bool {
        let is_zombie = later.command.starts_with('[');
        self == later || !is_zombie && (self.pid, self.parent) == (later.pid, later.parent)
    }
}

/// Everything that belongs to one root, namespace and keeper.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    pub processes: BTreeSet<Process>,
    pub mounts: BTreeSet<PathBuf>,
    /// Files of every kind, with a letter for the kind where it is not a regular file.
    pub files: BTreeSet<String>,
    pub cgroups: BTreeSet<PathBuf>,
}

/// The places that are searched.
#[derive(Debug, Clone)]
pub struct Scope {
    /// All descendants of this process, itself excluded.
    pub keeper: u32,
    /// Every mount below it.
    pub root: PathBuf,
    /// Directories whose content counts, recursively.
    pub dirs: Vec<PathBuf>,
    /// First part of the names of shims' sockets.
    pub sockets: Vec<String>,
    /// Name of the control groups' directory.
    pub namespace: String,
}

impl Inventory {
    /// # Errors
    /// `/proc` or a directory cannot be read.
    pub fn take(scope: &Scope) -> Result<Self> {
        let mut files = BTreeSet::new();
        for dir in &scope.dirs {
            list(dir, &mut files)?;
        }
        for entry in fs::read_dir(SHIM_SOCKETS).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if scope.sockets.iter().any(|socket| name.starts_with(socket)) {
                files.insert(format!("s {SHIM_SOCKETS}/{name}"));
            }
        }
        Ok(Self {
            processes: descendants(scope.keeper)?.into_iter().collect(),
            mounts: mounts_below(&scope.root)?.into_iter().collect(),
            files,
            // runc leaves the directory that contains a namespace's groups too.
            cgroups: cgroups(&scope.namespace)
                .into_iter()
                .filter(|path| !path.ends_with(&scope.namespace))
                .collect(),
        })
    }

    /// The entries of this inventory that the earlier one lacks. A process that has executed another program since then is
    /// the same: runc's containers are running before their command is.
    pub fn since(&self, before: &Self) -> Self {
        let is_new = |process: &&Process| !before.processes.iter().any(|old| old.is_same(process));
        Self {
            processes: self.processes.iter().filter(is_new).cloned().collect(),
            mounts: &self.mounts - &before.mounts,
            files: &self.files - &before.files,
            cgroups: &self.cgroups - &before.cgroups,
        }
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Inventory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for process in &self.processes {
            writeln!(f, "  process {} (child of {}): {}", process.pid, process.parent, process.command)?;
        }
        self.mounts.iter().try_for_each(|path| writeln!(f, "  mount {}", path.display()))?;
        self.files.iter().try_for_each(|file| writeln!(f, "  file {file}"))?;
        self.cgroups.iter().try_for_each(|path| writeln!(f, "  cgroup {}", path.display()))
    }
}

/// What the arguments of a template's QEMU have and those of no clone.
const TEMPLATES_QEMU: &str = " -name machinen-template,";

/// All descendants of a process, parents before children.
///
/// # Errors
/// `/proc` cannot be read.
pub fn descendants(ancestor: u32) -> Result<Vec<Process>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot read /proc")? {
        let name = entry.context("cannot read /proc")?.file_name();
        let pid = name.to_str().and_then(|name| name.parse().ok());
        // A process may end at any moment, and is then missing.
        all.extend(pid.and_then(process));
    }
    let mut found: Vec<Process> = Vec::new();
    let mut parents = vec![ancestor];
    while let Some(parent) = parents.pop() {
        let children = all.iter().filter(|process| process.parent == parent).cloned();
        for child in children.collect::<Vec<_>>() {
            parents.push(child.pid);
            found.push(child);
        }
    }
    Ok(found)
}

fn process(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may itself contain any character; the rest is numbers.
    let (head, tail) = stat.rsplit_once(')')?;
    let parent = tail.split_whitespace().nth(1)?.parse().ok()?;
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let command = String::from_utf8_lossy(&command).replace('\0', " ");
    // The QEMU of a clone may be a twin of its template's, which the VM's owner traces. The template's own is traced
    // too while a twin is made, and belongs to all.
    let parent = tracer(pid).filter(|_| !command.contains(TEMPLATES_QEMU)).unwrap_or(parent);
    let command = if command.is_empty() {
        format!("[{}]", head.split_once('(').map_or("", |(_, name)| name))
    } else {
        command.trim_end().to_owned()
    };
    Some(Process { pid, parent, command })
}

/// The process that traces another one.
fn tracer(pid: u32) -> Option<u32> {
    let number = |pid: u32, name| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u32>().ok())
    };
    number(number(pid, "TracerPid:").filter(|thread| *thread != 0)?, "Tgid:")
}

/// Mount points at or below a path, in the order in which they were mounted.
///
/// # Errors
/// `/proc/self/mountinfo` cannot be read.
pub fn mounts_below(root: &Path) -> Result<Vec<PathBuf>> {
    let points = mount_points("/proc/self/mountinfo")?.into_iter();
    Ok(points.filter(|point| point.starts_with(root)).collect())
}

/// Mount points in a process's `mountinfo`, in the order in which they were mounted.
///
/// # Errors
/// The file cannot be read.
pub fn mount_points(table: &str) -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string(table).with_context(|| format!("cannot read {table}"))?;
    Ok(text.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from).collect())
}

/// Directories called `namespace` at the top of every control group hierarchy, and those below them.
pub fn cgroups(namespace: &str) -> Vec<PathBuf> {
    let Ok(hierarchies) = fs::read_dir("/sys/fs/cgroup") else { return Vec::new() };
    let tops = hierarchies.flatten().map(|entry| entry.path()).chain([PathBuf::from("/sys/fs/cgroup")]);
    let mut found: Vec<PathBuf> = tops.map(|top| top.join(namespace)).filter(|path| path.is_dir()).collect();
    let mut next = 0;
    while next < found.len() {
        let entries = fs::read_dir(&found[next]).into_iter().flatten().flatten();
        found.extend(entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect::<Vec<_>>());
        next += 1;
    }
    found
}

/// Files of every kind below a directory, as in [`Inventory::files`].
///
/// # Errors
/// A directory cannot be read.
pub fn files_below(dir: &Path) -> Result<BTreeSet<String>> {
    let mut files = BTreeSet::new();
    list(dir, &mut files)?;
    Ok(files)
}

fn list(dir: &Path, files: &mut BTreeSet<String>) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot list {}", dir.display())),
    };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        let path = entry.path();
        let letter = match () {
            () if kind.is_dir() => "d ",
            () if kind.is_socket() => "s ",
            () if kind.is_fifo() => "p ",
            () => "",
        };
        files.insert(format!("{letter}{}", path.display()));
        // The content of a mount is the container's own; the mount itself is listed.
        if kind.is_dir() && !entry.file_name().eq("rootfs") {
            list(&path, files)?;
        }
    }
    Ok(())
}

/// Removes the remains of a dead containerd: mounts below the root, control groups, the root itself.
///
/// # Errors
/// An entry could not be removed; all others were tried nevertheless.
pub fn wipe(root: &Path, namespace: &str) -> Result<()> {
    let mut result = Ok(());
    for point in mounts_below(root)?.iter().rev() {
        if let Err(error) = umount2(point, MntFlags::MNT_DETACH) {
            result = Err(error).with_context(|| format!("cannot unmount {}", point.display()));
        }
    }
    if let Err(error) = remove_cgroups(namespace) {
        result = Err(error);
    }
    // Killed shims could not remove their sockets; other shims have removed them already.
    for socket in shim_sockets(root) {
        let _absent = fs::remove_file(socket);
    }
    let _absent = fs::remove_dir_all(Path::new("/run/containerd/runc").join(namespace));
    remove_network_results(root);
    // While something is mounted below, removal could reach into a container's or the host's files.
    result?;
    match fs::remove_dir_all(root) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", root.display()))
        }
        _ => Ok(()),
    }
}

/// Continues the control group of a process, if it is frozen by version 1: the process would not die of SIGKILL.
///
/// # Errors
/// The group cannot be changed.
pub fn thaw(pid: u32) -> Result<()> {
    // A process that has ended needs no group.
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let Some(group) = groups.lines().find_map(|line| line.split_once(":freezer:")) else { return Ok(()) };
    let state = format!("/sys/fs/cgroup/freezer{}/freezer.state", group.1);
    match fs::write(&state, "THAWED") {
        // The top of the hierarchy, which is never frozen, has no such file.
        Err(error) if error.kind() != std::io::ErrorKind::NotFound && group.1 != "/" => {
            Err(error).with_context(|| format!("cannot write {state}"))
        }
        _ => Ok(()),
    }
}

/// Removes what CNI has written down about the networks of pods that were not stopped: a file for each, which
/// has the path of the pod's namespace.
fn remove_network_results(root: &Path) {
    let below = format!("{}/", root.display());
    for entry in fs::read_dir("/var/lib/cni/results").into_iter().flatten().flatten() {
        if fs::read_to_string(entry.path()).is_ok_and(|text| text.contains(&below)) {
            let _absent = fs::remove_file(entry.path());
        }
    }
}

/// Removes the control groups called `name` at the top of every hierarchy, and those below them.
///
/// # Errors
/// A process is still in one of them.
pub fn remove_cgroups(name: &str) -> Result<()> {
    for group in cgroups(name).iter().rev() {
        fs::remove_dir(group).with_context(|| format!("cannot remove {}", group.display()))?;
    }
    Ok(())
}

/// The sockets that the shims of all bundles have written down.
fn shim_sockets(root: &Path) -> Vec<PathBuf> {
    let mut files = BTreeSet::new();
    if list(&root.join("s"), &mut files).is_err() {
        return Vec::new();
    }
    let named = files.iter().filter(|file| file.ends_with("/address") || file.ends_with("/bootstrap.json"));
    let texts = named.filter_map(|file| fs::read_to_string(file).ok());
    texts
        .filter_map(|text| {
            let (_, tail) = text.split_once(SHIM_SOCKETS)?;
            let name: String = tail[1..].chars().take_while(char::is_ascii_hexdigit).collect();
            Some(Path::new(SHIM_SOCKETS).join(name))
        })
        .collect()
}
