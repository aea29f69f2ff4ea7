//! The containers of containerd and of Docker, by the bundles of their shims.
//!
//! A shim works in its bundle, `STATE/NAMESPACE/ID`, and the files there say where it listens. The other bundles next to
//! it are looked at as well: those of a pod's containers have the address of the pod's shim, and one whose shim was killed
//! is listed as lost.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use machinen::{
    fs::{FileError, if_exists},
    spec::bundle,
};
use machinen_task::api::DescribeResponse;

use super::{
    ContainerOwner, FindError, FoundContainer, FoundVm, PodClient, PodSocket, containerd,
    process::{self, ListedProcess},
};

/// The name of the shim's program.
const SHIM: &str = "containerd-shim-machinen-v1";
/// Where containerd keeps the bundles unless it is configured otherwise.
const DEFAULT_STATE: &str = "/run/containerd/io.containerd.runtime.v2.task";
/// The file in a bundle that names the program of its shim (containerd 1.7 and newer).
const PROGRAM_FILE: &str = "shim-binary-path";
/// The files of the shim: where it listens, and its pid.
const ADDRESS_FILE: &str = "address";
const PID_FILE: &str = "shim.pid";
/// The namespace in which dockerd has its containers.
const DOCKER: &str = "moby";

/// # Errors
/// A directory of bundles cannot be read.
pub(super) async fn containers(processes: &[ListedProcess]) -> Result<Vec<FoundContainer>, FindError> {
    let bundles = bundles(processes)?;
    let mut by_socket: BTreeMap<PodSocket, Vec<PathBuf>> = BTreeMap::new();
    for bundle in bundles {
        if let Some(socket) = socket_of(&bundle) {
            by_socket.entry(socket).or_default().push(bundle);
        }
    }
    // All at once, because each may take its time.
    let asked: Vec<_> = by_socket
        .into_iter()
        .map(|(socket, bundles)| {
            tokio::spawn(async move {
                let pod = async { PodClient::connect(&socket)?.describe().await }.await;
                let more = others(&bundles, &pod);
                let all = bundles.iter().chain(&more);
                all.map(|bundle| container(bundle, &socket, &pod)).collect::<Vec<_>>()
            })
        })
        .collect();
    let mut found = Vec::new();
    for pod in asked {
        found.extend(pod.await.unwrap_or_default());
    }
    Ok(found)
}

/// The bundles of the pod's other containers. Those of a pod by the Sandbox API are in another directory than the sandbox's.
fn others(bundles: &[PathBuf], pod: &Result<DescribeResponse, FindError>) -> Vec<PathBuf> {
    let is_other = |bundle: &PathBuf| {
        let is_same = |other: &PathBuf| other.file_name() == bundle.file_name();
        bundle.is_absolute() && !bundles.iter().any(is_same)
    };
    let described = pod.iter().flat_map(|pod| &pod.containers);
    described.map(|container| PathBuf::from(&container.bundle)).filter(is_other).collect()
}

/// The bundles of our shims.
fn bundles(processes: &[ListedProcess]) -> Result<BTreeSet<PathBuf>, FileError> {
    let mut namespaces: BTreeSet<PathBuf> = dirs(Path::new(DEFAULT_STATE))?.into_iter().collect();
    let mut bundles = BTreeSet::new();
    for shim in processes.iter().filter(|process| process.program == SHIM) {
        let Some(bundle) = process::directory(shim.pid) else { continue };
        let written = fs::read_to_string(bundle.join(PID_FILE)).ok();
        // The children of a shim, such as anchors, have the same program.
        if written.is_some_and(|pid| pid.trim() == shim.pid.to_string()) {
            namespaces.extend(bundle.parent().map(Path::to_owned));
            bundles.insert(bundle);
        }
    }
    let addresses: BTreeSet<_> = bundles.iter().filter_map(|bundle| socket_of(bundle)).collect();
    for namespace in namespaces {
        let is_ours = |bundle: &PathBuf| {
            let program = fs::read_to_string(bundle.join(PROGRAM_FILE)).unwrap_or_default();
            program.trim().ends_with(SHIM) || socket_of(bundle).is_some_and(|it| addresses.contains(&it))
        };
        bundles.extend(dirs(&namespace)?.into_iter().filter(is_ours));
    }
    Ok(bundles)
}

