//! From what the caller mounted for a container to what its VM gets: a base to convert and a place for its writes.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;

use crate::{
    error::{ErrorKind, Kind},
    rootdisk::RootfsSource,
};

/// Name of the writable layer's disk, in the directory of the snapshot (or of the bundle).
const WRITABLE: &str = "machinen-writable.ext4";

/// A mount of the root file system as the caller describes it (containerd's `types.Mount`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RootfsMount {
    pub kind: String,
    pub source: PathBuf,
    pub options: Vec<String>,
}

/// Where a container's root file system comes from and where its writes go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub source: RootfsSource,
    /// The writable layer's disk: beside the snapshot's upper directory, so that it is removed with the snapshot and
    /// found again by the next start on it; in the bundle where there is no snapshot.
    pub writable: PathBuf,
}

/// Why a root file system cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RootfsError {
    #[error("the rootfs {} is missing", path.display())]
    Missing { path: PathBuf },
    #[error("the OCI configuration has no root and the caller mounted none")]
    None,
    #[error(
        "rootfs mounts of the type {kind:?} are not supported yet; supported are overlay and bind (snapshotters overlayfs and native)"
    )]
    Kind { kind: String },
    #[error("a rootfs of {count} mounts is not supported yet; one overlay or bind mount is")]
    Several { count: usize },
    #[error("the overlay rootfs has no lowerdir")]
    NoLower,
}

impl Kind for RootfsError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing { .. } => ErrorKind::NotFound,
            Self::None | Self::NoLower => ErrorKind::InvalidArgument,
            Self::Kind { .. } | Self::Several { .. } => ErrorKind::Unimplemented,
        }
    }
}

/// Plans from the caller's mounts, or, where there are none, from `root.path` of the configuration.
///
/// # Errors
/// A directory that is missing, or a kind of mount that is not supported.
pub fn plan(mounts: &[RootfsMount], spec: &Spec, bundle: &Path) -> Result<Plan, RootfsError> {
    let plan = match mounts {
        [] => {
            let root = spec.root().as_ref().ok_or(RootfsError::None)?;
            Plan { source: RootfsSource::Dir(bundle.join(root.path())), writable: bundle.join(WRITABLE) }
        }
        [mount] if mount.kind == "overlay" => overlay(mount, bundle)?,
        [mount] if mount.kind == "bind" || mount.options.iter().any(|option| option.ends_with("bind")) => {
            Plan { source: RootfsSource::Dir(mount.source.clone()), writable: bundle.join(WRITABLE) }
        }
        [mount] => return Err(RootfsError::Kind { kind: mount.kind.clone() }),
        several => return Err(RootfsError::Several { count: several.len() }),
    };
    let dirs: Vec<&PathBuf> = match &plan.source {
        RootfsSource::Overlay { lowers, upper } => lowers.iter().chain(upper).collect(),
        RootfsSource::Dir(dir) => vec![dir],
    };
    match dirs.into_iter().find(|dir| !dir.is_dir()) {
        Some(path) => Err(RootfsError::Missing { path: path.clone() }),
        None => Ok(plan),
    }
}

fn overlay(mount: &RootfsMount, bundle: &Path) -> Result<Plan, RootfsError> {
    let option = |name: &str| mount.options.iter().find_map(|option| option.strip_prefix(name));
    let lowers = split_lowers(option("lowerdir=").unwrap_or_default());
    if lowers.is_empty() {
        return Err(RootfsError::NoLower);
    }
    let upper = option("upperdir=").map(|path| PathBuf::from(unescape(path)));
    let home = upper.as_deref().and_then(Path::parent).unwrap_or(bundle);
    Ok(Plan { writable: home.join(WRITABLE), source: RootfsSource::Overlay { lowers, upper } })
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

    use super::*;

    fn mount(kind: &str, options: &[String]) -> RootfsMount {
        RootfsMount { kind: kind.to_owned(), source: kind.into(), options: options.to_vec() }
    }

    #[test]
    fn an_overlay_keeps_its_writes_beside_the_snapshot() {
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
        assert_eq!(plan.writable, dir.path().join("3").join(WRITABLE));
        assert_eq!(plan.source, RootfsSource::Overlay { lowers: vec![one, two], upper: Some(upper) });
    }

    #[test]
    fn without_mounts_the_configuration_names_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let error = plan(&[], &Spec::default(), dir.path()).unwrap_err();
        assert_eq!(error, RootfsError::Missing { path: dir.path().join("rootfs") });
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        let plan = plan(&[], &Spec::default(), dir.path()).unwrap();
        assert_eq!(plan.source, RootfsSource::Dir(dir.path().join("rootfs")));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let error = plan(&[mount("ext4", &[])], &Spec::default(), Path::new("/")).unwrap_err();
        assert!(error.to_string().contains("\"ext4\"") && error.kind() == ErrorKind::Unimplemented);
        let several = [mount("erofs", &[]), mount("overlay", &[])];
        assert_eq!(plan(&several, &Spec::default(), Path::new("/")), Err(RootfsError::Several { count: 2 }));
        assert_eq!(
            plan(&[mount("overlay", &[])], &Spec::default(), Path::new("/")),
            Err(RootfsError::NoLower)
        );
    }
}
