//! Finds the containers of this host, for every client: containerd and Docker by its shims, Podman and CRI-O by the state
//! of the OCI command line, and those of `machinen run` and `boot`.
//!
//! ```text
//!   /proc: shims, monitors ─┬─> bundles with an address ─┐
//!   default directories ────┴─> ROOTs with state.json ───┴─> sockets ──Describe──> containers, VM
//!                                                                 containerd's API: image, name, lineage
//! ```
//! No address has to be given, and nothing is waited for longer than [`PATIENCE`]: a pod that does not answer is listed
//! with what its files say of it.

mod containerd;
mod error;
mod manager;
mod oci;
mod pod;
mod process;
mod shims;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Serialize;

pub(crate) use self::{
    containerd::FORKED_FROM,
    error::FindError,
    manager::ManagersVerb,
    oci::{IMAGE, writer_of_log},
    pod::PodClient,
    process::{MemoryUse, age_of, memory_of},
};
use crate::oci::GlobalArgs;

/// How long a pod, or containerd, may take to answer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// Who has made a container, and manages it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ContainerOwner {
    Containerd,
    Docker,
    Podman,
    #[serde(rename = "cri-o")]
    Crio,
    /// `machinen run` or `machinen boot`, or another caller of the OCI command line.
    Machinen,
}

impl ContainerOwner {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Docker => "docker",
            Self::Podman => "podman",
            Self::Crio => "cri-o",
            Self::Machinen => "machinen",
        }
    }
}

/// The VM of a container, as its owner describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FoundVm {
    /// QEMU's pid.
    pub(crate) pid: u32,
    pub(crate) memory_mib: u32,
    pub(crate) vcpus: u32,
}

/// Where a pod's owner listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PodSocket(pub(crate) PathBuf);

/// A container of this host.
#[derive(Debug, Clone)]
pub(crate) struct FoundContainer {
    pub(crate) id: String,
    pub(crate) name: Option<String>,
    pub(crate) owner: ContainerOwner,
    /// containerd's namespace.
    pub(crate) namespace: Option<String>,
    /// Where that containerd listens.
    pub(crate) containerd: Option<PathBuf>,
    pub(crate) image: Option<String>,
    /// A state of the runtime-spec, `paused`, or `lost` if its owner's process is gone or does not answer.
    pub(crate) status: String,
    /// The process that stands for the container on the host; 0 if there is none.
    pub(crate) pid: u32,
    pub(crate) bundle: PathBuf,
    pub(crate) socket: PodSocket,
    pub(crate) vm: Option<FoundVm>,
    pub(crate) forked_from: Option<String>,
    /// The directory of the OCI command line's state in which the container is.
    pub(crate) root: Option<PathBuf>,
    /// The file to which its output is written, if its manager has one.
    pub(crate) log: Option<PathBuf>,
    /// Why less is known than usual.
    pub(crate) problem: Option<String>,
}

/// All containers of this host, in the order of owners, namespaces and ids.
///
/// # Errors
/// /proc or a directory of containers cannot be read.
pub(crate) async fn all(global: &GlobalArgs) -> Result<Vec<FoundContainer>, FindError> {
    let processes = process::all()?;
    let mut found = shims::containers(&processes).await?;
    containerd::complete(&mut found).await;
    found.extend(oci::containers(global, &processes).await?);
    found.sort_by(|a, b| (a.owner, &a.namespace, &a.id).cmp(&(b.owner, &b.namespace, &b.id)));
    Ok(found)
}

/// The directories with the state of the OCI command line.
///
/// # Errors
/// /proc cannot be read.
pub(crate) fn roots(global: &GlobalArgs) -> Result<Vec<PathBuf>, FindError> {
    Ok(oci::roots(global, &process::all()?).into_iter().collect())
}

/// The container that a user means by `name`: its id, its name, NAMESPACE/ID, or the beginning of one id.
///
/// # Errors
/// There is none, or several could be meant.
pub(crate) async fn one(global: &GlobalArgs, name: &str) -> Result<FoundContainer, FindError> {
    choose(all(global).await?, name, &global.root)
}

/// Of several with the name, the one in the directory `root` is meant, which the other verbs would take.
fn choose(all: Vec<FoundContainer>, name: &str, root: &Path) -> Result<FoundContainer, FindError> {
    let full = |container: &FoundContainer| match &container.namespace {
        Some(namespace) => format!("{namespace}/{}", container.id),
        None => container.id.clone(),
    };
    let is_named = |container: &FoundContainer| {
        container.id == name || container.name.as_deref() == Some(name) || full(container) == name
    };
    let exact: Vec<_> = all.iter().filter(|container| is_named(container)).collect();
    let own: Vec<_> = exact.iter().copied().filter(|found| found.root.as_deref() == Some(root)).collect();
    let exact = if own.len() == 1 { own } else { exact };
    let begins = |container: &&FoundContainer| !name.is_empty() && container.id.starts_with(name);
    let meant = if exact.is_empty() { all.iter().filter(begins).collect() } else { exact };
    match meant.as_slice() {
        [] => Err(FindError::NoContainer { name: name.to_owned() }),
        [one] => Ok((*one).clone()),
        several => Err(FindError::Ambiguous {
            name: name.to_owned(),
            candidates: several.iter().map(|container| full(container)).collect::<Vec<_>>().join(", "),
        }),
    }
}

#[cfg(test)]
pub(crate) fn example(id: &str, name: Option<&str>, namespace: Option<&str>) -> FoundContainer {
    FoundContainer {
        id: id.to_owned(),
        name: name.map(str::to_owned),
        owner: ContainerOwner::Machinen,
        namespace: namespace.map(str::to_owned),
        containerd: None,
        image: None,
        status: "running".to_owned(),
        pid: 0,
        bundle: PathBuf::new(),
        socket: PodSocket(PathBuf::new()),
        vm: None,
        forked_from: None,
        root: None,
        log: None,
        problem: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_meant_by_its_id_its_name_or_the_beginning_of_its_id() {
        let all = || {
            vec![
                example("abc1", Some("web"), None),
                example("abc2", None, Some("k8s.io")),
                example("web2", None, Some("default")),
                example("web2", None, Some("other")),
            ]
        };
        let id =
            |name| choose(all(), name, "/root".as_ref()).map(|container| (container.id, container.namespace));
        assert_eq!(id("web").unwrap().0, "abc1");
        assert_eq!(id("abc2").unwrap().0, "abc2");
        assert_eq!(id("other/web2").unwrap().1.as_deref(), Some("other"));
        assert!(matches!(id("none"), Err(FindError::NoContainer { .. })));
        assert!(matches!(id(""), Err(FindError::NoContainer { .. })));
        let error = id("web2").unwrap_err().to_string();
        assert!(error.contains("default/web2, other/web2"), "{error}");
        assert!(matches!(id("ab"), Err(FindError::Ambiguous { .. })));
        let mut all = all();
        all[3].root = Some("/root".into());
        assert_eq!(choose(all, "web2", "/root".as_ref()).unwrap().namespace.as_deref(), Some("other"));
    }
}
