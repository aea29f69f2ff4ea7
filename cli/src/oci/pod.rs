//! The pod of a container: the monitor that owns its VM, and where that listens.
//!
//! A container has a pod of its own unless its configuration places it in that of another container: by the annotation
//! that names a Kubernetes sandbox (CRI-O, containerd's CRI plugin), or by a namespace of another container's process
//! (`podman pod`, `--ipc container:X`).
//!
//! ```text
//!   ROOT/@pods/pod-XXXXXX/
//!     lock           held while a container enters or leaves the pod
//!     pod.json       the monitor's process
//!     monitor.sock   where the monitor serves the Task API; mode 0600
//!     vm/ poststop/  the files of machinen::pod
//! ```

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use machinen::{
    fs::{FileError, if_exists, lock, remove_dir_if_exists},
    pod::leftovers,
    process::{await_ends, kill_foreign},
};
use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::{
    error::OciError,
    state::{HostProcess, PODS, StateDir, write_json},
};

pub(crate) const SOCKET: &str = "monitor.sock";
const LOCK: &str = "lock";
const RECORD: &str = "pod.json";

/// The annotations that name the sandbox of a container.
const SANDBOX: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];

/// How long a monitor without containers may take to end.
const END_GRACE: Duration = Duration::from_secs(5);
/// How long a monitor may take to end after SIGKILL.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// How long poststop hooks may take that are run for a monitor that was killed.
const HOOKS_DEADLINE: Duration = Duration::from_secs(60);

/// The directory of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct PodDir {
    pub(crate) path: PathBuf,
}

/// What is kept of a pod.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodRecord {
    pub(crate) monitor: HostProcess,
    /// The bundle of the container that the pod was made for.
    pub(crate) bundle: PathBuf,
}

/// Keeps others from entering and leaving a pod until it is dropped.
#[derive(Debug)]
pub(crate) struct PodLock(#[expect(dead_code, reason = "the lock ends with the file")] File);

impl PodDir {
    /// Makes the directory of a new pod.
    ///
    /// # Errors
    /// The file system refuses.
    pub(crate) fn create(root: &Path) -> Result<Self, OciError> {
        let pods = root.join(PODS);
        machinen::fs::create_private_dirs(&pods).map_err(FileError::at("create the directory", &pods))?;
        let made = tempfile::Builder::new().prefix("pod-").tempdir_in(&pods);
        let path = made.map_err(FileError::at("create a directory in", pods))?.keep();
        Ok(Self { path })
    }

    /// The pod of another container in which a container with this configuration belongs, if there is one.
    ///
    /// # Errors
    /// The containers cannot be listed.
    pub(crate) fn of_other(root: &Path, id: &str, spec: &Spec) -> Result<Option<Self>, OciError> {
        let sandbox = spec.annotations().as_ref();
        let sandbox = sandbox.and_then(|all| SANDBOX.iter().find_map(|name| all.get(*name)));
        let processes = processes_of_namespaces(spec);
        let sandbox = sandbox.filter(|sandbox| *sandbox != id);
        if sandbox.is_none() && processes.is_empty() {
            return Ok(None);
        }
        for state in StateDir::all(root)? {
            let Some(record) = state.record()? else { continue };
            let is_namespace = |pid: &u32| HostProcess::of(*pid).is_ok_and(|it| Some(it) == record.stand_in);
            if sandbox == Some(&record.id) || processes.iter().any(is_namespace) {
                return Ok(Some(record.pod));
            }
        }
        Ok(None)
    }

    /// # Errors
    /// The directory does not exist any more, or the file system refuses.
    pub(crate) fn lock(&self) -> Result<PodLock, OciError> {
        let path = self.path.join(LOCK);
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(FileError::at("open", &path))?;
        lock(&file).map_err(FileError::at("lock", &path))?;
        Ok(PodLock(file))
    }

    /// What is kept of the pod; None if its creation has not come that far.
    ///
    /// # Errors
    /// The record cannot be read.
    pub(crate) fn record(&self) -> Result<Option<PodRecord>, OciError> {
        let path = self.path.join(RECORD);
        let text = if_exists(fs::read(&path)).map_err(FileError::at("read", &path))?;
        let Some(text) = text else { return Ok(None) };
        serde_json::from_slice(&text).map(Some).map_err(|source| OciError::Json { path, source })
    }

    /// # Errors
    /// The file system refuses.
    pub(crate) fn save(&self, record: &PodRecord) -> Result<(), OciError> {
        write_json(&self.path, RECORD, record)
    }

    /// Where the monitor listens; the path may be too long for a Unix address.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }

    /// Runs `work` with a path of the monitor's socket that is short enough for a Unix address, whatever the
    /// directory's.
    ///
    /// # Errors
    /// The directory cannot be opened, or `work` fails.
    pub(crate) fn with_socket<T>(&self, work: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir: OwnedFd = rustix::fs::open(&self.path, flags, Mode::empty())?;
        work(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()).as_ref())
    }

    /// Ends the monitor, which has been asked to end if it has no container, and removes what is left of the pod.
    ///
    /// # Errors
    /// The monitor does not end, or files cannot be removed.
    pub(crate) async fn remove(&self) -> Result<(), OciError> {
        if let Some(PodRecord { monitor, bundle }) = self.record()? {
            let failed = || OciError::io("end the process that owns the container's VM");
            if monitor.exists() && !await_ends(&[monitor.pid], END_GRACE).map_err(failed())? {
                kill_foreign(monitor.pid, || monitor.exists(), KILL_DEADLINE).map_err(failed())?;
            }
            let until = Instant::now() + HOOKS_DEADLINE;
            for problem in leftovers::remove(&self.path, &bundle, until).await? {
                eprintln!("machinen: {problem}");
            }
        }
        remove_dir_if_exists(&self.path).map_err(FileError::at("remove", &self.path))?;
        Ok(())
    }
}

/// The pids in the paths of a configuration's namespaces, `/proc/PID/ns/KIND`.
fn processes_of_namespaces(spec: &Spec) -> Vec<u32> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let paths = namespaces.into_iter().flatten().filter_map(|namespace| namespace.path().as_ref());
    let pid = |path: &PathBuf| path.strip_prefix("/proc").ok()?.iter().next()?.to_str()?.parse().ok();
    paths.filter_map(pid).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_namespace_of_a_process_leads_to_that_process() {
        let namespaces = json!([
            { "type": "pid" }, { "type": "ipc", "path": "/proc/17/ns/ipc" },
            { "type": "network", "path": "/run/netns/a" }, { "type": "uts", "path": "/proc/self/ns/uts" },
        ]);
        let spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.2.0", "linux": { "namespaces": namespaces },
        }))
        .unwrap();
        assert_eq!(processes_of_namespaces(&spec), [17]);
    }

    #[test]
    fn a_container_without_relation_to_others_has_a_pod_of_its_own() {
        let root = tempfile::tempdir().unwrap();
        let spec = Spec::default();
        assert_eq!(PodDir::of_other(root.path(), "c", &spec).unwrap(), None);
        let (one, two) = (PodDir::create(root.path()).unwrap(), PodDir::create(root.path()).unwrap());
        assert_ne!(one, two);
        assert!(one.record().unwrap().is_none());
        assert!(StateDir::all(root.path()).unwrap().is_empty());
    }
}
