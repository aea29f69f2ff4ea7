//! Bind mounts of a configuration: which files of the host they show, and how.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
};

use machinen_base::{
    error::{ErrorKind, HasKind},
    mounts::TreeOptions,
};
use machinen_protocol::shares::ShareEntry;
use oci_spec::runtime::{Linux, LinuxIdMapping, Mount, Spec};

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
    /// The users in the guest to whom the files of users on the host belong, where they are others.
    pub mappings: Option<IdMappings>,
    /// What the volume is for the mount.
    pub part: MountPart,
}

/// What a volume is for a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountPart {
    /// The mount shows the volume.
    Whole,
    /// A lower directory of an overlay that the guest mounts.
    Lower,
    /// The directory that has the upper and the working directory of an overlay, and their names in it.
    Upper {
        /// The name of the upper directory.
        upper: String,
        /// The name of the working directory.
        work: String,
    },
}

/// Consecutive users, or groups, of an ID-mapped mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdMapping {
    /// The first one as the file system has it.
    pub source: u32,
    /// The first one as the container's kernel sees it.
    pub shown: u32,
    /// How many.
    pub count: u32,
}

/// The mappings of an ID-mapped mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMappings {
    /// Those of users.
    pub uids: Vec<IdMapping>,
    /// Those of groups.
    pub gids: Vec<IdMapping>,
    /// They also hold for what is mounted below the mount.
    pub recursive: bool,
}

impl IdMappings {
    /// None: a list is missing or empty.
    fn new(
        uids: Option<&[LinuxIdMapping]>,
        gids: Option<&[LinuxIdMapping]>,
        recursive: bool,
    ) -> Option<Self> {
        let list = |mappings: &[LinuxIdMapping]| {
            let all = mappings.iter().map(|mapping| IdMapping {
                source: mapping.container_id(),
                shown: mapping.host_id(),
                count: mapping.size(),
            });
            all.collect::<Vec<_>>()
        };
        let (uids, gids) = (list(uids?), list(gids?));
        (!uids.is_empty() && !gids.is_empty()).then_some(Self { uids, gids, recursive })
    }

    /// Those of a container's user namespace, if it has one.
    fn of_container(linux: Option<&Linux>, recursive: bool) -> Option<Self> {
        let linux = linux?;
        Self::new(linux.uid_mappings().as_deref(), linux.gid_mappings().as_deref(), recursive)
    }
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
    /// An overlay cannot be mounted in the guest.
    #[error("the overlay {} cannot be mounted: {reason}", destination.display())]
    Overlay {
        /// The path in the container.
        destination: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// The mapping of users is not complete.
    #[error(
        "the mount {} of {} maps users and has not both uidMappings and gidMappings, nor has the container's user namespace",
        destination.display(), source_path.display()
    )]
    Mappings {
        /// The path in the container.
        destination: PathBuf,
        /// The path on the host.
        source_path: PathBuf,
    },
}

impl HasKind for VolumeError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoSource { .. } | Self::Mappings { .. } | Self::Overlay { .. } => {
                ErrorKind::InvalidArgument
            }
            Self::Shared { .. } => ErrorKind::Unimplemented,
        }
    }
}

/// Options that the host carries out: among them how mounts below a mount appear elsewhere (mount(8)).
const HOSTS: [&str; 16] = [
    "private",
    "rprivate",
    "slave",
    "rslave",
    "shared",
    "rshared",
    "unbindable",
    "runbindable",
    "idmap",
    "ridmap",
    "bind",
    "rbind",
    "ro",
    "rro",
    "rw",
    "rrw",
];

impl VolumeMount {
    /// Takes what the host does out of a bind mount. What is left of `mount`, the one with this number among the
    /// configuration's mounts, is for the guest.
    ///
    /// # Errors
    /// The mount has an option that is not supported, or no source, or its mapping of users is not complete.
    pub(super) fn take(mount: &mut Mount, number: usize, linux: Option<&Linux>) -> Result<Self, VolumeError> {
        let destination = mount.destination().clone();
        let source = mount.source().clone().filter(|source| !source.as_os_str().is_empty());
        let source = source.ok_or_else(|| VolumeError::NoSource { destination: destination.clone() })?;
        let mut options = TreeOptions { recursive: false, read_only: false, follows_host: false };
        let (mut kept, mut mapped) = (Vec::new(), None);
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
                "idmap" | "ridmap" => mapped = Some(option == "ridmap"),
                _ => {}
            }
            if !HOSTS.contains(&option.as_str()) {
                kept.push(option.clone());
            }
        }
        let mappings = take_mappings(mount, mapped, linux);
        let mappings = mappings.map_err(|()| VolumeError::Mappings {
            destination: destination.clone(),
            source_path: source.clone(),
        })?;
        // In the guest a volume is one file system, without others below it.
        kept.push("bind".to_owned());
        kept.push(if options.read_only { "ro" } else { "rw" }.to_owned());
        mount.set_typ(Some("bind".to_owned())).set_options(Some(kept));
        Ok(Self { mount: number, source, destination, options, mappings, part: MountPart::Whole })
    }
}

