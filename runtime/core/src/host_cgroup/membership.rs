//! Which processes are in a pod's cgroup: how this process enters it with all of its children, and leaves it again.
//!
//! Children inherit the group of their parent, and those that were started before, or meanwhile, are moved. This process
//! returns to the groups that it came from when the pod has ended, because a group that has processes cannot be removed. libcgroups
//! makes the groups and moves processes to them. It does not remove them, since its removal kills every process that it
//! finds; here only groups that are empty are removed.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager as _, CgroupSetup, ControllerOpt, create_cgroup_manager,
    get_cgroup_setup,
};
use machinen_base::{
    cgroup::{self, CgroupHierarchy},
    error::chain,
    fs::{FileError, if_exists, remove_if_exists},
    process,
};
use nix::unistd::getsid;
use nix_of_libcgroups::unistd::Pid;
use oci_spec::runtime::LinuxResources;

use super::{
    HostCgroupError,
    limits::PERIOD,
    path::CgroupPath,
    scope::{self, ScopeError},
};

/// File in the bundle with the directory of the pod's cgroup, for the time after the shim was killed.
const RECORD: &str = "host-cgroup";

/// How long processes that have been killed may take to leave the group.
const END_DEADLINE: Duration = Duration::from_secs(2);

/// A cgroup that this process is in, with its children.
pub(super) struct JoinedCgroup {
    path: CgroupPath,
    /// Its directories, one for each hierarchy.
    groups: Vec<PathBuf>,
    /// The groups that this process came from.
    home: Vec<PathBuf>,
    state_dir: PathBuf,
    /// The name of the scope, if systemd has made the group.
    scope: Option<String>,
    /// Kills of the host's kernel that the group had counted before.
    kills_before: u64,
}

impl fmt::Debug for JoinedCgroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinedCgroup").field("path", &self.path).finish_non_exhaustive()
    }
}

impl JoinedCgroup {
    /// Moves this process and its children to the group `wanted`, which is created if it is missing. If another pod is
    /// in that group, this one gets another group next to it, named after `id`.
    ///
    /// Blocks, for some 10 ms: the kernel waits until no process is being forked.
    pub(super) fn enter(wanted: &CgroupPath, id: &str, state_dir: &Path) -> Result<Self, HostCgroupError> {
        let own = std::process::id();
        let home = cgroup::of_process(own)?;
        let path = match is_occupied(wanted)? {
            false => wanted.clone(),
            true => {
                let path = wanted.beside(id);
                tracing::warn!(
                    id,
                    "the cgroup {wanted} of the host has other processes: using {path} instead"
                );
                path
            }
        };
        // This process would stop there, and could not even be killed.
        if let Some(group) = frozen(&path)? {
            return Err(HostCgroupError::Frozen { group });
        }
        let record = state_dir.join(RECORD);
        let directory = path.directory().into_os_string();
        fs::write(&record, directory.as_encoded_bytes()).map_err(FileError::at("write", record))?;
        let mut joined = Self {
            path,
            groups: Vec::new(),
            home,
            state_dir: state_dir.to_owned(),
            scope: None,
            kills_before: 0,
        };
        match joined.enter_with_children(own) {
            Ok(()) => Ok(joined),
            Err(error) => {
                joined.groups = directories(&joined.path)?;
                if let Err(error) = joined.leave() {
                    tracing::warn!(id, "{}", chain(&error));
                }
                Err(error)
            }
        }
    }

    fn enter_with_children(&mut self, own: u32) -> Result<(), HostCgroupError> {
        self.scope = self.add(own)?;
        let groups = cgroup::of_process(own)?;
        self.groups = groups.into_iter().filter(|group| !self.home.contains(group)).collect();
        children().into_iter().try_for_each(|pid| cgroup::enter(&self.groups, pid))?;
        self.kills_before = self.kills();
        Ok(())
    }

