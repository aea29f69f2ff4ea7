//! Translates the caller's mounts of a root file system to what the VM gets: a base to convert, and a disk
//! for the changes.

use std::{
    io,
    path::{Path, PathBuf},
};

use machinen_base::error::{ErrorKind, HasKind};
use machinen_storage::{container_disk::ContainerDiskPlan, layer::LayerTarget, rootdisk::RootfsSource};
use oci_spec::runtime::{LinuxIdMapping, Spec};
use rustix::fs::StatVfsMountFlags;

use super::mounted;

/// Name of the writable layer's disk, in the directory of the snapshot (or of the bundle).
const WRITABLE: &str = "machinen-writable.ext4";

/// A mount of the root file system as the caller describes it (containerd's `types.Mount`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RootfsMount {
    /// The type of the file system, as mount(8) takes it.
    pub kind: String,
    /// The device, or the directory of a bind mount.
    pub source: PathBuf,
    /// The mount's options.
    pub options: Vec<String>,
}

/// Where a container's root file system comes from, and where its changes go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsPlan {
    /// What is converted to the base disk. None: `disk` has the whole root file system.
    pub source: Option<RootfsSource>,
    /// The disk that the container writes to.
    pub disk: ContainerDiskPlan,
    /// The files of `source` belong to users of the container's user namespace. What the container writes belongs to the
    /// users that those stand for outside.
    pub mapped: bool,
}

impl RootfsPlan {
    /// Whether the base disk holds only the lower layers, and nothing that a container has written.
    pub fn is_overlaid(&self) -> bool {
        matches!(self.disk, ContainerDiskPlan::Upper { .. })
    }

    /// Whether the container has one disk, and must not change it.
    pub fn read_only(&self) -> bool {
        matches!(self.disk, ContainerDiskPlan::Existing { read_only: true, .. })
    }
}

/// Why a root file system cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RootfsPlanError {
    /// A directory or disk does not exist.
    #[error("the rootfs {} is missing", path.display())]
    Missing {
        /// The file or directory.
        path: PathBuf,
    },
    /// It cannot be found out what is mounted at the root.
    #[error("cannot find out what is mounted at the rootfs {}: {error}", path.display())]
    Unreadable {
        /// The directory.
        path: PathBuf,
        /// The error of the system.
        error: String,
    },
    /// There is nothing to use as the root file system.
    #[error("the OCI configuration has no root and the caller mounted none")]
    None,
    /// The type of the mount is not supported.
    #[error(
        "rootfs mounts of the type {kind:?} are not supported yet; supported are overlay, bind and ext4 (snapshotters overlayfs, native, erofs and blockfile)"
    )]
    Kind {
        /// The type of the mount.
        kind: String,
    },
    /// The disk is a block device.
    #[error("the disk {} is not supported yet: it is a device, only files are (snapshotter blockfile)", path.display())]
    Device {
        /// The file or directory.
        path: PathBuf,
    },
    /// There is more than one mount.
    #[error("a rootfs of {count} mounts is not supported yet; one overlay or bind mount is")]
    Several {
        /// Number of mounts.
        count: usize,
    },
    /// The users of the root file system would have to be mapped.
    #[error(
        "a rootfs mount of the type {kind:?} has the option {option}, which is supported for overlay with the ids of the container's user namespace (linux.uidMappings, linux.gidMappings) only"
    )]
    Mapped {
        /// The type of the mount.
        kind: String,
        /// The option.
        option: String,
    },
    /// The overlay has no lower directory.
    #[error("the overlay rootfs has no lowerdir")]
    NoLower,
}

impl RootfsPlanError {
    fn unreadable(path: &Path, error: &io::Error) -> Self {
        let path = path.to_owned();
        match error.kind() {
            io::ErrorKind::NotFound => Self::Missing { path },
            _ => Self::Unreadable { path, error: error.to_string() },
        }
    }
}

impl HasKind for RootfsPlanError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing { .. } => ErrorKind::NotFound,
            Self::Unreadable { .. } => ErrorKind::FailedPrecondition,
            Self::None | Self::NoLower => ErrorKind::InvalidArgument,
            Self::Kind { .. } | Self::Device { .. } | Self::Several { .. } | Self::Mapped { .. } => {
                ErrorKind::Unimplemented
            }
        }
    }
}

