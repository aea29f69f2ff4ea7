//! The containers of the OCI command line: Podman's, CRI-O's, and those of `machinen run` and `boot`.
//!
//! Their records are in `ROOT/ID` (`--root`). A ROOT is known because it is the default, because the user names it, or
//! because a monitor of one of its pods runs. Podman's names are in the command line of conmon, the parent of the
//! container's stand-in.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use super::{
    ContainerOwner, FindError, FoundContainer, PodClient, PodSocket,
    process::{self, ListedProcess},
    shims::found_vm,
};
use crate::boot::keeper;
use crate::oci::{
    GlobalArgs, MONITOR, default_root,
    state::{ContainerRecord, PODS, StateDir},
};

/// Who has made a container, by an annotation that the maker sets: libpod sets the first, CRI-O the second.
const PODMAN: (&str, &str) = ("io.container.manager", "libpod");
const CRIO: &str = "io.kubernetes.cri-o.ContainerID";
/// What `machinen boot` notes of the image, by a key of the OCI image-spec (annotations.md).
pub(crate) const IMAGE: &str = "org.opencontainers.image.ref.name";

/// # Errors
/// A directory of containers cannot be read.
pub(super) async fn containers(
    global: &GlobalArgs,
    processes: &[ListedProcess],
) -> Result<Vec<FoundContainer>, FindError> {
    let mut found = Vec::new();
    for root in roots(global, processes) {
        for state in StateDir::all(&root)? {
            found.push(container(&root, &state).await);
        }
    }
    Ok(found)
}

pub(super) fn roots(global: &GlobalArgs, processes: &[ListedProcess]) -> BTreeSet<PathBuf> {
    let mut roots = BTreeSet::from([default_root().to_owned(), global.root.clone()]);
    for monitor in processes {
        let [_, name, params, ..] = monitor.args.as_slice() else { continue };
        if name == MONITOR {
            roots.extend(root_of(params));
        }
    }
    roots
}

/// The ROOT of a monitor, from its parameters: the pod's directory is `ROOT/@pods/NAME`.
fn root_of(params: &str) -> Option<PathBuf> {
    let params: serde_json::Value = serde_json::from_str(params).ok()?;
    let pods = Path::new(params["pod"].as_str()?).parent()?;
    pods.ends_with(PODS).then(|| pods.parent().map(Path::to_owned))?
}

async fn container(root: &Path, state: &StateDir) -> FoundContainer {
    let id = state.id.to_string();
    let (record, problem) = match state.record() {
        Ok(record) => (record, None),
        Err(error) => (None, Some(machinen::error::chain(&error))),
    };
    let Some(record) = record else { return unrecorded(root, id, problem) };
    let socket = PodSocket(record.pod.socket());
    let pod = async { PodClient::connect(&socket)?.describe().await }.await;
    let known = pod.as_ref().ok().and_then(|pod| pod.containers.iter().find(|known| known.id == id));
    let status = match (&pod, known) {
        (_, Some(known)) => known.status.as_str(),
        // As for the verbs of an OCI runtime, a container without a monitor has stopped.
        (Err(FindError::NoOwner { .. }) | Ok(_), None) => "stopped",
        (Err(_), None) => "lost",
    };
    let problem = pod.as_ref().err().filter(|_| status == "lost").map(|error| machinen::error::chain(error));
    let stand_in = record.stand_in.filter(|process| process.exists());
    let by_conmon = stand_in.map(|process| conmon(process.pid)).unwrap_or_default();
    let annotation = |key: &str| record.annotations.get(key).cloned();
    FoundContainer {
        name: by_conmon.name.or_else(|| annotation("io.kubernetes.cri-o.ContainerName")),
        owner: owner(&record),
        namespace: None,
        containerd: None,
        image: annotation(IMAGE).or_else(|| annotation("io.kubernetes.cri-o.ImageName")),
        pid: stand_in.filter(|_| known.is_some()).map_or(0, |process| process.pid),
        vm: pod.as_ref().ok().and_then(found_vm).filter(|_| known.is_some()),
        status: status.to_owned(),
        bundle: record.bundle,
        forked_from: None,
        root: Some(root.to_owned()),
        log: by_conmon.log,
        socket,
        problem,
        id,
    }
}