    /// Moves a process to the group, which is made if it is missing. Returns the name of the scope that systemd has made.
    fn add(&self, pid: u32) -> Result<Option<String>, HostCgroupError> {
        if let Some((unit, slice)) = self.path.unit() {
            if is_unified() && scope::is_available() {
                match scope::start(&unit, slice, pid) {
                    Ok(()) => return Ok(Some(unit)),
                    Err(error @ ScopeError::Connect(_)) => {
                        tracing::warn!("the scope {} is a plain directory: {}", self.path, chain(&error));
                    }
                    Err(error) => return Err(self.refused(error)),
                }
            } else {
                tracing::info!(
                    "the scope {} is a plain directory: the host has no systemd, or cgroup v1",
                    self.path
                );
            }
        }
        let add = |manager: AnyCgroupManager| manager.add_task(Pid::from_raw(pid.cast_signed()));
        add(manager(&self.path, &self.path.directory())?)
            .map_err(|source| HostCgroupError::Enter { path: self.path.to_string(), source })?;
        Ok(None)
    }

    fn refused(&self, source: ScopeError) -> HostCgroupError {
        HostCgroupError::Scope { path: self.path.to_string(), source }
    }

    /// Sets limits of the group. Those that are not given stay as they are.
    pub(super) fn apply(&self, resources: &LinuxResources) -> Result<(), HostCgroupError> {
        let mut resources = resources.clone();
        let most = self.groups.iter().find_map(|group| largest_quota(group));
        if let (Some(cpu), Some(most)) = (resources.cpu_mut(), most)
            && cpu.quota().is_some_and(|quota| quota > most)
        {
            cpu.set_quota(Some(most));
        }
        let resources = &resources;
        let options =
            ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
        manager(&self.path, &self.directory()?)?
            .apply(&options)
            .map_err(|source| HostCgroupError::Limit { path: self.path.to_string(), source })?;
        let Some(unit) = &self.scope else { return Ok(()) };
        let weight = self.read_any(&["cpu.weight"]).and_then(|text| text.trim().parse().ok());
        scope::limit(unit, resources, weight).map_err(|source| self.refused(source))
    }

    /// The group, counted from the root of its hierarchy. A systemd that is in a container has its slices in a group of its own.
    fn directory(&self) -> Result<PathBuf, HostCgroupError> {
        let [group] = self.groups.as_slice() else { return Ok(self.path.directory()) };
        let hierarchies = cgroup::hierarchies()?;
        let below = hierarchies.iter().find_map(|hierarchy| group.strip_prefix(&hierarchy.mount).ok());
        Ok(below.map_or_else(|| self.path.directory(), |below| Path::new("/").join(below)))
    }

    /// The groups that this process came from.
    pub(super) fn home(&self) -> &[PathBuf] {
        &self.home
    }

    pub(super) fn path(&self) -> &CgroupPath {
        &self.path
    }

    /// Processes of the group that the host's kernel has killed for lack of memory, while this process was in it.
    pub(super) fn kills_since_entry(&self) -> u64 {
        self.kills().saturating_sub(self.kills_before)
    }

    fn kills(&self) -> u64 {
        let files = ["memory.events", "memory.oom_control"];
        self.read_any(&files).and_then(|text| field(&text, "oom_kill")).unwrap_or(0)
    }

    /// Memory of the group that the kernel cannot take back without killing or swapping, bytes.
    pub(super) fn pinned_memory(&self) -> Option<u64> {
        let used = self.read_any(&["memory.current", "memory.usage_in_bytes"])?.trim().parse::<u64>().ok()?;
        let stat = self.read_any(&["memory.stat"])?;
        let files = ["inactive_file", "active_file"].into_iter().filter_map(|name| field(&stat, name)).sum();
        Some(used.saturating_sub(files))
    }

    fn read_any(&self, names: &[&str]) -> Option<String> {
        let paths = self.groups.iter().flat_map(|group| names.iter().map(move |name| group.join(name)));
        paths.into_iter().find_map(|path| fs::read_to_string(path).ok())
    }