fn dirs(path: &Path) -> Result<Vec<PathBuf>, FileError> {
    let entries = if_exists(fs::read_dir(path)).map_err(FileError::at("list", path))?;
    let paths = entries.into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    Ok(paths.filter(|path| path.is_dir()).collect())
}

fn socket_of(bundle: &Path) -> Option<PodSocket> {
    let address = fs::read_to_string(bundle.join(ADDRESS_FILE)).ok()?;
    address.trim().strip_prefix("unix://").map(|path| PodSocket(path.into()))
}

/// The container of a bundle, from its pod's answer and from its configuration.
fn container(bundle: &Path, socket: &PodSocket, pod: &Result<DescribeResponse, FindError>) -> FoundContainer {
    let name = |path: Option<&Path>| {
        path.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    };
    let (id, namespace) = (name(Some(bundle)), name(bundle.parent()));
    let owner = if namespace == DOCKER { ContainerOwner::Docker } else { ContainerOwner::Containerd };
    let known = pod.as_ref().ok().and_then(|pod| pod.containers.iter().find(|known| known.id == id));
    let vm = pod.as_ref().ok().and_then(found_vm);
    let annotations =
        bundle::load(bundle).ok().and_then(|spec| spec.annotations().clone()).unwrap_or_default();
    let annotation = |key: &str| annotations.get(key).cloned();
    FoundContainer {
        name: annotation("nerdctl/name").or_else(|| annotation("io.kubernetes.cri.container-name")),
        image: annotation("io.kubernetes.cri.image-name"),
        status: known.map_or("lost", |known| known.status.as_str()).to_owned(),
        pid: known.map_or(0, |known| known.pid),
        vm: vm.filter(|_| known.is_some()),
        problem: pod.as_ref().err().map(|error| machinen::error::chain(error)),
        bundle: bundle.to_owned(),
        socket: socket.clone(),
        namespace: Some(namespace),
        containerd: Some(containerd::address(pod.as_ref().map_or("", |pod| pod.containerd.as_str()))),
        forked_from: None,
        root: None,
        log: None,
        id,
        owner,
    }
}

/// The VM in the answer of a pod.
pub(super) fn found_vm(pod: &DescribeResponse) -> Option<FoundVm> {
    let vm = pod.vm.as_ref()?;
    Some(FoundVm { pid: vm.pid, memory_mib: vm.memory_mib, vcpus: vm.vcpus })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(state: &Path, id: &str, program: &str) -> PathBuf {
        let bundle = state.join("ns").join(id);
        fs::create_dir_all(&bundle).unwrap();
        fs::write(bundle.join(ADDRESS_FILE), format!("unix://{}/{id}.sock\n", state.display())).unwrap();
        fs::write(bundle.join(PROGRAM_FILE), program).unwrap();
        bundle
    }

    #[tokio::test]
    async fn a_container_whose_shim_is_gone_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = bundle(dir.path(), "c1", "/usr/bin/containerd-shim-machinen-v1");
        let socket = socket_of(&bundle).unwrap();
        let pod = async { PodClient::connect(&socket)?.describe().await }.await;
        assert!(matches!(pod, Err(FindError::NoOwner { .. })));
        let found = container(&bundle, &socket, &pod);
        assert_eq!((found.id.as_str(), found.namespace.as_deref()), ("c1", Some("ns")));
        assert_eq!((found.status.as_str(), found.pid), ("lost", 0));
        assert!(found.problem.unwrap().contains("nothing listens"));
    }

    #[test]
    fn a_container_elsewhere_is_one_of_the_pod() {
        let described = ["/state/sandboxes/ns/pod", "/state/tasks/ns/main", ""].map(|bundle| {
            machinen_task::api::ContainerInfo { bundle: bundle.to_owned(), ..Default::default() }
        });
        let pod = Ok(DescribeResponse { containers: described.to_vec(), ..Default::default() });
        assert_eq!(
            others(&["/state/sandboxes/ns/pod".into()], &pod),
            [PathBuf::from("/state/tasks/ns/main")]
        );
    }

    #[test]
    fn directories_that_do_not_exist_have_no_bundles() {
        assert_eq!(dirs(Path::new("/no/such/dir")).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(socket_of(Path::new("/no/such/dir")), None);
    }
}