/// Plans the disks from the caller's mounts, or from `root.path` of the configuration if there are no mounts. An overlay
/// that is mounted there counts as if the caller had described it.
///
/// # Errors
/// A directory is missing, or a type of mount is not supported.
pub fn plan(mounts: &[RootfsMount], spec: &Spec, bundle: &Path) -> Result<RootfsPlan, RootfsPlanError> {
    let in_bundle = || ContainerDiskPlan::Unexported { path: bundle.join(WRITABLE) };
    let is_read_only = |mount: &RootfsMount| mount.options.iter().any(|option| option == "ro");
    let mapped = maps_users(mounts, spec)?;
    let plan = match mounts {
        [] => {
            let root = bundle.join(spec.root().as_ref().ok_or(RootfsPlanError::None)?.path());
            match mounted::overlay_at(&root).map_err(|error| RootfsPlanError::unreadable(&root, &error))? {
                Some(mount) => match overlay(&mount, bundle, Some(&root))? {
                    plan if check_sources(&plan).is_ok() => plan,
                    // A caller may have unmounted the lower directories, as Podman does if it maps their users.
                    _ => directory(root, spec, bundle)?,
                },
                None => directory(root, spec, bundle)?,
            }
        }
        [mount] if mount.kind == "overlay" => overlay(mount, bundle, None)?,
        [mount] if mount.kind == "bind" || mount.options.iter().any(|option| option.ends_with("bind")) => {
            let root = mount.source.clone();
            let disk = match is_read_only(mount) {
                true => in_bundle(),
                false => ContainerDiskPlan::Whole { root: root.clone() },
            };
            RootfsPlan { source: Some(RootfsSource::Dir(root)), disk, mapped: false }
        }
        // The image of the VM is the root file system of a pod's sandbox.
        [mount] if mount.kind == "ext4" || (mount.kind == "erofs" && is_read_only(mount)) => {
            let (path, read_only) = (mount.source.clone(), is_read_only(mount));
            RootfsPlan { source: None, disk: ContainerDiskPlan::Existing { path, read_only }, mapped: false }
        }
        [mount] => return Err(RootfsPlanError::Kind { kind: mount.kind.clone() }),
        several => return Err(RootfsPlanError::Several { count: several.len() }),
    };
    check_sources(&plan)?;
    Ok(RootfsPlan { mapped, ..plan })
}

/// Whether a mount maps the users of its lower layers, as containerd describes it: `uidmap=INSIDE:OUTSIDE:COUNT` with
/// further ranges after commas, and `gidmap=`.
fn maps_users(mounts: &[RootfsMount], spec: &Spec) -> Result<bool, RootfsPlanError> {
    let linux = spec.linux().as_ref();
    let of_namespace = [
        ("uidmap=", linux.and_then(|linux| linux.uid_mappings().as_deref())),
        ("gidmap=", linux.and_then(|linux| linux.gid_mappings().as_deref())),
    ];
    let mut mapped = false;
    for mount in mounts {
        for (name, ids) in of_namespace {
            let Some((option, ranges)) =
                mount.options.iter().find_map(|option| Some((option, option.strip_prefix(name)?)))
            else {
                continue;
            };
            let range =
                |ids: &LinuxIdMapping| format!("{}:{}:{}", ids.container_id(), ids.host_id(), ids.size());
            let wanted: Vec<_> = ids.unwrap_or_default().iter().map(range).collect();
            if mount.kind != "overlay" || ranges != wanted.join(",") {
                return Err(RootfsPlanError::Mapped { kind: mount.kind.clone(), option: option.clone() });
            }
            mapped = true;
        }
    }
    Ok(mapped)
}

/// Checks that the directories exist, or that the disk is a file.
fn check_sources(plan: &RootfsPlan) -> Result<(), RootfsPlanError> {
    if let ContainerDiskPlan::Existing { path, .. } = &plan.disk {
        return match path.metadata() {
            Ok(disk) if disk.is_file() => Ok(()),
            Ok(_) => Err(RootfsPlanError::Device { path: path.clone() }),
            Err(_) => Err(RootfsPlanError::Missing { path: path.clone() }),
        };
    }
    let sources = match &plan.source {
        Some(RootfsSource::Overlay { lowers }) => lowers.as_slice(),
        Some(RootfsSource::Dir(dir)) => std::slice::from_ref(dir),
        None => &[],
    };
    let target = plan.disk.target();
    let mut dirs = sources.iter().map(PathBuf::as_path).chain(target.iter().map(LayerTarget::path));
    match dirs.find(|dir| !dir.is_dir()) {
        Some(path) => Err(RootfsPlanError::Missing { path: path.to_owned() }),
        None => Ok(()),
    }
}

