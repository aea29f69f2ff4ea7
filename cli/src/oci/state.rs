//! The directory of a container: what the verbs know of it without its monitor.
//!
//! ```text
//!   ROOT/ID/state.json   the directory reserves the id; the record is replaced as a whole
//!   ROOT/@pods/          the directories of pods (pod.rs); no id can have this name
//! ```
//! Whether the container runs is not in the record: its monitor is asked, and a container without a monitor has stopped.

use std::{
    collections::HashMap,
    fmt, fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use machinen::{
    fs::{FileError, create_new_private_dir, if_exists, remove_dir_if_exists},
    pod::ContainerId,
};
use serde::{Deserialize, Serialize};

use super::{error::OciError, pod::PodDir};

const RECORD: &str = "state.json";
/// The directory of the pods, which is not a container's.
pub(crate) const PODS: &str = "@pods";

/// The directory of one container.
#[derive(Debug, Clone)]
pub(crate) struct StateDir {
    pub(crate) id: ContainerId,
    pub(crate) path: PathBuf,
}

/// What is kept of a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ContainerRecord {
    pub(crate) oci_version: String,
    pub(crate) id: String,
    /// The process that stands for the container's init. None while the container is being created.
    pub(crate) stand_in: Option<HostProcess>,
    pub(crate) pod: PodDir,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: PathBuf,
    /// RFC 3339.
    pub(crate) created: String,
    pub(crate) owner: String,
    #[serde(default)]
    pub(crate) annotations: HashMap<String, String>,
    /// The bundle was made for this container, and is removed with it.
    #[serde(default)]
    pub(crate) own_bundle: bool,
}

/// A process of the host that cannot be mistaken for a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct HostProcess {
    pub(crate) pid: u32,
    /// In clock ticks after the boot of the host (proc_pid_stat(5), field 22).
    start_time: u64,
}

/// The states of the runtime-spec (runtime.md, "State"), and `paused` as runc calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ContainerStatus {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl fmt::Display for ContainerStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

impl StateDir {
    /// Reserves an id by making its directory.
    ///
    /// # Errors
    /// A container has the id, or the directory cannot be made.
    pub(crate) fn reserve(root: &Path, id: ContainerId) -> Result<Self, OciError> {
        fs::create_dir_all(root).map_err(FileError::at("create the directory", root))?;
        let path = root.join(id.as_str());
        match create_new_private_dir(&path) {
            Ok(()) => Ok(Self { id, path }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(OciError::Exists { id: id.into() })
            }
            Err(error) => Err(FileError::new("create the directory", path, error).into()),
        }
    }

    /// # Errors
    /// There is no container with the id.
    pub(crate) fn find(root: &Path, id: &str) -> Result<Self, OciError> {
        let missing = || OciError::NoContainer { id: id.to_owned() };
        let id = ContainerId::parse(id).map_err(|_| missing())?;
        let path = root.join(id.as_str());
        if path.is_dir() { Ok(Self { id, path }) } else { Err(missing()) }
    }

    /// The directories of all containers, in the order of their ids.
    ///
    /// # Errors
    /// The root directory cannot be read.
    pub(crate) fn all(root: &Path) -> Result<Vec<Self>, OciError> {
        let failed = || FileError::at("list", root);
        let Some(entries) = if_exists(fs::read_dir(root)).map_err(failed())? else { return Ok(Vec::new()) };
        let mut all = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed())?;
            let id = entry.file_name().to_str().and_then(|id| ContainerId::parse(id).ok());
            if let Some(id) = id.filter(|_| entry.path().is_dir()) {
                all.push(Self { id, path: entry.path() });
            }
        }
        all.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(all)
    }

    /// The container's record; None if its creation has not come that far.
    ///
    /// # Errors
    /// The record cannot be read.
    pub(crate) fn record(&self) -> Result<Option<ContainerRecord>, OciError> {
        let path = self.path.join(RECORD);
        let Some(text) = if_exists(fs::read(&path)).map_err(FileError::at("read", &path))? else {
            return Ok(None);
        };
        serde_json::from_slice(&text).map(Some).map_err(|source| OciError::Json { path, source })
    }

    /// Replaces the container's record.
    ///
    /// # Errors
    /// The file system refuses.
    pub(crate) fn save(&self, record: &ContainerRecord) -> Result<(), OciError> {
        write_json(&self.path, RECORD, record)
    }

    /// Removes the directory, which frees the id.
    ///
    /// # Errors
    /// The file system refuses.
    pub(crate) fn remove(&self) -> Result<(), OciError> {
        remove_dir_if_exists(&self.path).map_err(FileError::at("remove", &self.path))?;
        Ok(())
    }
}

