//! What the host's cgroups can limit.

use std::{fmt, fs};

use machinen_base::{
    cgroup::{self, CgroupHierarchy},
    fs::FileError,
};

/// The controllers that a pod's limits need.
const NEEDED: [&str; 4] = ["memory", "cpu", "pids", "cpuset"];

/// The cgroups of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostCgroups {
    /// There are hierarchies of version 1.
    has_v1: bool,
    /// There is a hierarchy of version 2.
    has_v2: bool,
    /// Those of the needed controllers that are there.
    controllers: Vec<&'static str>,
}

impl HostCgroups {
    /// Looks at what is mounted.
    ///
    /// # Errors
    /// The mount table or the list of controllers cannot be read.
    pub fn detect() -> Result<Self, FileError> {
        let hierarchies = cgroup::hierarchies()?;
        let mut v2_controllers = String::new();
        for hierarchy in hierarchies.iter().filter(|hierarchy| hierarchy.unified) {
            let list = hierarchy.mount.join("cgroup.controllers");
            v2_controllers = fs::read_to_string(&list).map_err(FileError::at("read", list))?;
        }
        Ok(Self::of(&hierarchies, &v2_controllers))
    }

    fn of(hierarchies: &[CgroupHierarchy], v2_controllers: &str) -> Self {
        let found = |name: &&str| {
            hierarchies.iter().any(|hierarchy| hierarchy.has_v1_controller(name))
                || v2_controllers.split_whitespace().any(|other| other == *name)
        };
        Self {
            has_v1: hierarchies.iter().any(|hierarchy| !hierarchy.unified),
            has_v2: hierarchies.iter().any(|hierarchy| hierarchy.unified),
            controllers: NEEDED.into_iter().filter(found).collect(),
        }
    }

    /// The controllers that a pod's limits need and the host does not have.
    pub fn missing(&self) -> Vec<&'static str> {
        NEEDED.into_iter().filter(|name| !self.controllers.contains(name)).collect()
    }
}

impl fmt::Display for HostCgroups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = match (self.has_v1, self.has_v2) {
            (true, true) => "v1 and v2 (hybrid)",
            (true, false) => "v1",
            (false, true) => "v2",
            (false, false) => return f.write_str("none is mounted"),
        };
        write!(f, "{version} with {}", self.controllers.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_controllers_are_named() {
        let none = HostCgroups::of(&[], "");
        assert_eq!((none.to_string().as_str(), none.missing().len()), ("none is mounted", 4));
        let v2 = HostCgroups { has_v2: true, ..HostCgroups::of(&[], "cpuset cpu io memory pids") };
        assert_eq!((v2.to_string().as_str(), v2.missing().len()), ("v2 with memory, cpu, pids, cpuset", 0));
        assert_eq!(HostCgroups::of(&[], "memory cpu").missing(), ["pids", "cpuset"]);
    }
}