/// The mappings of a mount, by runc's rules: a mount that has the option `idmap` (or `ridmap`, `mapped` is whether) and no
/// mappings has those of the container's user namespace. The host maps, so the guest does not.
fn take_mappings(
    mount: &mut Mount,
    mapped: Option<bool>,
    linux: Option<&Linux>,
) -> Result<Option<IdMappings>, ()> {
    let given = |list: &Option<Vec<LinuxIdMapping>>| list.clone().filter(|list| !list.is_empty());
    let (uids, gids) = (given(mount.uid_mappings()), given(mount.gid_mappings()));
    let recursive = mapped.unwrap_or_default();
    mount.set_uid_mappings(None).set_gid_mappings(None);
    match (&uids, &gids) {
        (None, None) if mapped.is_none() => Ok(None),
        (None, None) => IdMappings::of_container(linux, recursive).ok_or(()).map(Some),
        _ => IdMappings::new(uids.as_deref(), gids.as_deref(), recursive).ok_or(()).map(Some),
    }
}

/// Takes the directories of the host out of an overlay, as Podman's volumes with the option `O` are. The guest mounts the
/// overlay. What is left of `mount`, the one with this number, is for the guest.
///
/// # Errors
/// The overlay has no lower directories, or its upper and working directories are not in one directory.
pub(super) fn take_overlay(mount: &mut Mount, number: usize) -> Result<Vec<VolumeMount>, VolumeError> {
    let destination = mount.destination().clone();
    let refused = |reason| VolumeError::Overlay { destination: destination.clone(), reason };
    let options = mount.options().clone().unwrap_or_default();
    let option = |name: &str| options.iter().find_map(|option| option.strip_prefix(name));
    if options.iter().any(|option| option.contains('\\')) {
        return Err(refused("names with a backslash are not supported"));
    }
    let lowers = option("lowerdir=").ok_or_else(|| refused("it has no lowerdir"))?;
    let volume = |source: PathBuf, read_only, part| VolumeMount {
        mount: number,
        source,
        destination: destination.clone(),
        options: TreeOptions { recursive: false, read_only, follows_host: false },
        mappings: None,
        part,
    };
    let mut volumes: Vec<_> =
        lowers.split(':').map(|lower| volume(lower.into(), true, MountPart::Lower)).collect();
    match (option("upperdir="), option("workdir=")) {
        (None, None) => {}
        (Some(upper), Some(work)) => {
            let (upper, work) = (PathBuf::from(upper), PathBuf::from(work));
            let name = |path: &Path| path.file_name().and_then(OsStr::to_str).map(ToOwned::to_owned);
            let parent = upper.parent().filter(|parent| work.parent() == Some(*parent));
            let parent = parent.zip(name(&upper)).zip(name(&work));
            let ((parent, upper), work) =
                parent.ok_or_else(|| refused("its upperdir and workdir are not in the same directory"))?;
            volumes.push(volume(parent.to_owned(), false, MountPart::Upper { upper, work }));
        }
        _ => return Err(refused("an upperdir needs a workdir")),
    }
    let dirs = ["lowerdir=", "upperdir=", "workdir="];
    let is_kept = |option: &&String| {
        !dirs.iter().any(|dir| option.starts_with(dir))
            && (!HOSTS.contains(&option.as_str()) || *option == "ro")
    };
    let mut kept: Vec<_> = options.iter().filter(is_kept).cloned().collect();
    // The server of the volumes may not set other attributes than those of users.
    kept.push("userxattr".to_owned());
    mount.set_source(Some("overlay".into())).set_options(Some(kept));
    Ok(volumes)
}

