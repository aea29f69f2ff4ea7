//! Cgroups that a container has made below its own: how a checkpoint records them, and how a restore makes
//! them again.
//!
//! ```text
//!   dump      record: every cgroup below, with the settings that are not the kernel's defaults
//!   restore   make ──> CRIU moves the first process to its place ──> apply_limits ──> CRIU makes the rest
//! ```
//! CRIU records and moves the processes, but keeps no limits of cgroup v2. A cgroup that enables controllers
//! for its children may not hold processes itself. But CRIU, and a first process with a cgroup namespace,
//! pass through the container's own cgroup: so controllers are enabled afterwards. Memory is charged where it
//! is first touched, so they must be enabled before CRIU restores memory.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, chown},
    path::{Path, PathBuf},
};

use machinen_protocol::api::{CgroupFile, CgroupFileOwner, NestedCgroup};

use super::{Cgroup, CgroupError, is_gone};

/// Most cgroups that a checkpoint records, and most bytes of their names and settings.
pub(super) const MAX_NESTED: usize = 1024;
const MAX_BYTES: usize = 1 << 20;
/// Longest name of a directory.
const MAX_NAME: usize = 255;

const TYPE: &str = "cgroup.type";
const THREADED: &str = "threaded";
const FREEZE: &str = "cgroup.freeze";
const SUBTREE: &str = "cgroup.subtree_control";

/// Settings and their values in a new cgroup, in the order in which they are set.
const SETTINGS: [(&str, &str); 27] = [
    (TYPE, "domain"),
    ("cgroup.max.depth", "max"),
    ("cgroup.max.descendants", "max"),
    ("cgroup.pressure", "1"),
    ("cpu.idle", "0"),
    ("cpu.max", "max 100000"),
    ("cpu.max.burst", "0"),
    ("cpu.weight", "100"),
    ("cpuset.cpus", ""),
    ("cpuset.mems", ""),
    ("cpuset.cpus.exclusive", ""),
    ("cpuset.cpus.partition", "member"),
    ("hugetlb.1GB.max", "max"),
    ("hugetlb.2MB.max", "max"),
    ("io.weight", "default 100"),
    ("memory.high", "max"),
    ("memory.low", "0"),
    ("memory.max", "max"),
    ("memory.min", "0"),
    ("memory.oom.group", "0"),
    ("memory.swap.high", "max"),
    ("memory.swap.max", "max"),
    ("memory.zswap.max", "max"),
    ("memory.zswap.writeback", "1"),
    ("pids.max", "max"),
    (SUBTREE, ""),
    (FREEZE, "0"),
];

/// Files that are given to a user together with the right to divide a cgroup further
/// (/sys/kernel/cgroup/delegate).
const DELEGATED: [&str; 5] =
    ["cgroup.procs", "cgroup.threads", SUBTREE, "memory.oom.group", "memory.reclaim"];

impl Cgroup {
    /// Records all cgroups below this one, parents first. This cgroup itself comes first if it has settings
    /// that are not in `known`.
    ///
    /// # Errors
    /// There are more than a checkpoint records, or one cannot be read.
    pub(crate) fn record(&self, known: &[&str]) -> Result<Vec<NestedCgroup>, CgroupError> {
        let too_many = || CgroupError::TooManyNested { path: self.path.clone() };
        let tree = match self.tree() {
            Err(CgroupError::TooMany { .. }) => return Err(too_many()),
            tree => tree?,
        };
        if tree.len() > MAX_NESTED {
            return Err(too_many());
        }
        let (mut found, mut bytes) = (Vec::new(), 0);
        for dir in tree {
            let below = dir.strip_prefix(&self.path).unwrap_or(&dir);
            let path = below.to_str().ok_or_else(|| CgroupError::Name { path: dir.clone() })?.to_owned();
            let is_own = path.is_empty();
            let cgroup = Self { path: dir.clone() };
            let mut nested = NestedCgroup { path, ..Default::default() };
            for (name, default) in SETTINGS {
                // A checkpoint does not record whether the container itself is frozen.
                let skipped = is_own && (known.contains(&name) || name == FREEZE);
                if !skipped && let Some(content) = cgroup.setting(name, default)? {
                    bytes += name.len() + content.len();
                    nested.settings.push(CgroupFile { name: name.to_owned(), content, ..Default::default() });
                }
            }
            nested.owners = owners(&dir)?;
            bytes += nested.path.len();
            if bytes > MAX_BYTES {
                return Err(too_many());
            }
            if !is_own || !nested.settings.is_empty() || !nested.owners.is_empty() {
                found.push(nested);
            }
        }
        Ok(found)
    }

