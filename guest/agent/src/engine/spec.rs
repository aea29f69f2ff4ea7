//! The host's OCI configuration, made into what libcontainer can be given.
//!
//! Each adaption is here because libcontainer does something else than runc, or because the container shares the
//! VM's network namespace.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use oci_spec::{
    OciSpecError,
    runtime::{Linux, LinuxCapabilities, LinuxNamespaceType, Mount, MountBuilder, Process, Spec},
};

use super::{DIR, zygote::Request};
use crate::{cgroup, container::FileMount};

/// A container as the engine is asked to make it; its spec is on disk.
#[derive(Debug)]
pub(crate) struct Prepared {
    id: String,
    dir: PathBuf,
    rootfs: PathBuf,
    cgroup_path: PathBuf,
    owner: u32,
    has_pid_namespace: bool,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    #[error("the OCI configuration cannot be understood")]
    Parse(#[source] serde_json::Error),
    #[error("the OCI configuration has no {what}")]
    Missing { what: &'static str },
    #[error("process.cwd {cwd} is not an absolute path")]
    Cwd { cwd: PathBuf },
    #[error("linux.cgroupsPath {path} is not an absolute path without '..'")]
    CgroupPath { path: PathBuf },
    #[error("seccomp listeners are not supported")]
    SeccompListener,
    #[error("sysctl {key} is not a name")]
    SysctlName { key: String },
    #[error("cannot set sysctl {key}")]
    Sysctl { key: String, source: io::Error },
    #[error("cannot complete the OCI configuration")]
    Build(#[source] OciSpecError),
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
}

impl Prepared {
    /// Reads the host's configuration, adapts it, and writes it where the engine looks.
    ///
    /// # Errors
    /// The configuration lacks what every container needs, or asks for what cannot be.
    pub(crate) fn new(
        id: &str,
        dir: &Path,
        rootfs: &Path,
        config: &[u8],
        files: Vec<FileMount>,
    ) -> Result<Self, SpecError> {
        let mut spec: Spec = serde_json::from_slice(config).map_err(SpecError::Parse)?;
        let process = spec.process_mut().as_mut().ok_or(SpecError::Missing { what: "process" })?;
        adapt_process(process)?;
        let uid = process.user().uid();
        let linux = spec.linux_mut().as_mut().ok_or(SpecError::Missing { what: "linux section" })?;
        let cgroup_path = cgroup_path(linux, id)?;
        if linux.seccomp().as_ref().is_some_and(|seccomp| seccomp.listener_path().is_some()) {
            return Err(SpecError::SeccompListener);
        }
        let owner = mapped(linux, uid);
        let has_pid_namespace = has_namespace(linux, LinuxNamespaceType::Pid);
        let shares_network = !has_namespace(linux, LinuxNamespaceType::Network);
        let has_users = has_namespace(linux, LinuxNamespaceType::User);
        if shares_network {
            set_network_sysctls(linux)?;
        }
        let mut mounts = spec.mounts_mut().take().unwrap_or_default();
        if shares_network && has_users {
            bind_sysfs(&mut mounts);
        }
        for mount in &mut mounts {
            // libcontainer knows the hierarchy's mounts by v1's name.
            if mount.typ().as_deref() == Some("cgroup2") {
                mount.set_typ(Some("cgroup".to_owned()));
            }
        }
        for file in files {
            mounts.push(bind(file)?);
        }
        spec.set_mounts(Some(mounts));
        let root = spec.root_mut().as_mut().ok_or(SpecError::Missing { what: "root" })?;
        root.set_path(rootfs.to_owned());
        // The host runs them.
        spec.set_hooks(None);
        let prepared = Self {
            id: id.to_owned(),
            dir: dir.join(DIR),
            rootfs: rootfs.to_owned(),
            cgroup_path,
            owner,
            has_pid_namespace,
        };
        prepared.write(&spec)?;
        Ok(prepared)
    }

    fn write(&self, spec: &Spec) -> Result<(), SpecError> {
        let path = self.bundle().join("config.json");
        let write = || {
            fs::create_dir_all(self.bundle())?;
            fs::write(&path, serde_json::to_vec(spec)?)
        };
        write().map_err(|source| SpecError::Write { path: path.clone(), source })
    }

    fn bundle(&self) -> PathBuf {
        self.dir.join("bundle")
    }

    fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    pub(super) fn request(&self) -> Request {
        Request {
            id: self.id.clone(),
            bundle: self.bundle(),
            state: self.state(),
            rootfs: self.rootfs.clone(),
        }
    }

    /// Where the init listens for its start.
    pub(super) fn notify_dir(&self) -> PathBuf {
        self.state().join(&self.id)
    }

    /// Path of the container's cgroup below the hierarchy's root.
    pub(crate) fn cgroup_path(&self) -> &Path {
        &self.cgroup_path
    }

    /// The user to whom the process's streams belong, as the agent sees it.
    pub(crate) fn owner(&self) -> u32 {
        self.owner
    }

    /// Whether the kernel kills all of the container when its init ends.
    pub(crate) fn has_pid_namespace(&self) -> bool {
        self.has_pid_namespace
    }
}

fn adapt_process(process: &mut Process) -> Result<(), SpecError> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(SpecError::Missing { what: "process.args" });
    }
    if !process.cwd().is_absolute() {
        return Err(SpecError::Cwd { cwd: process.cwd().clone() });
    }
    // libcontainer takes "false" for "set late", when the right to install a seccomp filter is gone.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    // No capabilities are none, not all.
    if process.capabilities().is_none() {
        process.set_capabilities(Some(no_capabilities()));
    }
    Ok(())
}

fn no_capabilities() -> LinuxCapabilities {
    let mut none = LinuxCapabilities::default();
    none.set_bounding(None).set_effective(None).set_inheritable(None).set_permitted(None).set_ambient(None);
    none
}

fn has_namespace(linux: &Linux, kind: LinuxNamespaceType) -> bool {
    linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == kind)
}