/// Sets the sources of volumes in the guest.
pub(crate) fn set_sources(
    spec: &mut Spec,
    volumes: &[VolumeMount],
    entries: impl IntoIterator<Item = ShareEntry>,
) {
    let Some(mounts) = spec.mounts_mut() else { return };
    for (volume, entry) in volumes.iter().zip(entries) {
        let Some(mount) = mounts.get_mut(volume.mount) else { continue };
        let path = entry.path().display().to_string();
        let mut options = mount.options().clone().unwrap_or_default();
        match &volume.part {
            MountPart::Whole => {
                mount.set_source(Some(entry.path()));
                continue;
            }
            MountPart::Lower => match options.iter_mut().find(|option| option.starts_with("lowerdir=")) {
                Some(lowers) => lowers.extend([":", &path]),
                None => options.push(format!("lowerdir={path}")),
            },
            MountPart::Upper { upper, work } => {
                options.push(format!("upperdir={path}/{upper}"));
                options.push(format!("workdir={path}/{work}"));
            }
        }
        mount.set_options(Some(options));
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxBuilder, LinuxIdMappingBuilder, MountBuilder};

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
        let volume = VolumeMount::take(&mut mount, 3, None)?;
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
    fn an_overlay_is_mounted_by_the_guest() {
        let overlay = |options: &[&str]| {
            let options = options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>();
            let mount =
                MountBuilder::default().destination("/d").source("overlay").typ("overlay").options(options);
            let mut mount = mount.build().unwrap();
            take_overlay(&mut mount, 0).map(|volumes| (volumes, mount))
        };
        let options = ["lowerdir=/a:/b", "upperdir=/c/up", "workdir=/c/work", "private", "noatime"];
        let (volumes, mount) = overlay(&options).unwrap();
        let shown: Vec<_> = volumes
            .iter()
            .map(|volume| (volume.source.to_str().unwrap(), volume.options.read_only))
            .collect();
        assert_eq!(shown, [("/a", true), ("/b", true), ("/c", false)]);
        let mut spec = Spec::default();
        spec.set_mounts(Some(vec![mount]));
        let entries = (0..).map(|number| ShareEntry { number, is_file: false });
        set_sources(&mut spec, &volumes, entries);
        let mount = &spec.mounts().as_ref().unwrap()[0];
        let expected = [
            "noatime",
            "userxattr",
            "lowerdir=/run/machinen-shares/dir-0:/run/machinen-shares/dir-1",
            "upperdir=/run/machinen-shares/dir-2/up",
            "workdir=/run/machinen-shares/dir-2/work",
        ];
        assert_eq!(mount.options().as_ref().unwrap(), &expected);
        for (options, words) in [
            (&["upperdir=/c/up"][..], "no lowerdir"),
            (&["lowerdir=/a", "upperdir=/c/up"], "needs a workdir"),
            (&["lowerdir=/a", "upperdir=/c/up", "workdir=/d/work"], "same directory"),
        ] {
            let error = overlay(options).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (option, words) in [("rshared", "/data of /srv has the option rshared"), ("shared", "rslave")] {
            let error = take(&["rbind", option]).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(error.kind(), ErrorKind::Unimplemented);
        }
        let error = take(&["rbind", "idmap"]).unwrap_err();
        assert!(error.to_string().contains("/data of /srv maps users"), "{error}");
        let mut mount = MountBuilder::default().destination("/data").typ("bind").build().unwrap();
        let error = VolumeMount::take(&mut mount, 0, None).unwrap_err();
        assert_eq!(error.to_string(), "the bind mount /data has no source");
    }

    #[test]
    fn mappings_are_those_of_the_mount_or_the_container() {
        let ids = |source: u32, shown: u32| {
            let id =
                LinuxIdMappingBuilder::default().container_id(source).host_id(shown).size(10_u32).build();
            vec![id.unwrap()]
        };
        let linux =
            LinuxBuilder::default().uid_mappings(ids(0, 1000)).gid_mappings(ids(0, 2000)).build().unwrap();
        let take = |options: &[&str], uids: Option<_>, gids: Option<_>| {
            let mut mount =
                MountBuilder::default().destination("/data").source("/srv").typ("bind").build().unwrap();
            let options = options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>();
            mount.set_options(Some(options)).set_uid_mappings(uids).set_gid_mappings(gids);
            let volume = VolumeMount::take(&mut mount, 0, Some(&linux))?;
            assert!(mount.uid_mappings().is_none() && mount.gid_mappings().is_none());
            assert!(!mount.options().iter().flatten().any(|option| option.contains("idmap")));
            Ok::<_, VolumeError>(volume.mappings)
        };
        let mapping = |source, shown| vec![IdMapping { source, shown, count: 10 }];
        let own = |recursive| IdMappings { uids: mapping(1, 5), gids: mapping(2, 6), recursive };
        assert_eq!(take(&["rbind"], None, None), Ok(None));
        assert_eq!(take(&["rbind"], Some(ids(1, 5)), Some(ids(2, 6))), Ok(Some(own(false))));
        assert_eq!(take(&["ridmap"], Some(ids(1, 5)), Some(ids(2, 6))), Ok(Some(own(true))));
        let containers = IdMappings { uids: mapping(0, 1000), gids: mapping(0, 2000), recursive: false };
        assert_eq!(take(&["idmap"], None, None), Ok(Some(containers)));
        assert!(take(&["rbind"], Some(ids(1, 5)), None).is_err());
    }
}