/// A directory of the user's receives the changes, unless the configuration or its file system is read-only.
fn directory(root: PathBuf, spec: &Spec, bundle: &Path) -> Result<RootfsPlan, RootfsPlanError> {
    let unreadable = |error: &io::Error| RootfsPlanError::unreadable(&root, error);
    let status = rustix::fs::statvfs(&root).map_err(|errno| unreadable(&errno.into()))?;
    let is_read_only = spec.root().as_ref().is_some_and(|root| root.readonly() == Some(true))
        || status.f_flag.contains(StatVfsMountFlags::RDONLY);
    let canonical = root.canonicalize().map_err(|error| unreadable(&error))?;
    // A disk in the bundle would be a part of a root file system that has the bundle in it. The container cannot write
    // to a read-only one, so that nothing is exported from its disk.
    let has_bundle = bundle.canonicalize().is_ok_and(|bundle| bundle.starts_with(&canonical));
    let disk = match is_read_only && !has_bundle {
        true => ContainerDiskPlan::Unexported { path: bundle.join(WRITABLE) },
        false => ContainerDiskPlan::InPlace { root: canonical },
    };
    Ok(RootfsPlan { source: Some(RootfsSource::Dir(root)), disk, mapped: false })
}

/// `mounted`: where the overlay is mounted, if it is.
fn overlay(
    mount: &RootfsMount,
    bundle: &Path,
    mounted: Option<&Path>,
) -> Result<RootfsPlan, RootfsPlanError> {
    let option = |name: &str| mount.options.iter().find_map(|option| option.strip_prefix(name));
    let lowers = split_lowers(option("lowerdir=").unwrap_or_default());
    if lowers.is_empty() {
        return Err(RootfsPlanError::NoLower);
    }
    let disk = match option("upperdir=").map(|path| PathBuf::from(unescape(path))) {
        Some(upper) => {
            let path = upper.parent().unwrap_or(bundle).join(WRITABLE);
            ContainerDiskPlan::Upper { path, upper, mount: mounted.map(Path::to_owned) }
        }
        None => ContainerDiskPlan::Unexported { path: bundle.join(WRITABLE) },
    };
    Ok(RootfsPlan { source: Some(RootfsSource::Overlay { lowers }), disk, mapped: false })
}

/// `lowerdir=a:b\:c` has the two directories `a` and `b:c`, the top one first.
fn split_lowers(text: &str) -> Vec<PathBuf> {
    let mut lowers = vec![String::new()];
    let mut chars = text.chars();
    while let Some(char) = chars.next() {
        let last = lowers.last_mut().expect("never empty");
        match char {
            '\\' => last.extend(chars.next()),
            ':' => lowers.push(String::new()),
            other => last.push(other),
        }
    }
    lowers.into_iter().filter(|lower| !lower.is_empty()).map(PathBuf::from).collect()
}