    /// Moves this process and its children to where this process came from, and removes the group if no process is left
    /// in it. Blocks.
    pub(super) fn leave(self) -> Result<(), HostCgroupError> {
        let own = std::process::id();
        cgroup::enter(&self.home, own)?;
        let mut members = members(&self.groups)?;
        if !members.is_empty() {
            // Tools that a failed start has left running, and logging programs that read to the end.
            let children = children();
            members.retain(|pid| children.contains(pid));
            members.iter().try_for_each(|&pid| cgroup::enter(&self.home, pid))?;
        }
        remove_groups(&self.groups)?;
        if let Some(unit) = &self.scope {
            // Else the next pod of this name would find the scope, until systemd has noticed that the scope is empty.
            scope::stop(unit).map_err(|source| self.refused(source))?;
        }
        let record = self.state_dir.join(RECORD);
        remove_if_exists(&record).map_err(FileError::at("remove", record))?;
        Ok(())
    }
}

/// Removes the cgroup of a pod whose shim was killed, by the record in its directory, once the pod's processes have ended.
/// Blocks for at most two seconds.
///
/// # Errors
/// Processes are still in the cgroup, or it cannot be removed.
pub fn remove_abandoned(state_dir: &Path) -> Result<(), HostCgroupError> {
    let record = state_dir.join(RECORD);
    let text = if_exists(fs::read_to_string(&record)).map_err(FileError::at("read", &record))?;
    // The record of a shim that was killed while it wrote the record is empty; there is no group then.
    if let Some(path) = text.filter(|text| !text.is_empty())
        && let Ok(path) = CgroupPath::parse(Path::new(&path))
    {
        remove_groups(&directories(&path)?)?;
    }
    remove_if_exists(&record).map_err(FileError::at("remove", record))?;
    Ok(())
}

/// The processes that this one has started and that end with it. Members of the warm pool and builders of templates, which
/// outlive it, have sessions of their own.
fn children() -> Vec<u32> {
    let session = |pid: u32| getsid(Some(nix::unistd::Pid::from_raw(pid.cast_signed())));
    let own = session(std::process::id());
    process::descendants()
        .into_iter()
        .filter(|&pid| session(pid) == own || process::is_own_twin(pid))
        .collect()
}

fn remove_groups(groups: &[PathBuf]) -> Result<(), HostCgroupError> {
    let members = members(groups)?;
    process::await_ends(&members, END_DEADLINE)
        .map_err(FileError::at("wait for the processes of", groups.first().cloned().unwrap_or_default()))?;
    for group in groups {
        cgroup::remove_if_empty(group).map_err(FileError::at("remove", group))?;
        if group.exists() {
            let pids = cgroup::members(group)?;
            return Err(HostCgroupError::InUse { group: group.clone(), pids });
        }
    }
    Ok(())
}

fn members(groups: &[PathBuf]) -> Result<Vec<u32>, FileError> {
    let mut pids = Vec::new();
    for group in groups {
        pids.extend(cgroup::members(group)?);
    }
    pids.sort_unstable();
    pids.dedup();
    Ok(pids)
}

/// Where the group is, in each hierarchy.
fn directories(path: &CgroupPath) -> Result<Vec<PathBuf>, FileError> {
    let path = path.directory();
    let below = path.strip_prefix("/").unwrap_or(&path);
    let of = |hierarchy: &CgroupHierarchy| hierarchy.mount.join(below);
    Ok(cgroup::hierarchies()?.iter().map(of).filter(|group| group.is_dir()).collect())
}

/// The most CPU time in each period of [`PERIOD`] that a group of version 1 can have: that of the nearest group above which has
/// a quota. The kernel refuses more, and the allowance for the VM may be more.
fn largest_quota(group: &Path) -> Option<i64> {
    group.ancestors().skip(1).find_map(|above| {
        let number = |name: &str| fs::read_to_string(above.join(name)).ok()?.trim().parse::<i64>().ok();
        let (quota, period) = (number("cpu.cfs_quota_us")?, number("cpu.cfs_period_us")?);
        let most = i128::from(quota) * i128::from(PERIOD) / i128::from(period.max(1));
        (quota > 0).then(|| i64::try_from(most).unwrap_or(i64::MAX))
    })
}

