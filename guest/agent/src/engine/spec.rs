//! Adapts the host's OCI configuration to libcontainer.
//!
//! Each adaptation is needed because libcontainer differs from runc, or because the container shares the VM's
//! network namespace. The code works on plain JSON: the engine parses the typed form once, and that parser is
//! so large that running it cold takes noticeable time.

use std::{
    collections::HashSet,
    fs,
    path::{Component, Path, PathBuf},
};

use pathrs::Root;
use serde_json::{Value, json};

use super::{
    devices,
    hooks::{self, PreparedHook},
    join::ContainerContext,
    mounts::{self, FileMount, MountPoint, PointInVolume},
    oci::{SpecError, items, mapped, path_value},
    passwd, process,
    request::{Console, CreateRequest},
    seccomp,
};
use crate::{
    cgroup::{self, Instruction},
    container::namespaces::NamespacePath,
};

/// The engine's directory, in the agent's directory of a container.
pub(crate) const DIR: &str = "engine";

/// A container, prepared for the engine; its spec is on disk.
#[derive(Debug)]
pub(crate) struct Prepared {
    request: CreateRequest,
    join_context: ContainerContext,
    cgroup_path: PathBuf,
    memory_limit: Option<i64>,
    read_only_dev: bool,
    owner: u32,
    devices: Vec<Instruction>,
    mount_points: Vec<MountPoint>,
    points_in_volumes: Vec<PointInVolume>,
    volumes: Vec<PathBuf>,
    hooks: Vec<PreparedHook>,
    copied_up: Vec<PathBuf>,
}

impl Prepared {
    /// Reads the host's configuration, adapts it, and writes it to where the engine reads it.
    ///
    /// # Errors
    /// The configuration lacks something that every container needs, or asks for something impossible.
    pub(crate) fn new(
        id: &str,
        dir: &Path,
        rootfs: &Path,
        config: &[u8],
        files: Vec<FileMount>,
        joined: &[NamespacePath],
        terminal: bool,
    ) -> Result<Self, SpecError> {
        let mut spec: Value = serde_json::from_slice(config).map_err(SpecError::Parse)?;
        // The engine must not run them: it knows neither the host's state of the container nor their time.
        let hooks = spec.as_object_mut().ok_or(SpecError::Missing { what: "content" })?.remove("hooks");
        let root = Root::open(rootfs).map_err(SpecError::Rootfs)?;
        let given = section(&mut spec, "process", "process")?;
        process::adapt(given, terminal)?;
        let uid = process::uid(given);
        process::add_home(given, || passwd::home_of(&root, uid));
        let hooks = hooks::prepare(&hooks.unwrap_or_default(), given)?;
        let cwd = given["cwd"].as_str().unwrap_or_default().into();
        let keeps_oom_score = given["oomScoreAdj"].is_null();
        let size = process::console_size(given);
        let linux = section(&mut spec, "linux", "linux section")?;
        if !linux["seccomp"]["listenerPath"].is_null() {
            return Err(SpecError::SeccompListener);
        }
        if let Some(profile) = linux.get_mut("seccomp") {
            seccomp::adapt(profile);
        }
        remove_repeated(linux, "maskedPaths");
        remove_repeated(linux, "readonlyPaths");
        adapt_propagation(linux);
        let cgroup_path = cgroup_path(linux, id)?;
        if let Some(resources) = linux.get_mut("resources") {
            adapt_resources(resources);
        }
        let memory_limit = linux.pointer("/resources/memory/limit").and_then(Value::as_i64);
        let devices = devices::program(linux.pointer("/resources/devices").unwrap_or(&Value::Null))
            .map_err(|number| SpecError::DeviceRule { number })?;
        devices::refuse_missing(linux)?;
        let owner = mapped(&linux["uidMappings"], uid);
        join(linux, joined);
        let shares_network = !has_namespace(linux, "network");
        let has_users = has_namespace(linux, "user");
        if shares_network {
            set_network_sysctls(linux)?;
        }
        let dir = dir.join(DIR);
        make_dir(&dir)?;
        let join_context = ContainerContext::new(linux, rootfs, &cgroup_path, &dir)?;
        section(&mut spec, "root", "root")?["path"] = path_value(rootfs);
        let copied_up = mounts::take_copy_ups(&mut spec)?;
        let read_only_dev = mounts::has_read_only_dev(&spec["mounts"]);
        mounts::refuse_links(&spec["mounts"], &root)?;
        mounts::adapt(&mut spec, &root, shares_network && has_users);
        mounts::add_files(&mut spec, &root, files);
        let mount_points = mounts::mount_points(&spec["mounts"]);
        let points_in_volumes = mounts::points_in_volumes(&spec["mounts"]);
        let volumes = mounts::volumes(&spec["mounts"]);
        let request = CreateRequest {
            id: id.to_owned(),
            bundle: dir.join("bundle"),
            state: dir.join("state"),
            rootfs: rootfs.to_owned(),
            cwd,
            keeps_oom_score,
            console: terminal.then_some(Console { owner, size }),
        };
        write(&request.bundle, &spec)?;
        Ok(Self {
            request,
            join_context,
            cgroup_path,
            memory_limit,
            read_only_dev,
            owner,
            devices,
            mount_points,
            points_in_volumes,
            volumes,
            hooks,
            copied_up,
        })
    }

