//! The files that all containers of a pod with a sandbox have: names, nameservers, and POSIX shared memory.
//!
//! Where Kubernetes starts a pause container, containerd's CRI plugin makes these files and mounts them in each container.
//! It makes none where the runtime has the sandbox (containerd 2.1), so here they are made and mounted in the same way.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use machinen_base::fs::{FileError, remove_dir_if_exists};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::{LinuxNamespaceType, Mount, MountBuilder, Spec};

/// The directory of the files, in that of the pod's state.
const DIR: &str = "files";
const SHM: &str = "shm";
/// As much as containerd gives the pods with a pause container.
const SHM_OPTIONS: &str = "mode=1777,size=65536k";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The nameservers of a pod (resolv.conf(5)). Without any the pod has those of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DnsConfig {
    /// Addresses of nameservers.
    pub servers: Vec<String>,
    /// Domains that are searched.
    pub searches: Vec<String>,
    /// Options of the resolver.
    pub options: Vec<String>,
}

impl DnsConfig {
    /// The file as containerd's CRI plugin writes it.
    fn text(&self) -> Option<String> {
        let lines: String = [
            ("search", self.searches.join(" ")),
            ("nameserver", self.servers.join("\nnameserver ")),
            ("options", self.options.join(" ")),
        ]
        .iter()
        .filter(|(_, values)| !values.is_empty())
        .map(|(name, values)| format!("{name} {values}\n"))
        .collect();
        (!lines.is_empty()).then_some(lines)
    }
}

/// Makes the files of the pod with this state directory. Blocks.
///
/// # Errors
/// A file cannot be written, or the memory not be mounted. What was made is left for [`remove`].
pub(super) fn make(state_dir: &Path, hostname: &str, dns: &DnsConfig) -> Result<(), FileError> {
    let dir = state_dir.join(DIR);
    fs::create_dir(&dir).map_err(FileError::at("create", &dir))?;
    let write = |name: &str, content: &[u8]| {
        let path = dir.join(name);
        fs::write(&path, content).map_err(FileError::at("write", path))
    };
    let of_host = |path: &str| match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(FileError::at("read", path)),
    };
    write("hostname", format!("{hostname}\n").as_bytes())?;
    write("hosts", &of_host("/etc/hosts")?)?;
    match dns.text() {
        Some(text) => write("resolv.conf", text.as_bytes())?,
        None => write("resolv.conf", &of_host(RESOLV_CONF)?)?,
    }
    let shm = dir.join(SHM);
    fs::DirBuilder::new().mode(0o700).create(&shm).map_err(FileError::at("create", &shm))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("shm"), &shm, Some("tmpfs"), flags, Some(SHM_OPTIONS))
        .map_err(io::Error::from)
        .map_err(FileError::at("mount a tmpfs on", &shm))
}

/// Removes the files, if there are any. Blocks.
///
/// # Errors
/// The memory cannot be unmounted, or a file not be removed.
pub(super) fn remove(state_dir: &Path) -> Result<(), FileError> {
    let dir = state_dir.join(DIR);
    let shm = dir.join(SHM);
    match umount2(&shm, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).map_err(io::Error::from) {
        // It does not exist, or nothing is mounted there.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => {}
        unmounted => unmounted.map_err(FileError::at("unmount", shm))?,
    }
    remove_dir_if_exists(&dir).map_err(FileError::at("remove", dir)).map(drop)
}

/// Mounts the files in a container, where its configuration has none: memory only if it shares an IPC namespace.
pub(super) fn mount_in(spec: &mut Spec, state_dir: &Path) {
    let dir = state_dir.join(DIR);
    let shares_ipc = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref()).is_some_and(|all| {
        all.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Ipc && namespace.path().is_some())
    });
    let linux = spec.linux().as_ref();
    let uids = linux.and_then(|linux| linux.uid_mappings().clone()).filter(|ids| !ids.is_empty());
    let gids = linux.and_then(|linux| linux.gid_mappings().clone()).filter(|ids| !ids.is_empty());
    let is_read_only = spec.root().as_ref().is_some_and(|root| root.readonly() == Some(true));
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for name in ["hostname", "hosts", "resolv.conf"] {
        let destination = Path::new("/etc").join(name);
        if mounts.iter().all(|mount| *mount.destination() != destination) {
            let mut mount = bind(dir.join(name), &destination, if is_read_only { "ro" } else { "rw" });
            // They are root's, also in a user namespace.
            mount.set_uid_mappings(uids.clone()).set_gid_mappings(gids.clone());
            mounts.push(mount);
        }
    }
    let is_memory = |mount: &&mut Mount| {
        mount.destination() == Path::new("/dev/shm") && mount.typ().as_deref() == Some("tmpfs")
    };
    if let Some(memory) = mounts.iter_mut().find(is_memory).filter(|_| shares_ipc) {
        *memory = bind(dir.join(SHM), Path::new("/dev/shm"), "rw");
    }
    spec.set_mounts(Some(mounts));
}

fn bind(source: PathBuf, destination: &Path, access: &str) -> Mount {
    MountBuilder::default()
        .typ("bind")
        .source(source)
        .destination(destination)
        .options(["rbind", "rprivate", access].map(str::to_owned).to_vec())
        .build()
        .expect("every field has a default")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nameservers_are_written_as_containerd_does() {
        let dns = DnsConfig {
            servers: vec!["10.0.0.1".into(), "10.0.0.2".into()],
            searches: vec!["a".into(), "b".into()],
            options: Vec::new(),
        };
        assert_eq!(dns.text().unwrap(), "search a b\nnameserver 10.0.0.1\nnameserver 10.0.0.2\n");
        assert_eq!(DnsConfig::default().text(), None);
    }

    #[test]
    fn a_container_gets_what_it_does_not_have() {
        let spec = |path: &str| {
            let namespaces = json!([{"type": "ipc", "path": path}]);
            let mounts = json!([
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
                {"destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts", "options": ["rbind"]},
            ]);
            let config =
                json!({"ociVersion": "1.2.0", "mounts": mounts, "linux": {"namespaces": namespaces}});
            let mut spec: Spec = serde_json::from_value(config).unwrap();
            mount_in(&mut spec, Path::new("/state"));
            let sources = |mount: &Mount| mount.source().clone().unwrap().display().to_string();
            spec.mounts().as_ref().unwrap().iter().map(sources).collect::<Vec<_>>()
        };
        assert_eq!(
            spec("/proc/7/ns/ipc"),
            ["/state/files/shm", "/kubelet/hosts", "/state/files/hostname", "/state/files/resolv.conf"]
        );
    }

    #[test]
    fn the_memory_is_bounded_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        remove(dir.path()).unwrap();
        make(dir.path(), "web-0", &DnsConfig::default()).unwrap();
        let shm = nix::sys::statvfs::statvfs(&dir.path().join("files/shm")).unwrap();
        assert_eq!(shm.blocks() * shm.fragment_size(), 64 << 20);
        assert_eq!(fs::read_to_string(dir.path().join("files/hostname")).unwrap(), "web-0\n");
        remove(dir.path()).unwrap();
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
    }
}
