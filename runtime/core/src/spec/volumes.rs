//! Bind mounts of a configuration: which files of the host they show, and how.

use std::path::PathBuf;

use machinen_base::{
    error::{ErrorKind, HasKind},
    mounts::TreeOptions,
};
use machinen_protocol::shares::ShareEntry;
use oci_spec::runtime::{Mount, Spec};

/// A bind mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeMount {
    /// The place of the mount among the configuration's mounts.
    pub mount: usize,
    /// The path on the host; a relative one is relative to the bundle.
    pub source: PathBuf,
    /// The path in the container.
    pub destination: PathBuf,
    /// How the host shows the files to the guest.
    pub options: TreeOptions,
}

/// Why a bind mount is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumeError {
    /// The mount has no source.
    #[error("the bind mount {} has no source", destination.display())]
    NoSource {
        /// The path in the container.
        destination: PathBuf,
    },
    /// Mounts that the container makes would have to appear on the host.
    #[error(
        "the mount {} of {} has the option {option}, which is not supported: what is mounted in a VM cannot appear on the \
         host; use rslave or rprivate",
        destination.display(), source_path.display()
    )]
    Shared {
        /// The path in the container.
        destination: PathBuf,
        /// The path on the host.
        source_path: PathBuf,
        /// The option.
        option: String,
    },
    /// The users of the mount would have to be mapped.
    #[error("the mount {} of {} maps users, which is not supported yet", destination.display(), source_path.display())]
    Mapped {
        /// The path in the container.
        destination: PathBuf,
        /// The path on the host.
        source_path: PathBuf,
    },
}

impl HasKind for VolumeError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoSource { .. } => ErrorKind::InvalidArgument,
            Self::Shared { .. } | Self::Mapped { .. } => ErrorKind::Unimplemented,
        }
    }
}

/// How mounts below a mount appear elsewhere (mount(8)).
const PROPAGATION: [&str; 8] =
    ["private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable"];

impl VolumeMount {
    /// Takes what the host does out of a bind mount. What is left of `mount`, the one with this number among the
    /// configuration's mounts, is for the guest.
    ///
    /// # Errors
    /// The mount has an option that is not supported, or no source.
    pub(super) fn take(mount: &mut Mount, number: usize) -> Result<Self, VolumeError> {
        let destination = mount.destination().clone();
        let source = mount.source().clone().filter(|source| !source.as_os_str().is_empty());
        let source = source.ok_or_else(|| VolumeError::NoSource { destination: destination.clone() })?;
        let mut options = TreeOptions { recursive: false, read_only: false, follows_host: false };
        let mut kept = Vec::new();
        for option in mount.options().iter().flatten() {
            match option.as_str() {
                "bind" => {}
                "rbind" => options.recursive = true,
                "ro" | "rro" => options.read_only = true,
                "rw" | "rrw" => options.read_only = false,
                "private" | "rprivate" | "unbindable" | "runbindable" => options.follows_host = false,
                "slave" | "rslave" => options.follows_host = true,
                "shared" | "rshared" => {
                    let option = option.clone();
                    return Err(VolumeError::Shared { destination, source_path: source, option });
                }
                "idmap" | "ridmap" => return Err(VolumeError::Mapped { destination, source_path: source }),
                _ => {}
            }
            let is_hosts = PROPAGATION.contains(&option.as_str());
            if !is_hosts && !["bind", "rbind", "ro", "rro", "rw", "rrw"].contains(&option.as_str()) {
                kept.push(option.clone());
            }
        }
        if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
            return Err(VolumeError::Mapped { destination, source_path: source });
        }
        // In the guest a volume is one file system, without others below it.
        kept.push("bind".to_owned());
        kept.push(if options.read_only { "ro" } else { "rw" }.to_owned());
        mount.set_typ(Some("bind".to_owned())).set_options(Some(kept));
        Ok(Self { mount: number, source, destination, options })
    }
}

/// Sets the sources of volumes in the guest.
pub(crate) fn set_sources(
    spec: &mut Spec,
    volumes: &[VolumeMount],
    entries: impl IntoIterator<Item = ShareEntry>,
) {
    let Some(mounts) = spec.mounts_mut() else { return };
    for (volume, entry) in volumes.iter().zip(entries) {
        if let Some(mount) = mounts.get_mut(volume.mount) {
            mount.set_source(Some(entry.path()));
        }
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::MountBuilder;

    use super::*;

    fn take(options: &[&str]) -> Result<(TreeOptions, Vec<String>), VolumeError> {
        let options = options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>();
        let mut mount = MountBuilder::default()
            .destination("/data")
            .source("/srv")
            .typ("none")
            .options(options)
            .build()
            .unwrap();
        let volume = VolumeMount::take(&mut mount, 3)?;
        assert_eq!((volume.mount, mount.typ().as_deref()), (3, Some("bind")));
        Ok((volume.options, mount.options().clone().unwrap()))
    }

    #[test]
    fn options_are_divided_between_host_and_guest() {
        let tree = |recursive, read_only, follows_host| TreeOptions { recursive, read_only, follows_host };
        for (options, expected, kept) in [
            (&["bind"][..], tree(false, false, false), &["bind", "rw"][..]),
            (&["rbind", "rprivate", "ro", "nosuid"], tree(true, true, false), &["nosuid", "bind", "ro"]),
            (&["rbind", "rslave", "rro", "noexec"], tree(true, true, true), &["noexec", "bind", "ro"]),
            (&["rbind", "ro", "rw", "nodev"], tree(true, false, false), &["nodev", "bind", "rw"]),
        ] {
            let (tree, left) = take(options).unwrap();
            assert_eq!(tree, expected, "{options:?}");
            assert_eq!(left, kept, "{options:?}");
        }
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (option, words) in [
            ("rshared", "/data of /srv has the option rshared"),
            ("shared", "rslave"),
            ("idmap", "maps users"),
        ] {
            let error = take(&["rbind", option]).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(error.kind(), ErrorKind::Unimplemented);
        }
        let mut mount = MountBuilder::default().destination("/data").typ("bind").build().unwrap();
        let error = VolumeMount::take(&mut mount, 0).unwrap_err();
        assert_eq!(error.to_string(), "the bind mount /data has no source");
    }
}