/// The group, or the nearest one above it that exists, in a hierarchy in which it is frozen.
fn frozen(path: &CgroupPath) -> Result<Option<PathBuf>, FileError> {
    let path = path.directory();
    let below = path.strip_prefix("/").unwrap_or(&path);
    let nearest = |hierarchy: &CgroupHierarchy| {
        let groups = below.ancestors().map(|group| hierarchy.mount.join(group));
        groups.into_iter().find(|group| group.is_dir())
    };
    Ok(cgroup::hierarchies()?.iter().filter_map(nearest).find(|group| is_frozen(group)))
}

/// Both files say so for a group below a frozen one, too. The root of a hierarchy has neither.
fn is_frozen(group: &Path) -> bool {
    let read = |name: &str| fs::read_to_string(group.join(name)).unwrap_or_default();
    let (v1, v2) = (read("freezer.state"), read("cgroup.events"));
    ["FROZEN", "FREEZING"].contains(&v1.trim()) || field(&v2, "frozen") == Some(1)
}

fn is_occupied(path: &CgroupPath) -> Result<bool, FileError> {
    Ok(!members(&directories(path)?)?.is_empty())
}

fn is_unified() -> bool {
    matches!(get_cgroup_setup(), Ok(CgroupSetup::Unified))
}

/// libcgroups' code for the group `path`, which is in `directory`, counted from the root of each hierarchy.
fn manager(path: &CgroupPath, directory: &Path) -> Result<AnyCgroupManager, HostCgroupError> {
    let config = CgroupConfig {
        cgroup_path: directory.to_owned(),
        systemd_cgroup: false,
        container_name: "machinen".to_owned(),
    };
    create_cgroup_manager(config).map_err(|source| HostCgroupError::Setup { path: path.to_string(), source })
}

/// The number in the line `NAME NUMBER`.
fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(key, _)| *key == name).and_then(|(_, value)| value.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_by_their_whole_name() {
        let text = "low 0\noom 4\noom_kill 3\noom_group_kill 9\n";
        assert_eq!((field(text, "oom_kill"), field(text, "oom_ki")), (Some(3), None));
        assert_eq!(field("oom_kill_disable 0\nunder_oom 0\noom_kill 1", "oom_kill"), Some(1));
    }

    #[test]
    fn a_quota_is_bounded_by_the_nearest_one_above() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, quota: &str, period: &str| {
            let group = dir.path().join(name);
            fs::create_dir_all(&group).unwrap();
            fs::write(group.join("cpu.cfs_quota_us"), quota).unwrap();
            fs::write(group.join("cpu.cfs_period_us"), period).unwrap();
        };
        write("a", "50000\n", "200000\n");
        write("a/b", "-1\n", "100000\n");
        write("a/b/c", "90000\n", "100000\n");
        assert_eq!(largest_quota(&dir.path().join("a/b/c")), Some(25_000));
        assert_eq!(largest_quota(&dir.path().join("a")), None);
    }

    #[test]
    fn a_frozen_group_is_known_in_both_versions() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_frozen(dir.path()));
        for (name, text, expected) in [
            ("freezer.state", "THAWED\n", false),
            ("freezer.state", "FREEZING\n", true),
            ("cgroup.events", "populated 0\nfrozen 0\n", false),
            ("cgroup.events", "populated 0\nfrozen 1\n", true),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
            assert_eq!(is_frozen(dir.path()), expected, "{text}");
            fs::remove_file(dir.path().join(name)).unwrap();
        }
    }

    #[test]
    fn a_bundle_without_a_record_needs_nothing() {
        let bundle = tempfile::tempdir().unwrap();
        remove_abandoned(bundle.path()).unwrap();
        fs::write(bundle.path().join(RECORD), "").unwrap();
        remove_abandoned(bundle.path()).unwrap();
        assert!(!bundle.path().join(RECORD).exists());
        // A group that is gone already.
        fs::write(bundle.path().join(RECORD), "/machinen-test-no-such-group/a").unwrap();
        remove_abandoned(bundle.path()).unwrap();
        assert!(!bundle.path().join(RECORD).exists());
    }
}
