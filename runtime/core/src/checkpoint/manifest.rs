//! `machinen.json`: describes a checkpoint, and what is needed to restore it.
//!
//! Version rules: a field that older versions may ignore is added without a change of [`FORMAT`]; a field
//! that they would misread requires a change. Unknown fields are ignored; a missing field without a default
//! is an error.

use std::{
    collections::BTreeMap,
    io::Read as _,
    path::{Path, PathBuf},
};

use machinen_base::fs::{FileError, Links, hex, if_exists, open_regular};
use machinen_base::text::printable;
use machinen_protocol::api::{
    CgroupFile, CgroupFileOwner, CheckpointFacts, CriuOptions, ExternalMount, NestedCgroup,
};
use machinen_vm::VmSpec;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{
    CheckpointError, ManifestCopy,
    digest::PART,
    volumes::{self, ManifestVolume},
};
use crate::shares::SharedVolume;

/// Version of the directory's format.
pub const FORMAT: u32 = 1;
/// The file's name.
pub const MANIFEST: &str = "machinen.json";

/// CRIU's log and statistics of a dump, which are among the files of a checkpoint.
pub(super) const REPORTS: [&str; 2] = ["dump.log", "stats-dump"];

/// Input of the process that it had not read.
const STDIN: &str = "machinen-stdin";

/// The largest manifest that is written or read, bytes.
pub(super) const MAX_SIZE: u64 = 16 << 20;

/// The description of a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointManifest {
    /// Version of the format: [`FORMAT`].
    pub format: u32,
    /// Version of machinen that wrote the checkpoint.
    pub machinen: String,
    /// A value of `std::env::consts::ARCH`.
    pub arch: String,
    /// Time of the checkpoint: RFC 3339, UTC.
    pub created: String,
    /// Id of the container.
    pub container: String,
    /// The guest kernel's release, as uname(2) reports it.
    pub kernel: String,
    /// `sha256:` and the digest of a guest kernel that the user has supplied; None for machinen's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_digest: Option<String>,
    /// Version of the CRIU that took the checkpoint.
    pub criu: String,
    /// Features of the guest's CPU, named as in /proc/cpuinfo.
    pub cpu_flags: Vec<String>,
    /// RootdiskKey of the base disk; None if the snapshotter provides the root file system as one disk.
    #[serde(default)]
    pub rootdisk: Option<String>,
    /// `sha256:` and the digest of the bundle's config.json.
    pub config: String,
    /// The hostname in that config.json; empty if it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Identity of the host's directory that had the container's changes at that time; see
    /// [`machinen_storage::layer::identity`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<String>,
    /// Whether the container has a terminal.
    pub terminal: bool,
    /// CRIU's names for the standard streams of the first process; empty for a closed stream.
    pub descriptors: Vec<String>,
    /// The mounts whose source is outside of the container.
    pub mounts: Vec<ManifestMount>,
    /// The volumes. An earlier version that restores the checkpoint without them is refused by CRIU.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<ManifestVolume>,
    /// The copy mounts, in the order of their images. An earlier version that restores the checkpoint without them is
    /// refused by its guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub copies: Vec<ManifestCopy>,
    /// Files of the container's cgroup, with their content.
    pub limits: BTreeMap<String, String>,
    /// The container's cgroup with the settings that are not among the limits, and all cgroups below it,
    /// parents first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cgroups: Vec<ManifestCgroup>,
    /// The options of the dump.
    pub options: DumpOptions,
    /// The files with the images.
    pub files: Vec<ImageDigest>,
}

/// A mount in the container whose source is outside of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestMount {
    /// The path in the container.
    pub destination: PathBuf,
    /// Path in the guest; None for a file of the host that the configuration mounts there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<PathBuf>,
}

/// The container's cgroup, or one below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestCgroup {
    /// Relative to the container's cgroup, whose path is empty.
    pub path: String,
    /// Names and contents of the cgroup's files, in the order in which they are written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub settings: Vec<(String, String)>,
    /// Names, user ids and group ids of files that do not belong to root.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub owners: Vec<(String, u32, u32)>,
}