    pub(super) fn request(&self) -> &CreateRequest {
        &self.request
    }

    /// What the engine needs to run more processes in the container.
    pub(crate) fn join_context(&self) -> &ContainerContext {
        &self.join_context
    }

    /// The directory of the socket on which the init waits for its start.
    pub(super) fn notify_dir(&self) -> PathBuf {
        self.request.state.join(&self.request.id)
    }

    /// Path of the container's cgroup below the hierarchy's root.
    pub(crate) fn cgroup_path(&self) -> &Path {
        &self.cgroup_path
    }

    /// The limit of the container's memory, bytes.
    pub(crate) fn memory_limit(&self) -> Option<i64> {
        self.memory_limit
    }

    /// Whether /dev is a tmpfs that is to be read-only. The engine makes the devices in it, and leaves it writable.
    pub(crate) fn has_read_only_dev(&self) -> bool {
        self.read_only_dev
    }

    /// The root file system.
    pub(crate) fn rootfs(&self) -> &Path {
        &self.request.rootfs
    }

    /// The places of file systems that get what the image has there.
    pub(crate) fn copied_up(&self) -> &[PathBuf] {
        &self.copied_up
    }

    /// The startContainer hooks.
    pub(crate) fn take_hooks(&mut self) -> Vec<PreparedHook> {
        std::mem::take(&mut self.hooks)
    }

    /// The places where something is mounted.
    pub(crate) fn mount_points(&self) -> &[MountPoint] {
        &self.mount_points
    }

    /// The places in volumes where something else is mounted.
    pub(crate) fn points_in_volumes(&self) -> &[PointInVolume] {
        &self.points_in_volumes
    }

    /// The container's volumes, by their paths in the VM.
    pub(crate) fn volumes(&self) -> &[PathBuf] {
        &self.volumes
    }

    /// The program that decides which devices the container may use.
    pub(crate) fn devices(&self) -> &[Instruction] {
        &self.devices
    }

    /// The owner of the process's streams, as seen by the agent.
    pub(crate) fn owner(&self) -> u32 {
        self.owner
    }
}

fn write(bundle: &Path, spec: &Value) -> Result<(), SpecError> {
    let path = bundle.join("config.json");
    let write = || {
        fs::create_dir_all(bundle)?;
        fs::write(&path, serde_json::to_vec(spec)?)
    };
    write().map_err(|source| SpecError::Write { path: path.clone(), source })
}

fn make_dir(dir: &Path) -> Result<(), SpecError> {
    fs::create_dir_all(dir).map_err(|source| SpecError::Write { path: dir.to_owned(), source })
}

/// Removes paths that are named twice: each mount of a mask would cover the one before.
fn remove_repeated(linux: &mut Value, list: &str) {
    let mut seen = HashSet::new();
    if let Some(paths) = linux.get_mut(list).and_then(Value::as_array_mut) {
        paths.retain(|path| seen.insert(path.to_string()));
    }
}

/// Gives the propagation of the root file system the name that libcontainer knows; it always takes it for the whole tree.
fn adapt_propagation(linux: &mut Value) {
    let Some(propagation) = linux.get_mut("rootfsPropagation") else { return };
    let known = match propagation.as_str() {
        Some("rprivate") => "private",
        Some("rslave") => "slave",
        Some("runbindable") => "unbindable",
        _ => return,
    };
    *propagation = known.into();
}

/// A required object of the spec.
fn section<'a>(spec: &'a mut Value, key: &str, what: &'static str) -> Result<&'a mut Value, SpecError> {
    spec.get_mut(key).filter(|value| value.is_object()).ok_or(SpecError::Missing { what })
}