    /// Reads a setting; None if it has its default value.
    fn setting(&self, name: &str, default: &str) -> Result<Option<String>, CgroupError> {
        let Some(content) = self.read(name)? else { return Ok(None) };
        let content = match name {
            // The other lines are about devices of this VM.
            "io.weight" => content.lines().next().unwrap_or_default(),
            // The rest of the line says why the setting is not in effect.
            "cpuset.cpus.partition" => content.split_ascii_whitespace().next().unwrap_or_default(),
            _ => content.trim_end(),
        };
        let is_default = content == default
            // Other types are a consequence of where the threaded cgroups are.
            || (name == TYPE && content != THREADED)
            // The weight that an idle cgroup reports cannot be set.
            || (name == "cpu.weight" && content == "0");
        Ok((!is_default).then(|| content.to_owned()))
    }

    /// Makes the recorded cgroups, for CRIU to move processes into.
    ///
    /// # Errors
    /// A recorded cgroup is invalid, or the kernel refuses.
    pub(crate) fn make(&self, recorded: &[NestedCgroup]) -> Result<(), CgroupError> {
        if recorded.len() > MAX_NESTED {
            return Err(CgroupError::TooManyNested { path: self.path.clone() });
        }
        for nested in recorded {
            let cgroup = self.below(nested)?;
            match fs::create_dir(&cgroup.path) {
                Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(CgroupError::Create { path: cgroup.path, source });
                }
                _ => {}
            }
            cgroup.apply(nested, |name| name == TYPE)?;
            for owner in &nested.owners {
                let path = cgroup.path.join(checked_owner(owner)?);
                match chown(&path, Some(owner.uid), Some(owner.gid)) {
                    // The file belongs to a controller that is enabled later, or that this kernel lacks.
                    Err(source) if !is_gone(&source) => return Err(CgroupError::Write { path, source }),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Enables the controllers of the cgroups and sets their limits. The first process is in its cgroup, and
    /// CRIU is the only other process.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn apply_limits(&self, recorded: &[NestedCgroup]) -> Result<(), CgroupError> {
        for nested in recorded {
            let cgroup = self.below(nested)?;
            cgroup.apply(nested, |name| ![TYPE, SUBTREE, FREEZE].contains(&name))?;
            if let Some(subtree) = nested.settings.iter().find(|file| file.name == SUBTREE) {
                cgroup.give(&subtree.content, || self.make_way(&cgroup, recorded))?;
            }
        }
        Ok(())
    }

    /// Thaws the cgroups that a process of the container has frozen. No process runs, since the container's
    /// own cgroup is frozen. But CRIU thaws that one while it holds the processes, and would wait for
    /// processes that are frozen below.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn unfreeze(&self, recorded: &[NestedCgroup]) -> Result<(), CgroupError> {
        let is_frozen = |nested: &&NestedCgroup| nested.settings.iter().any(|file| file.name == FREEZE);
        let mut below = recorded.iter().filter(|nested| !nested.path.is_empty()).filter(is_frozen);
        below.try_for_each(|nested| self.below(nested)?.set(FREEZE, "0"))
    }

    /// Freezes the cgroups that a process of the container had frozen. CRIU holds all processes.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn refreeze(&self, recorded: &[NestedCgroup]) -> Result<(), CgroupError> {
        let mut below = recorded.iter().filter(|nested| !nested.path.is_empty());
        below.try_for_each(|nested| self.below(nested)?.apply(nested, |name| name == FREEZE))
    }