/// The options of the request, each named as in CRIU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpOptions {
    /// Established TCP connections are part of the checkpoint.
    #[serde(default)]
    pub tcp_established: bool,
    /// Unix sockets may be connected to sockets outside of the container.
    #[serde(default)]
    pub ext_unix_sk: bool,
    /// The processes may belong to a session outside of the container.
    #[serde(default)]
    pub shell_job: bool,
    /// File locks are part of the checkpoint.
    #[serde(default)]
    pub file_locks: bool,
}

/// One file of the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDigest {
    /// The file's name in the directory of the checkpoint.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Hexadecimal.
    pub sha256: String,
    /// Hexadecimal BLAKE3 digests of each MiB, for images larger than one MiB, so that a range can be
    /// verified alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<String>,
}

impl ImageDigest {
    /// Whether the image holds memory of processes. It has no structure that has to be verified before it is
    /// read.
    pub(super) fn is_memory(&self) -> bool {
        self.name.starts_with("pages-")
    }
}

impl CheckpointManifest {
    /// Reads the manifest of the checkpoint in `dir`, and checks whether this host can use it. Does not read
    /// the images.
    ///
    /// # Errors
    /// The manifest is missing, not valid, or has another format or architecture.
    pub fn read(dir: &Path) -> Result<Self, CheckpointError> {
        Self::read_with_digest(dir).map(|(manifest, _)| manifest)
    }

    /// The names of the checkpoint's files, that of the manifest last.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|file| file.name.as_str()).chain([MANIFEST])
    }

    /// Like [`CheckpointManifest::read`], with the digest of the file: `sha256:` and hexadecimal digits. The manifest has
    /// the digests of all images, so its own digest identifies the whole checkpoint.
    ///
    /// # Errors
    /// Those of [`CheckpointManifest::read`].
    pub fn read_with_digest(dir: &Path) -> Result<(Self, String), CheckpointError> {
        let path = dir.join(MANIFEST);
        // The directory may belong to anybody.
        let opened = if_exists(open_regular(&path, Links::Refuse)).map_err(FileError::at("open", &path))?;
        let file = opened.ok_or_else(|| CheckpointError::NoManifest { dir: dir.to_owned() })?;
        let mut text = Vec::new();
        file.take(MAX_SIZE + 1).read_to_end(&mut text).map_err(CheckpointError::file("read", &path))?;
        match text.len() as u64 > MAX_SIZE {
            true => Err(CheckpointError::LargeManifest { path }),
            false => Ok((Self::parse(&text, &path)?, format!("sha256:{}", hex(&Sha256::digest(&text))))),
        }
    }

    /// Like [`CheckpointManifest::read`], for a manifest that was read from `path` already.
    ///
    /// # Errors
    /// The manifest is not valid, or has another format or architecture.
    pub fn parse(text: &[u8], path: &Path) -> Result<Self, CheckpointError> {
        #[derive(Deserialize)]
        struct FormatOnly {
            format: u32,
        }
        let path = path.to_owned();
        let invalid = |source| CheckpointError::Manifest { path: path.clone(), source };
        let FormatOnly { format } = serde_json::from_slice(text).map_err(invalid)?;
        if format != FORMAT {
            return Err(CheckpointError::Format { path, found: format });
        }
        let manifest: Self = serde_json::from_slice(text).map_err(invalid)?;
        let here = std::env::consts::ARCH;
        if manifest.arch != here {
            return Err(CheckpointError::Arch { found: printable(&manifest.arch), here });
        }
        for ImageDigest { name, size, parts, .. } in &manifest.files {
            if !is_image(name) {
                return Err(CheckpointError::Name { path, name: name.clone() });
            }
            if !parts.is_empty() && parts.len() as u64 != size.div_ceil(PART) {
                return Err(CheckpointError::Parts { path, name: name.clone() });
            }
        }
        Ok(manifest)
    }

    /// Adds what the guest reports. `shared`: the container's volumes.
    ///
    /// # Errors
    /// The report about volumes cannot be true, or cannot be restored.
    pub(crate) fn with_facts(
        mut self,
        mut facts: CheckpointFacts,
        shared: &[SharedVolume],
    ) -> Result<Self, CheckpointError> {
        self.volumes = volumes::record(&mut facts, shared)?;
        // The rest is what the restore passes to the guest again, so it stays as it is.
        self.kernel = printable(&facts.kernel_release);
        self.criu = printable(&facts.criu_version);
        self.cpu_flags = facts.cpu_flags;
        self.descriptors = facts.descriptors;
        let mounts = facts.mounts.into_iter().map(|mount| ManifestMount {
            destination: mount.destination.into(),
            source: Some(mount.source).filter(|source| !source.is_empty()).map(Into::into),
        });
        self.mounts = mounts.collect();
        self.limits = facts.limits.into_iter().map(|file| (file.name, file.content)).collect();
        self.cgroups = facts.cgroups.into_iter().map(ManifestCgroup::from).collect();
        Ok(self)
    }

    /// The part of the manifest that the guest needs. `shared`: the volumes of the new container.
    pub(crate) fn facts(&self, shared: &[SharedVolume]) -> CheckpointFacts {
        let mounts = self.mounts.iter().map(|mount| ExternalMount {
            destination: mount.destination.display().to_string(),
            source: mount.source.as_ref().map(|source| source.display().to_string()).unwrap_or_default(),
            ..Default::default()
        });
        let limits = self.limits.iter().map(|(name, content)| CgroupFile {
            name: name.clone(),
            content: content.clone(),
            ..Default::default()
        });
        CheckpointFacts {
            kernel_release: self.kernel.clone(),
            criu_version: self.criu.clone(),
            cpu_flags: self.cpu_flags.clone(),
            descriptors: self.descriptors.clone(),
            mounts: mounts.chain(volumes::mounts(&self.volumes, shared)).collect(),
            limits: limits.collect(),
            cgroups: self.cgroups.iter().map(ManifestCgroup::to_message).collect(),
            ..Default::default()
        }
    }
}

