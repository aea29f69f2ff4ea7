//! The control groups that a process is in, in every hierarchy that the host has mounted (cgroups(7)).
//!
//! A host has one hierarchy (version 2), several (version 1), or both (hybrid). A process is in one group of each
//! hierarchy, and a group is a directory of it.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use crate::fs::{FileError, if_exists};

/// The file of a group that lists its processes, and that moves a process when its pid is written.
const PROCS: &str = "cgroup.procs";

const MOUNTS: &str = "/proc/self/mountinfo";

/// A hierarchy that is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupHierarchy {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// The group that is visible at the mount, `/` unless it is a part of a hierarchy.
    root: PathBuf,
    /// The mount options. Version 1 names the controllers there.
    options: Vec<String>,
    /// Whether it is the hierarchy of version 2.
    pub unified: bool,
}

impl CgroupHierarchy {
    /// Whether it has this controller of version 1.
    pub fn has_v1_controller(&self, name: &str) -> bool {
        !self.unified && self.options.iter().any(|option| option == name)
    }

    fn parse(line: &str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let (root, mount) = (before.next()?, before.next()?);
        let mut after = after.split(' ');
        let unified = match after.next()? {
            "cgroup" => false,
            "cgroup2" => true,
            _ => return None,
        };
        let options = after.nth(1).unwrap_or_default().split(',').map(str::to_owned).collect();
        Some(Self { mount: mount.into(), root: root.into(), options, unified })
    }

    /// The directory of a group that /proc/PID/cgroup names, in one of its lines.
    fn directory(&self, line: &str) -> Option<PathBuf> {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, group) = (fields.next()?, fields.next()?);
        let fits = match controllers {
            "" => self.unified,
            names => names.split(',').all(|name| self.has_v1_controller(name)),
        };
        let below = Path::new(group).strip_prefix(&self.root).ok()?;
        fits.then(|| self.mount.join(below))
    }
}

/// The hierarchies that are mounted, each once.
///
/// # Errors
/// The mount table cannot be read.
pub fn hierarchies() -> Result<Vec<CgroupHierarchy>, FileError> {
    let table = fs::read_to_string(MOUNTS).map_err(FileError::at("read", MOUNTS))?;
    Ok(parse_hierarchies(&table))
}

fn parse_hierarchies(table: &str) -> Vec<CgroupHierarchy> {
    let mut found: Vec<CgroupHierarchy> = Vec::new();
    for hierarchy in table.lines().filter_map(CgroupHierarchy::parse) {
        let same = |other: &CgroupHierarchy| {
            other.unified == hierarchy.unified && (other.unified || other.options == hierarchy.options)
        };
        if !found.iter().any(same) {
            found.push(hierarchy);
        }
    }
    found
}

/// The directories of the groups that the process `pid` is in.
///
/// # Errors
/// The process does not exist, or the mount table cannot be read.
pub fn of_process(pid: u32) -> Result<Vec<PathBuf>, FileError> {
    let hierarchies = hierarchies()?;
    let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let text = fs::read_to_string(&path).map_err(FileError::at("read", path))?;
    let of_line = |line| hierarchies.iter().find_map(|hierarchy| hierarchy.directory(line));
    Ok(text.lines().filter_map(of_line).collect())
}

/// Moves the process `pid`, with all of its threads, to the groups with these directories. A process that has ended is
/// left out.
///
/// # Errors
/// The kernel refuses, or a group does not exist. The process may be in some of the groups then.
pub fn enter(groups: &[PathBuf], pid: u32) -> Result<(), FileError> {
    for group in groups {
        let procs = group.join(PROCS);
        match fs::write(&procs, pid.to_string()) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
            result => result.map_err(FileError::at("move a process by", procs))?,
        }
    }
    Ok(())
}

/// Opens the file that moves a process to the group with this directory when that process writes `0` to it.
pub(crate) fn open_for_entry(group: &Path) -> io::Result<OwnedFd> {
    fs::File::options().write(true).open(group.join(PROCS)).map(OwnedFd::from)
}

/// The processes of the group with this directory; none if the group does not exist. Groups below it are left out.
///
/// # Errors
/// The list cannot be read.
pub fn members(group: &Path) -> Result<Vec<u32>, FileError> {
    let procs = group.join(PROCS);
    let text = match if_exists(fs::read_to_string(&procs)) {
        // A group that is being removed.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => None,
        result => result.map_err(FileError::at("read", &procs))?,
    };
    Ok(text.unwrap_or_default().lines().filter_map(|line| line.parse().ok()).filter(|&pid| pid > 0).collect())
}

/// Removes the group with this directory. Returns false if the group does not exist or is in use.
///
/// # Errors
/// Those of rmdir(2), but for ENOENT and EBUSY.
pub fn remove_if_empty(group: &Path) -> io::Result<bool> {
    match fs::remove_dir(group) {
        Ok(()) => Ok(true),
        Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::ResourceBusy].contains(&error.kind()) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 24 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
32 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 30 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
34 30 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
35 30 0:29 / /elsewhere/memory rw - cgroup cgroup rw,memory
";

    #[test]
    fn groups_are_found_in_every_hierarchy() {
        let hierarchies = parse_hierarchies(HYBRID);
        assert_eq!(hierarchies.len(), 4);
        assert!(hierarchies[0].has_v1_controller("cpuacct") && !hierarchies[3].has_v1_controller("cpu"));
        let directory = |line| hierarchies.iter().find_map(|hierarchy| hierarchy.directory(line));
        for (line, expected) in [
            ("5:cpu,cpuacct:/a/b", Some("/sys/fs/cgroup/cpu,cpuacct/a/b")),
            ("4:memory:/", Some("/sys/fs/cgroup/memory")),
            ("3:name=systemd:/x:y", Some("/sys/fs/cgroup/systemd/x:y")),
            ("0::/u", Some("/sys/fs/cgroup/unified/u")),
            ("9:pids:/a", None),
            ("nonsense", None),
        ] {
            assert_eq!(directory(line).as_deref(), expected.map(Path::new), "{line}");
        }
    }

    #[test]
    fn a_part_of_a_hierarchy_shows_only_its_groups() {
        let hierarchy = CgroupHierarchy::parse("9 8 0:1 /pods /cg rw - cgroup2 cgroup rw").unwrap();
        assert_eq!(hierarchy.directory("0::/pods/a"), Some("/cg/a".into()));
        assert_eq!(hierarchy.directory("0::/other/a"), None);
    }

    #[test]
    fn this_process_is_a_member_of_its_groups() {
        let own = std::process::id();
        let groups = of_process(own).unwrap();
        assert!(groups.iter().all(|group| members(group).unwrap().contains(&own)), "{groups:?}");
        // A process that has ended is no error, and neither is a group that is gone.
        enter(&groups, 0x7fff_fff0).unwrap();
        assert_eq!(members(Path::new("/sys/fs/cgroup/nowhere/at/all")).unwrap(), Vec::<u32>::new());
        assert!(!remove_if_empty(Path::new("/sys/fs/cgroup/nowhere/at/all")).unwrap());
    }
}