/// The process that writes the log of a container: conmon, or the keeper of `machinen boot --detach`.
pub(crate) fn writer_of_log(container: &FoundContainer) -> Option<u32> {
    if container.log.is_some() {
        return process::parent(container.pid);
    }
    let keeps = |process: &ListedProcess| match process.args.as_slice() {
        [_, name, params, ..] if name == keeper::ENTRY_POINT.name => {
            let params = serde_json::from_str::<serde_json::Value>(params).unwrap_or_default();
            params["bundle"].as_str().is_some_and(|bundle| Path::new(bundle) == container.bundle)
        }
        _ => false,
    };
    process::all().ok()?.into_iter().find(keeps).map(|process| process.pid)
}

/// A container whose creation has not come as far as a record, or whose record cannot be read.
fn unrecorded(root: &Path, id: String, problem: Option<String>) -> FoundContainer {
    FoundContainer {
        name: None,
        owner: ContainerOwner::Machinen,
        namespace: None,
        containerd: None,
        image: None,
        status: if problem.is_some() { "lost" } else { "creating" }.to_owned(),
        pid: 0,
        vm: None,
        bundle: PathBuf::new(),
        socket: PodSocket(PathBuf::new()),
        forked_from: None,
        root: Some(root.to_owned()),
        log: None,
        problem,
        id,
    }
}

fn owner(record: &ContainerRecord) -> ContainerOwner {
    let annotations = &record.annotations;
    match annotations.get(PODMAN.0).is_some_and(|manager| manager == PODMAN.1) {
        true => ContainerOwner::Podman,
        false if annotations.contains_key(CRIO) => ContainerOwner::Crio,
        false => ContainerOwner::Machinen,
    }
}

/// What the command line of conmon says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Conmon {
    name: Option<String>,
    log: Option<PathBuf>,
}

/// What conmon, the parent of a stand-in, says of a container.
fn conmon(stand_in: u32) -> Conmon {
    process::parent(stand_in).map(process::arguments).map(|args| read_conmon(&args)).unwrap_or_default()
}

fn read_conmon(args: &[String]) -> Conmon {
    if !args.first().is_some_and(|program| program.ends_with("conmon")) {
        return Conmon::default();
    }
    let value = |flag: &str| args.iter().position(|arg| arg == flag).and_then(|at| args.get(at + 1));
    let logs = args.iter().zip(args.iter().skip(1)).filter(|(flag, _)| *flag == "-l");
    let log = logs.filter_map(|(_, log)| log.strip_prefix("k8s-file:")).next();
    Conmon { name: value("-n").cloned(), log: log.map(PathBuf::from) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_leads_to_the_directory_of_its_containers() {
        let params = r#"{"id":"c","pod":"/run/x/@pods/pod-1","bundle":"/b","log":{}}"#;
        assert_eq!(root_of(params), Some("/run/x".into()));
        for params in ["", "{}", r#"{"pod":"/run/x/pod-1"}"#] {
            assert_eq!(root_of(params), None, "{params}");
        }
    }

    #[test]
    fn conmon_names_the_container_and_its_log() {
        let line = "/usr/bin/conmon -c 12ab -n web -l journald -l k8s-file:/var/ctr.log --exit-command x";
        let args: Vec<String> = line.split(' ').map(str::to_owned).collect();
        assert_eq!(
            read_conmon(&args),
            Conmon { name: Some("web".to_owned()), log: Some("/var/ctr.log".into()) }
        );
        assert_eq!(read_conmon(&args[1..]), Conmon::default());
    }

    #[tokio::test]
    async fn a_container_that_is_being_created_or_damaged_is_listed() {
        let root = tempfile::tempdir().unwrap();
        let id = |id| machinen::pod::ContainerId::parse(id).unwrap();
        let one = StateDir::reserve(root.path(), id("one")).unwrap();
        assert_eq!(container(root.path(), &one).await.status, "creating");
        std::fs::write(one.path.join("state.json"), "{").unwrap();
        let damaged = container(root.path(), &one).await;
        assert_eq!(damaged.status, "lost");
        assert!(damaged.problem.unwrap().contains("state.json"));
    }
}