impl ManifestCgroup {
    fn to_message(&self) -> NestedCgroup {
        let settings = self.settings.iter().map(|(name, content)| CgroupFile {
            name: name.clone(),
            content: content.clone(),
            ..Default::default()
        });
        let owners = self.owners.iter().map(|(name, uid, gid)| CgroupFileOwner {
            name: name.clone(),
            uid: *uid,
            gid: *gid,
            ..Default::default()
        });
        NestedCgroup {
            path: self.path.clone(),
            settings: settings.collect(),
            owners: owners.collect(),
            ..Default::default()
        }
    }
}

impl From<NestedCgroup> for ManifestCgroup {
    fn from(nested: NestedCgroup) -> Self {
        Self {
            path: nested.path,
            settings: nested.settings.into_iter().map(|file| (file.name, file.content)).collect(),
            owners: nested.owners.into_iter().map(|owner| (owner.name, owner.uid, owner.gid)).collect(),
        }
    }
}

impl DumpOptions {
    pub(crate) fn criu(self) -> CriuOptions {
        CriuOptions {
            tcp_established: self.tcp_established,
            ext_unix_sk: self.ext_unix_sk,
            shell_job: self.shell_job,
            file_locks: self.file_locks,
            ..Default::default()
        }
    }
}

/// What a manifest has of a VM's kernel: nothing of machinen's own, whose release says what it can do.
pub(crate) fn kernel_digest(vm: &VmSpec) -> Option<String> {
    Some(&vm.kernel_digest).filter(|digest| !digest.is_empty()).map(|digest| format!("sha256:{digest}"))
}