/// Adds the namespaces of other containers that the container is in.
fn join(linux: &mut Value, joined: &[NamespacePath]) {
    if joined.is_empty() {
        return;
    }
    let mut namespaces = linux["namespaces"].as_array().cloned().unwrap_or_default();
    let named = |joined: &NamespacePath| json!({ "type": joined.kind, "path": joined.path });
    namespaces.extend(joined.iter().map(named));
    linux["namespaces"] = namespaces.into();
}

fn has_namespace(linux: &Value, kind: &str) -> bool {
    items(&linux["namespaces"]).any(|namespace| namespace["type"] == kind)
}

fn cgroup_path(linux: &mut Value, id: &str) -> Result<PathBuf, SpecError> {
    let path = match linux["cgroupsPath"].as_str() {
        Some(path) if !path.is_empty() => path.into(),
        _ => Path::new("/").join(cgroup::PARENT).join(id),
    };
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !plain || path.components().count() < 2 {
        return Err(SpecError::CgroupPath { path });
    }
    linux["cgroupsPath"] = path_value(&path);
    Ok(path)
}

/// Moves the block I/O weight to io.weight: libcontainer writes it to a file that only the BFQ scheduler has,
/// and its conversion overflows.
fn adapt_resources(resources: &mut Value) {
    let weight = resources.pointer_mut("/blockIO/weight").map(Value::take);
    let Some(given) = weight.as_ref().and_then(Value::as_u64).filter(|weight| *weight != 0) else { return };
    // OCI's 10 to 1000 stand for the kernel's 1 to 10000.
    let ours = 1 + given.saturating_sub(10) * 9999 / 990;
    resources["unified"]["io.weight"] = format!("default {ours}").into();
}

/// Sets the sysctls of the network, which belongs to the VM and with it to the whole pod. libcontainer
/// refuses to set them.
fn set_network_sysctls(linux: &mut Value) -> Result<(), SpecError> {
    let Some(sysctls) = linux["sysctl"].as_object_mut() else { return Ok(()) };
    let network: Vec<String> = sysctls.keys().filter(|key| key.starts_with("net.")).cloned().collect();
    for key in network {
        let value = sysctls.remove(&key);
        let path = sysctl_path(&key)?;
        let value = value.as_ref().and_then(Value::as_str).unwrap_or_default();
        fs::write(path, value).map_err(|source| SpecError::Sysctl { key, source })?;
    }
    Ok(())
}