    /// Finds the first cgroup below this one that a process of the container has frozen.
    ///
    /// # Errors
    /// There are too many cgroups, or one cannot be read.
    pub(crate) fn frozen_below(&self) -> Result<Option<PathBuf>, CgroupError> {
        for path in self.tree()?.into_iter().filter(|path| *path != self.path) {
            let frozen = Self { path: path.clone() }.read(FREEZE)?;
            if frozen.is_some_and(|content| content.trim_end() == "1") {
                return Ok(Some(path.strip_prefix(&self.path).unwrap_or(&path).to_owned()));
            }
        }
        Ok(None)
    }

    fn apply(&self, nested: &NestedCgroup, wanted: impl Fn(&str) -> bool) -> Result<(), CgroupError> {
        for file in &nested.settings {
            if !SETTINGS.iter().any(|(name, _)| *name == file.name) {
                return Err(CgroupError::FileName { name: file.name.chars().take(64).collect() });
            }
            if wanted(&file.name) {
                self.set(&file.name, &file.content)?;
            }
        }
        Ok(())
    }

    /// Enables controllers for child cgroups; processes that prevent this are moved first.
    fn give(
        &self,
        controllers: &str,
        make_way: impl FnOnce() -> Result<(), CgroupError>,
    ) -> Result<(), CgroupError> {
        let text: Vec<String> = controllers.split_ascii_whitespace().map(|name| format!("+{name}")).collect();
        let text = text.join(" ");
        match self.set(SUBTREE, &text) {
            Err(CgroupError::Set { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => {
                make_way()?;
                self.set(SUBTREE, &text)
            }
            given => given,
        }
    }

    /// Moves CRIU from a cgroup to that of the first process.
    fn make_way(&self, from: &Self, recorded: &[NestedCgroup]) -> Result<(), CgroupError> {
        for nested in recorded {
            let cgroup = self.below(nested)?;
            if cgroup.path == from.path || cgroup.members()?.is_empty() {
                continue;
            }
            let path = cgroup.path.join("cgroup.procs");
            for pid in from.members()? {
                match fs::write(&path, &pid) {
                    // The process has ended.
                    Err(err) if err.raw_os_error() == Some(libc::ESRCH) => {}
                    Err(source) => return Err(CgroupError::Write { path, source }),
                    Ok(()) => {}
                }
            }
            break;
        }
        Ok(())
    }

    /// The processes in this cgroup itself. Empty for a threaded one, which has no list.
    fn members(&self) -> Result<Vec<String>, CgroupError> {
        let processes = self.read("cgroup.procs")?.unwrap_or_default();
        Ok(processes.lines().map(str::to_owned).collect())
    }

    /// A recorded cgroup. The record may come from a checkpoint that is not trusted.
    fn below(&self, nested: &NestedCgroup) -> Result<Self, CgroupError> {
        let is_name = |name: &str| {
            (1..=MAX_NAME).contains(&name.len())
                && ![".", ".."].contains(&name)
                && !name.contains(['\0', '\n'])
        };
        if !nested.path.is_empty() && !nested.path.split('/').all(is_name) {
            return Err(CgroupError::Name { path: PathBuf::from(nested.path.escape_debug().to_string()) });
        }
        Ok(Self { path: self.path.join(&nested.path) })
    }
}

/// The files of a cgroup that belong to other users than root.
fn owners(dir: &Path) -> Result<Vec<CgroupFileOwner>, CgroupError> {
    let mut owners = Vec::new();
    for name in DELEGATED {
        let path = dir.join(name);
        match fs::metadata(&path) {
            Ok(status) if (status.uid(), status.gid()) != (0, 0) => owners.push(CgroupFileOwner {
                name: name.to_owned(),
                uid: status.uid(),
                gid: status.gid(),
                ..Default::default()
            }),
            Err(source) if !is_gone(&source) => return Err(CgroupError::Read { path, source }),
            _ => {}
        }
    }
    Ok(owners)
}

fn checked_owner(owner: &CgroupFileOwner) -> Result<&str, CgroupError> {
    let name = DELEGATED.into_iter().find(|name| *name == owner.name);
    name.ok_or_else(|| CgroupError::FileName { name: owner.name.chars().take(64).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(path: &str) -> NestedCgroup {
        NestedCgroup { path: path.to_owned(), ..Default::default() }
    }

    #[test]
    fn a_recorded_cgroup_is_below_the_containers() {
        let cgroup = Cgroup::new(Path::new("/machinen/c1"));
        for path in ["", "a", "a/b", "system.slice/x\\x2dy.service", "a.b:c@d"] {
            assert!(cgroup.below(&nested(path)).unwrap().path.starts_with(cgroup.path()), "{path}");
        }
        for path in ["/", "/etc", "..", "a/..", "a//b", "./a", "a/", "a\nb", "a\0"] {
            assert!(matches!(cgroup.below(&nested(path)), Err(CgroupError::Name { .. })), "{path:?}");
        }
        assert!(cgroup.below(&nested(&"x".repeat(MAX_NAME + 1))).is_err());
    }

    #[test]
    fn only_settings_are_set() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup { path: dir.path().to_owned() };
        for name in ["cgroup.procs", "cgroup.kill", "memory.reclaim", "../x", "x.y"] {
            let mut nested = nested("");
            nested.settings.push(CgroupFile {
                name: name.to_owned(),
                content: "1".to_owned(),
                ..Default::default()
            });
            let limited = cgroup.apply_limits(&[nested]);
            assert!(matches!(limited, Err(CgroupError::FileName { .. })), "{name}: {limited:?}");
        }
        let owner = CgroupFileOwner { name: "../../etc".to_owned(), ..Default::default() };
        assert!(checked_owner(&owner).is_err());
    }

    /// A directory of plain files stands in for a cgroup.
    #[test]
    fn what_is_not_the_default_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &str| fs::write(dir.path().join(name), content).unwrap();
        fs::create_dir(dir.path().join("work")).unwrap();
        write("pids.max", "7\n");
        write("memory.max", "max\n");
        write("cgroup.freeze", "1\n");
        write("cgroup.subtree_control", "memory pids\n");
        write("work/memory.max", "67108864\n");
        write("work/pids.max", "max\n");
        write("work/cpu.weight", "0\n");
        write("work/cpu.idle", "1\n");
        write("work/io.weight", "default 200\n8:0 300\n");
        write("work/cgroup.type", "domain threaded\n");
        write("work/cgroup.freeze", "1\n");
        let cgroup = Cgroup { path: dir.path().to_owned() };
        // The container's own cgroup does not count.
        assert_eq!(cgroup.frozen_below().unwrap().as_deref(), Some(Path::new("work")));
        let recorded = cgroup.record(&["pids.max"]).unwrap();
        let text: Vec<String> = recorded
            .iter()
            .flat_map(|nested| {
                nested.settings.iter().map(|file| format!("{}/{}={}", nested.path, file.name, file.content))
            })
            .collect();
        assert_eq!(
            text,
            [
                "/cgroup.subtree_control=memory pids",
                "work/cpu.idle=1",
                "work/io.weight=default 200",
                "work/memory.max=67108864",
                "work/cgroup.freeze=1",
            ]
        );
    }

    #[test]
    fn more_than_a_checkpoint_keeps_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..MAX_NESTED {
            fs::create_dir(dir.path().join(n.to_string())).unwrap();
        }
        let cgroup = Cgroup { path: dir.path().to_owned() };
        assert!(matches!(cgroup.record(&[]), Err(CgroupError::TooManyNested { .. })));
        let many = vec![nested("a"); MAX_NESTED + 1];
        assert!(matches!(cgroup.make(&many), Err(CgroupError::TooManyNested { .. })));
    }
}