/// Whether this is the name of a file of a checkpoint: an image of CRIU's, its log or statistics, or the input
/// that was not read. The guest chooses the names, and a file that another program looks for must not be among
/// them. containerd's CRI plugin refuses names with "..".
pub(super) fn is_image(name: &str) -> bool {
    let image = name.strip_suffix(".img").is_some_and(|stem| !stem.is_empty());
    (image || REPORTS.contains(&name) || name == STDIN)
        && name.len() <= 255
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && !name.starts_with('.')
        && !name.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A manifest of an earlier version remains readable for ever, with the same meaning.
    #[test]
    fn the_first_format_is_read() {
        let golden = include_str!("golden/format-1.json");
        let dir = tempfile::tempdir().unwrap();
        // A field of a later version is ignored.
        let later = golden.replacen('{', "{ \"later\": [1],", 1).replace("x86_64", std::env::consts::ARCH);
        std::fs::write(dir.path().join(MANIFEST), later).unwrap();
        let manifest = CheckpointManifest::read(dir.path()).unwrap();
        assert_eq!((manifest.container.as_str(), manifest.kernel.as_str()), ("web", "6.12.117-machinen"));
        assert_eq!(manifest.mounts[0], ManifestMount { destination: "/etc/hosts".into(), source: None });
        assert_eq!(manifest.limits["memory.max"], "104857600\n");
        assert!(manifest.options.file_locks && !manifest.options.shell_job);
        assert_eq!(manifest.files[0].size, 913);
        // The manifest is written unchanged.
        let facts = manifest.facts(&[]);
        let again = CheckpointManifest { arch: "x86_64".into(), ..manifest }.with_facts(facts, &[]).unwrap();
        let (written, read): (serde_json::Value, serde_json::Value) =
            (serde_json::to_value(&again).unwrap(), serde_json::from_str(golden).unwrap());
        assert_eq!(written, read);
    }

    #[test]
    fn only_a_regular_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(MANIFEST);
        let read = || CheckpointManifest::read(dir.path()).unwrap_err();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(read(), CheckpointError::File(_)));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/proc/self/status", &path).unwrap();
        assert!(matches!(read(), CheckpointError::File(_)));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(read(), CheckpointError::NoManifest { .. }));
    }

    #[test]
    fn cgroups_below_the_containers_are_kept() {
        let golden: CheckpointManifest = serde_json::from_str(include_str!("golden/format-1.json")).unwrap();
        assert_eq!((golden.cgroups.as_slice(), golden.volumes.as_slice()), (&[][..], &[][..]));
        let owner = ("cgroup.procs".to_owned(), 1000, 1000);
        let cgroup = |path: &str, settings: &[(&str, &str)]| ManifestCgroup {
            path: path.to_owned(),
            settings: settings.iter().map(|(name, content)| ((*name).into(), (*content).into())).collect(),
            owners: vec![owner.clone()],
        };
        let cgroups = vec![
            cgroup("", &[("cgroup.subtree_control", "memory")]),
            cgroup("work", &[("memory.max", "67108864"), ("cgroup.freeze", "1")]),
        ];
        let manifest = CheckpointManifest { cgroups: cgroups.clone(), ..golden };
        let read: CheckpointManifest =
            serde_json::from_str(&serde_json::to_string(&manifest).unwrap()).unwrap();
        assert_eq!(read.cgroups, cgroups);
        assert_eq!(read.clone().with_facts(read.facts(&[]), &[]).unwrap().cgroups, cgroups);
    }

    #[test]
    fn parts_that_are_not_those_of_the_size_are_refused() {
        let golden: serde_json::Value = serde_json::from_str(include_str!("golden/format-1.json")).unwrap();
        let parsed = |size: u64, parts: usize| {
            let mut text = golden.clone();
            text["arch"] = std::env::consts::ARCH.into();
            text["files"][0]["size"] = size.into();
            text["files"][0]["parts"] = vec!["00"; parts].into();
            CheckpointManifest::parse(text.to_string().as_bytes(), Path::new("machinen.json"))
        };
        for (size, parts) in [(PART, 2), (PART + 1, 1), (0, 1), (u64::MAX, 3)] {
            let refused = parsed(size, parts);
            assert!(matches!(refused, Err(CheckpointError::Parts { .. })), "{size} {parts}: {refused:?}");
        }
        for (size, parts) in [(PART, 1), (PART + 1, 2), (3 * PART, 3), (3 * PART, 0)] {
            assert!(parsed(size, parts).is_ok(), "{size} {parts}");
        }
    }

    #[test]
    fn only_files_of_criu_are_named() {
        let long = "x".repeat(252) + ".img";
        for name in [
            "",
            ".",
            "..",
            ".img",
            "a/b.img",
            "/a.img",
            ".hidden.img",
            "a..b.img",
            "a b.img",
            "a\0.img",
            MANIFEST,
            "evil",
            "passwd",
            "x.service",
            &long,
        ] {
            assert!(!is_image(name), "{name:?}");
        }
        for name in ["pages-1.img", "core-12.img", "stats-dump", "dump.log", STDIN, "tmpfs-dev-63.tar.gz.img"]
        {
            assert!(is_image(name), "{name}");
        }
    }
}