/// The file of a sysctl. In a name with slashes, dots are part of the elements (sysctl(8)))
fn sysctl_path(key: &str) -> Result<PathBuf, SpecError> {
    let relative = if key.contains('/') { key.to_owned() } else { key.replace('.', "/") };
    let plain = relative.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    if !plain {
        return Err(SpecError::SysctlName { key: key.to_owned() });
    }
    Ok(Path::new("/proc/sys").join(relative))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn adapt(change: impl FnOnce(&mut Value)) -> Result<(Prepared, Value), SpecError> {
        let mut config = json!({
            "ociVersion": "1.2.0",
            "process": {"user": {"uid": 5, "gid": 5}, "args": ["true"], "cwd": "/", "noNewPrivileges": false},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
            "mounts": [{"destination": "/c", "type": "cgroup2", "source": "cgroup"}],
            "hooks": {"prestart": [{"path": "/bin/true"}]},
        });
        change(&mut config);
        let dir = tempfile::tempdir().unwrap();
        let file = FileMount { source: "/run/f".into(), destination: "/etc/hosts".into() };
        let prepared = Prepared::new(
            "c1",
            dir.path(),
            dir.path(),
            &serde_json::to_vec(&config).unwrap(),
            vec![file],
            &[],
            false,
        )?;
        let written = fs::read(dir.path().join("engine/bundle/config.json")).unwrap();
        Ok((prepared, serde_json::from_slice(&written).unwrap()))
    }

    #[test]
    fn a_path_is_masked_once() {
        let mut linux = json!({"maskedPaths": ["/a", "/b", "/a", "/a/b"]});
        remove_repeated(&mut linux, "maskedPaths");
        remove_repeated(&mut linux, "readonlyPaths");
        assert_eq!(linux, json!({"maskedPaths": ["/a", "/b", "/a/b"]}));
    }

    #[test]
    fn settings_that_libcontainer_would_misread_are_adapted() {
        let (prepared, spec) = adapt(|_| {}).unwrap();
        assert_eq!(spec["process"]["env"], json!(["HOME=/"]));
        assert_eq!(spec["linux"]["cgroupsPath"], "/machinen/c1");
        assert_eq!(spec["mounts"][0]["type"], "cgroup");
        assert_eq!(spec["mounts"][1]["source"], "/run/f");
        assert_eq!(spec["hooks"], Value::Null);
        assert_eq!(spec["process"]["noNewPrivileges"], Value::Null);
        assert_eq!(spec["process"]["capabilities"], json!({}));
        assert_eq!(prepared.owner(), 5);
    }

    #[test]
    fn a_mount_without_a_source_is_named_like_its_type() {
        for unset in [json!(null), json!("")] {
            let (_, spec) = adapt(|config| {
                config["mounts"] = json!([{"destination": "/scratch", "type": "tmpfs", "source": unset}]);
            })
            .unwrap();
            assert_eq!(spec["mounts"][0]["source"], "tmpfs");
        }
        let (_, spec) =
            adapt(|config| config["mounts"] = json!([{"destination": "/c", "type": "cgroup2"}])).unwrap();
        assert_eq!(
            (&spec["mounts"][0]["source"], &spec["mounts"][0]["type"]),
            (&json!("cgroup2"), &json!("cgroup"))
        );
    }

    #[test]
    fn the_owner_of_streams_is_the_mapped_user() {
        let map = json!([{"containerID": 0, "hostID": 1000, "size": 3}, {"containerID": 3, "hostID": 70000, "size": 9}]);
        let (prepared, _) = adapt(|config| config["linux"]["uidMappings"] = map).unwrap();
        assert_eq!(prepared.owner(), 70002);
    }

    #[test]
    fn sysfs_is_the_vms_for_a_user_namespace_in_its_network() {
        let (_, spec) = adapt(|config| {
            config["linux"]["namespaces"] = json!([{"type": "user"}, {"type": "pid"}]);
            config["mounts"] =
                json!([{"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}]);
        })
        .unwrap();
        assert_eq!(spec["mounts"][0]["type"], "bind");
        assert_eq!(spec["mounts"][0]["options"], json!(["ro", "rbind"]));
    }

    #[test]
    fn invalid_settings_are_named() {
        type Change = fn(&mut Value);
        let cases: [(Change, &str); 8] = [
            (|c| c["process"] = Value::Null, "has no process"),
            (|c| c["process"]["args"] = json!([]), "has no process.args"),
            (|c| c["process"]["cwd"] = json!("tmp"), "process.cwd \"tmp\""),
            (|c| c["root"] = Value::Null, "has no root"),
            (|c| c["linux"] = Value::Null, "has no linux"),
            (|c| c["linux"]["cgroupsPath"] = json!("/a/../.."), "linux.cgroupsPath"),
            (|c| c["linux"]["sysctl"] = json!({"net./../kernel/x": "1"}), "is not a valid name"),
            (
                |c| {
                    c["linux"]["devices"] =
                        json!([{"path": "/dev/card", "type": "c", "major": 226, "minor": 77}]);
                },
                "/dev/card is a character device of the host (226:77) that the VM does not have",
            ),
        ];
        for (change, text) in cases {
            let err = adapt(change).unwrap_err().to_string();
            assert!(err.contains(text), "{err}");
        }
        assert!(matches!(
            Prepared::new("c", Path::new("/x"), Path::new("/r"), b"{", vec![], &[], false),
            Err(SpecError::Parse(_))
        ));
    }

    #[test]
    fn an_io_weight_is_the_kernels() {
        let (_, spec) =
            adapt(|config| config["linux"]["resources"] = json!({"blockIO": {"weight": 1000}})).unwrap();
        assert_eq!(spec["linux"]["resources"]["unified"], json!({"io.weight": "default 10000"}));
        assert_eq!(spec["linux"]["resources"]["blockIO"]["weight"], Value::Null);
        let (_, spec) = adapt(|_| {}).unwrap();
        assert_eq!(spec["linux"].get("resources"), None);
    }

    #[test]
    fn sysctl_names_become_paths() {
        let path = |key| sysctl_path(key).unwrap();
        assert_eq!(path("net.ipv4.ip_forward"), Path::new("/proc/sys/net/ipv4/ip_forward"));
        assert_eq!(path("net/ipv4/conf/eth0.1/mtu"), Path::new("/proc/sys/net/ipv4/conf/eth0.1/mtu"));
    }
}