fn cgroup_path(linux: &mut Linux, id: &str) -> Result<PathBuf, SpecError> {
    let path = linux.cgroups_path().clone().unwrap_or_else(|| Path::new("/").join(cgroup::PARENT).join(id));
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !plain || path.components().count() < 2 {
        return Err(SpecError::CgroupPath { path });
    }
    linux.set_cgroups_path(Some(path.clone()));
    Ok(path)
}

/// The uid that a user of the container's user namespace has outside.
fn mapped(linux: &Linux, uid: u32) -> u32 {
    let mappings = linux.uid_mappings().iter().flatten();
    let offset = |start: u32, size: u32| uid.checked_sub(start).filter(|offset| *offset < size);
    mappings
        .filter_map(|map| Some(map.host_id() + offset(map.container_id(), map.size())?))
        .next()
        .unwrap_or(uid)
}

/// The network is the VM's, and so are its settings: libcontainer refuses to touch them, and the pod is the VM.
fn set_network_sysctls(linux: &mut Linux) -> Result<(), SpecError> {
    let Some(mut sysctls) = linux.sysctl().clone() else { return Ok(()) };
    let network: Vec<String> = sysctls.keys().filter(|key| key.starts_with("net.")).cloned().collect();
    for key in network {
        let value = sysctls.remove(&key).unwrap_or_default();
        let path = sysctl_path(&key)?;
        fs::write(path, value).map_err(|source| SpecError::Sysctl { key, source })?;
    }
    linux.set_sysctl(Some(sysctls));
    Ok(())
}

/// In a name with slashes, dots are part of the elements (sysctl(8)).
fn sysctl_path(key: &str) -> Result<PathBuf, SpecError> {
    let relative = if key.contains('/') { key.to_owned() } else { key.replace('.', "/") };
    let plain = relative.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    if !plain {
        return Err(SpecError::SysctlName { key: key.to_owned() });
    }
    Ok(Path::new("/proc/sys").join(relative))
}

/// A sysfs shows a network namespace, and only the owner of that may mount one: others get the VM's.
fn bind_sysfs(mounts: &mut [Mount]) {
    for mount in mounts {
        if mount.typ().as_deref() == Some("sysfs") {
            let mut options = mount.options().clone().unwrap_or_default();
            options.push("rbind".to_owned());
            mount.set_typ(Some("bind".to_owned()));
            mount.set_source(Some("/sys".into()));
            mount.set_options(Some(options));
        }
    }
}

fn bind(file: FileMount) -> Result<Mount, SpecError> {
    MountBuilder::default()
        .destination(file.destination)
        .source(file.source)
        .typ("bind")
        .options(["rbind".to_owned(), "rprivate".to_owned()])
        .build()
        .map_err(SpecError::Build)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

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
            Path::new("/r"),
            &serde_json::to_vec(&config).unwrap(),
            vec![file],
        )?;
        let written = fs::read(dir.path().join("engine/bundle/config.json")).unwrap();
        Ok((prepared, serde_json::from_slice(&written).unwrap()))
    }

    #[test]
    fn what_libcontainer_would_misread_is_adapted() {
        let (prepared, spec) = adapt(|_| {}).unwrap();
        assert_eq!(spec["root"]["path"], "/r");
        assert_eq!(spec["linux"]["cgroupsPath"], "/machinen/c1");
        assert_eq!(spec["mounts"][0]["type"], "cgroup");
        assert_eq!(spec["mounts"][1]["source"], "/run/f");
        assert_eq!(spec["hooks"], Value::Null);
        assert_eq!(spec["process"]["noNewPrivileges"], Value::Null);
        assert_eq!(spec["process"]["capabilities"], json!({}));
        assert!(prepared.has_pid_namespace());
        assert_eq!(prepared.owner(), 5);
    }

    #[test]
    fn a_mapped_user_owns_its_streams_from_outside() {
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
    fn what_cannot_be_is_named() {
        type Change = fn(&mut Value);
        let cases: [(Change, &str); 7] = [
            (|c| c["process"] = Value::Null, "has no process"),
            (|c| c["process"]["args"] = json!([]), "has no process.args"),
            (|c| c["process"]["cwd"] = json!("tmp"), "process.cwd tmp"),
            (|c| c["root"] = Value::Null, "has no root"),
            (|c| c["linux"] = Value::Null, "has no linux"),
            (|c| c["linux"]["cgroupsPath"] = json!("/a/../.."), "linux.cgroupsPath"),
            (|c| c["linux"]["sysctl"] = json!({"net./../kernel/x": "1"}), "is not a name"),
        ];
        for (change, text) in cases {
            let err = adapt(change).unwrap_err().to_string();
            assert!(err.contains(text), "{err}");
        }
        assert!(matches!(
            Prepared::new("c", Path::new("/x"), Path::new("/r"), b"{", vec![]),
            Err(SpecError::Parse(_))
        ));
    }

    #[test]
    fn sysctl_names_become_paths() {
        let path = |key| sysctl_path(key).unwrap();
        assert_eq!(path("net.ipv4.ip_forward"), Path::new("/proc/sys/net/ipv4/ip_forward"));
        assert_eq!(path("net/ipv4/conf/eth0.1/mtu"), Path::new("/proc/sys/net/ipv4/conf/eth0.1/mtu"));
    }
}