fn unescape(text: &str) -> String {
    let mut chars = text.chars();
    let mut out = String::new();
    while let Some(char) = chars.next() {
        if char == '\\' { out.extend(chars.next()) } else { out.push(char) }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    fn mount(kind: &str, options: &[String]) -> RootfsMount {
        RootfsMount { kind: kind.to_owned(), source: kind.into(), options: options.to_vec() }
    }

    #[test]
    fn the_disk_of_an_overlay_is_next_to_the_upper_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let (one, two, upper) = (path("1/fs"), path("2:x/fs"), path("3/fs"));
        let options = [
            "index=off".to_owned(),
            format!("lowerdir={}:{}", one.display(), two.display().to_string().replace(':', "\\:")),
            format!("upperdir={}", upper.display()),
        ];
        let plan = plan(&[mount("overlay", &options)], &Spec::default(), dir.path()).unwrap();
        assert_eq!(plan.source, Some(RootfsSource::Overlay { lowers: vec![one, two] }));
        assert_eq!(
            plan.disk,
            ContainerDiskPlan::Upper { path: dir.path().join("3").join(WRITABLE), upper, mount: None }
        );
    }

    #[test]
    fn users_are_mapped_by_the_ids_of_the_user_namespace_only() {
        let dir = tempfile::tempdir().unwrap();
        let ids = |host_id: u32| json!({"containerID": 0, "hostID": host_id, "size": 10});
        let linux = json!({"uidMappings": [ids(1000)], "gidMappings": [ids(2000), ids(3000)]});
        let with_ids = serde_json::from_value(json!({"ociVersion": "1.2.0", "linux": linux})).unwrap();
        let planned = |kind: &str, spec: &Spec, uids: &str| {
            let lower = format!("lowerdir={}", dir.path().display());
            let options = [lower, format!("uidmap={uids}"), "gidmap=0:2000:10,0:3000:10".to_owned()];
            plan(&[mount(kind, &options)], spec, Path::new("/b")).map(|plan| plan.mapped)
        };
        assert_eq!(planned("overlay", &with_ids, "0:1000:10"), Ok(true));
        for (kind, spec, uids) in [
            ("overlay", &with_ids, "0:1001:10"),
            ("overlay", &Spec::default(), "0:1000:10"),
            ("bind", &with_ids, "0:1000:10"),
        ] {
            let error = planned(kind, spec, uids).unwrap_err().to_string();
            assert!(error.contains(kind) && error.contains(&format!("the option uidmap={uids}")), "{error}");
        }
    }

    #[test]
    fn a_directory_receives_the_changes_unless_it_is_mounted_read_only() {
        let dir = tempfile::tempdir().unwrap();
        let bind = |option: &str| RootfsMount {
            kind: "bind".to_owned(),
            source: dir.path().to_owned(),
            options: vec!["rbind".to_owned(), option.to_owned()],
        };
        let disk = |option| plan(&[bind(option)], &Spec::default(), Path::new("/b")).unwrap().disk;
        assert_eq!(disk("rw"), ContainerDiskPlan::Whole { root: dir.path().to_owned() });
        assert_eq!(disk("ro"), ContainerDiskPlan::Unexported { path: Path::new("/b").join(WRITABLE) });
    }

    #[test]
    fn an_ext4_mount_is_the_whole_root_file_system() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let disk = |option: &str, path: &Path| RootfsMount {
            kind: "ext4".to_owned(),
            source: path.to_owned(),
            options: vec!["loop".to_owned(), option.to_owned()],
        };
        let planned = plan(&[disk("rw", file.path())], &Spec::default(), Path::new("/")).unwrap();
        let existing = ContainerDiskPlan::Existing { path: file.path().to_owned(), read_only: false };
        assert_eq!(planned, RootfsPlan { source: None, disk: existing, mapped: false });
        assert!(plan(&[disk("ro", file.path())], &Spec::default(), Path::new("/")).unwrap().read_only());
        let device = plan(&[disk("rw", Path::new("/dev/null"))], &Spec::default(), Path::new("/"));
        assert_eq!(device, Err(RootfsPlanError::Device { path: "/dev/null".into() }));
        let missing = plan(&[disk("rw", Path::new("/no/disk"))], &Spec::default(), Path::new("/"));
        assert_eq!(missing, Err(RootfsPlanError::Missing { path: "/no/disk".into() }));
    }

    #[test]
    fn without_mounts_the_configuration_names_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let error = plan(&[], &Spec::default(), dir.path()).unwrap_err();
        assert_eq!(error, RootfsPlanError::Missing { path: dir.path().join("rootfs") });
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        let mut spec = Spec::default();
        let mut directory = spec.root().clone().unwrap();
        directory.set_readonly(None);
        spec.set_root(Some(directory.clone()));
        let plan = plan(&[], &spec, dir.path()).unwrap();
        let root = dir.path().join("rootfs");
        assert_eq!(plan.source, Some(RootfsSource::Dir(root.clone())));
        assert_eq!(plan.disk, ContainerDiskPlan::InPlace { root: root.canonicalize().unwrap() });
        directory.set_readonly(Some(true));
        spec.set_root(Some(directory.clone()));
        let plan = super::plan(&[], &spec, dir.path()).unwrap();
        assert_eq!(plan.disk, ContainerDiskPlan::Unexported { path: dir.path().join(WRITABLE) });
        // The bundle is in the root file system.
        for inside in [root.clone(), root.join("bundle")] {
            fs::create_dir_all(&inside).unwrap();
            directory.set_path(root.clone());
            spec.set_root(Some(directory.clone()));
            let plan = super::plan(&[], &spec, &inside).unwrap();
            assert_eq!(plan.disk, ContainerDiskPlan::InPlace { root: root.canonicalize().unwrap() });
        }
    }

    #[test]
    fn unsupported_mounts_are_named() {
        let error = plan(&[mount("xfs", &[])], &Spec::default(), Path::new("/")).unwrap_err();
        assert!(error.to_string().contains("\"xfs\"") && error.kind() == ErrorKind::Unimplemented);
        let several = [mount("erofs", &[]), mount("overlay", &[])];
        assert_eq!(
            plan(&several, &Spec::default(), Path::new("/")),
            Err(RootfsPlanError::Several { count: 2 })
        );
        assert_eq!(
            plan(&[mount("overlay", &[])], &Spec::default(), Path::new("/")),
            Err(RootfsPlanError::NoLower)
        );
    }
}