/// Replaces a file as a whole.
///
/// # Errors
/// The file system refuses.
pub(crate) fn write_json(dir: &Path, name: &str, value: &impl Serialize) -> Result<(), OciError> {
    let text = serde_json::to_vec(value).map_err(OciError::Encode)?;
    let write = || {
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(&text)?;
        file.persist(dir.join(name)).map(drop).map_err(io::Error::from)
    };
    Ok(write().map_err(FileError::at("write", dir.join(name)))?)
}

impl HostProcess {
    /// # Errors
    /// There is no such process.
    pub(crate) fn of(pid: u32) -> Result<Self, OciError> {
        let start_time = start_time(pid).map_err(FileError::at("read", format!("/proc/{pid}/stat")))?;
        Ok(Self { pid, start_time })
    }

    /// Whether the process exists, possibly as one that has ended and was not waited for.
    pub(crate) fn exists(self) -> bool {
        start_time(self.pid).is_ok_and(|time| time == self.start_time)
    }
}

fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the name, which may contain anything. The third field follows its last parenthesis.
    let field = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(22 - 3));
    field.and_then(|text| text.parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ContainerRecord {
        ContainerRecord {
            oci_version: "1.2.0".to_owned(),
            id: "c1".to_owned(),
            stand_in: None,
            pod: PodDir { path: "/p".into() },
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: "2026-01-01T00:00:00Z".to_owned(),
            owner: "root".to_owned(),
            annotations: HashMap::new(),
            own_bundle: false,
        }
    }

    #[test]
    fn an_id_is_reserved_once_and_free_again_after_its_removal() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().join("deep/root");
        let id = || ContainerId::parse("c1").unwrap();
        let dir = StateDir::reserve(&root, id()).unwrap();
        assert!(matches!(StateDir::reserve(&root, id()), Err(OciError::Exists { .. })));
        assert!(dir.record().unwrap().is_none());
        dir.save(&record()).unwrap();
        dir.save(&record()).unwrap();
        let found = StateDir::find(&root, "c1").unwrap().record().unwrap().unwrap();
        assert_eq!((found.id, found.pod), (record().id, record().pod));
        assert_eq!(StateDir::all(&root).unwrap().len(), 1);
        dir.remove().unwrap();
        assert!(matches!(StateDir::find(&root, "c1"), Err(OciError::NoContainer { .. })));
        StateDir::reserve(&root, id()).unwrap();
    }

    #[test]
    fn another_process_with_the_same_pid_is_not_the_same() {
        let own = HostProcess::of(std::process::id()).unwrap();
        assert!(own.exists());
        assert!(!HostProcess { start_time: own.start_time + 1, ..own }.exists());
        assert!(HostProcess::of(u32::MAX).is_err());
    }

    #[test]
    fn an_id_that_leads_elsewhere_is_no_container() {
        let root = tempfile::tempdir().unwrap();
        for id in ["..", "../x", "", "a/b"] {
            assert!(matches!(StateDir::find(root.path(), id), Err(OciError::NoContainer { .. })), "{id}");
        }
        assert!(StateDir::all(&root.path().join("missing")).unwrap().is_empty());
    }
}
