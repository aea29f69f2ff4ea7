//! The parameters that determine the content of a template.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use machinen_base::{
    fs::{FileError, hex},
    process,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::TemplateError;
use crate::{ChannelKind, VmSpec};

/// The parameters that determine the content of a template: VMs of one shape can be clones of one template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateShape {
    machinen: String,
    protocol: u16,
    qemu: FileIdentity,
    kernel: FileIdentity,
    /// As of [`VmSpec::kernel_digest`].
    #[serde(default)]
    kernel_digest: String,
    image: FileIdentity,
    /// QEMU's arguments; accelerator, memory, CPUs, time stamp counter and the kernel's command line are
    /// among them.
    args: Vec<String>,
    /// With KVM the guest sees the host's CPU.
    cpu: String,
    /// The release of the host's kernel, which decides what a tap device can do.
    host_kernel: String,
    /// As of [`VmSpec::tenant`].
    #[serde(default)]
    tenant: String,
}

/// Identifies a file in one state. The content is not read, because that would take longer than a clone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileIdentity {
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    modified_ns: i128,
}

impl FileIdentity {
    fn of(path: &Path) -> io::Result<Self> {
        let path = fs::canonicalize(path)?;
        let file = fs::metadata(&path)?;
        let modified_ns = i128::from(file.mtime()) * 1_000_000_000 + i128::from(file.mtime_nsec());
        Ok(Self { device: file.dev(), inode: file.ino(), size: file.size(), modified_ns, path })
    }

    fn is_current(&self) -> bool {
        Self::of(&self.path).is_ok_and(|now| now == *self)
    }
}

impl TemplateShape {
    /// The shape of a VM; None if the VM cannot be cloned.
    ///
    /// # Errors
    /// QEMU or one of the guest's files is missing. A boot reports that in more detail.
    pub fn of(spec: &VmSpec) -> Result<Option<Self>, TemplateError> {
        if matches!(spec.channel, ChannelKind::VhostUserVsock { .. })
            || relies_on_zeroed_memory(&spec.kernel_args)
        {
            return Ok(None);
        }
        let identity = |path: &Path| FileIdentity::of(path).map_err(FileError::at("look at", path));
        Ok(Some(Self {
            machinen: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: machinen_protocol::VERSION,
            qemu: identity(&process::find_program(&spec.qemu))?,
            kernel: identity(&spec.kernel)?,
            kernel_digest: spec.kernel_digest.clone(),
            image: identity(&spec.image)?,
            args: spec.template_args(),
            cpu: cpu().map_err(FileError::at("read", CPUINFO))?,
            host_kernel: fs::read_to_string(RELEASE).map_err(FileError::at("read", RELEASE))?,
            tenant: spec.tenant.clone(),
        }))
    }

    /// The template's name: 16 hexadecimal digits.
    pub fn key(&self) -> String {
        let text = serde_json::to_vec(self).expect("plain data");
        hex(&Sha256::digest(text)[..8])
    }

    pub(super) fn is_key(text: &str) -> bool {
        text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
    }

    /// QEMU, kernel and image are still what they were.
    pub fn is_current(&self) -> bool {
        [&self.qemu, &self.kernel, &self.image].into_iter().all(FileIdentity::is_current)
    }
}

/// Whether the guest's kernel relies on free memory being zero. Memory that a clone gives back to the host
/// and takes again has the template's content, which is harmless otherwise.
fn relies_on_zeroed_memory(kernel_args: &str) -> bool {
    // The kernel takes a hyphen for an underscore, and arguments in quotes.
    kernel_args
        .split_ascii_whitespace()
        .map(|arg| arg.replace('"', "").replace('-', "_"))
        .any(|arg| ["init_on_free", "page_poison"].iter().any(|name| arg.starts_with(name)))
}

const CPUINFO: &str = "/proc/cpuinfo";
const RELEASE: &str = "/proc/sys/kernel/osrelease";

/// A digest of those properties of the first processor that never change.
fn cpu() -> io::Result<String> {
    let text = fs::read_to_string(CPUINFO)?;
    let first = text.split("\n\n").next().unwrap_or_default();
    let lasting = |line: &&str| {
        ["model name", "stepping", "microcode", "flags"].iter().any(|key| line.starts_with(key))
    };
    let lines: Vec<&str> = first.lines().filter(lasting).collect();
    let digest = Sha256::digest(lines.join("\n"));
    Ok(hex(&digest[..8]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::accel::Accelerator;
    fn spec(dir: &Path) -> VmSpec {
        for name in ["vmlinux", "guest.img"] {
            fs::write(dir.join(name), name).unwrap();
        }
        VmSpec {
            id: "one".into(),
            qemu: "/bin/sh".into(),
            accel: Accelerator::Kvm,
            cpu: crate::cpu::CpuModel::default(),
            kernel_digest: String::new(),
            nested_kvm: false,
            pmu: false,
            memory_mib: 512,
            vcpus: 1,
            kernel: dir.join("vmlinux"),
            image: dir.join("guest.img"),
            kernel_args: String::new(),
            channel: ChannelKind::Serial,
            nics: 1,
            vhost_nics: 0,
            twins: false,
            hostname: "one".into(),
            boot_timeout: std::time::Duration::from_secs(1),
            qemu_files: Vec::new(),
            tenant: String::new(),
            keep_console: false,
        }
    }

    #[test]
    fn only_what_shapes_a_vm_makes_another_key() {
        let dir = tempfile::tempdir().unwrap();
        let base = spec(dir.path());
        let key = |spec: &VmSpec| TemplateShape::of(spec).unwrap().unwrap().key();
        let same = VmSpec { id: "two".into(), hostname: "two".into(), keep_console: true, ..base.clone() };
        assert_eq!(key(&base), key(&same));
        for other in [
            VmSpec { memory_mib: 1024, ..base.clone() },
            VmSpec { vcpus: 2, ..base.clone() },
            VmSpec { accel: Accelerator::Tcg { tsc_khz: 5 }, ..base.clone() },
            VmSpec { accel: Accelerator::Tcg { tsc_khz: 6 }, ..base.clone() },
            VmSpec { kernel_args: "x".into(), ..base.clone() },
            VmSpec { qemu: "/bin/ls".into(), ..base.clone() },
            VmSpec { channel: ChannelKind::KernelVsock, ..base.clone() },
            VmSpec { kernel_digest: "0a".into(), ..base.clone() },
            VmSpec { nics: 0, ..base.clone() },
            VmSpec { vhost_nics: 1, ..base.clone() },
            VmSpec { tenant: "k8s.io".into(), ..base.clone() },
            VmSpec { nested_kvm: true, ..base.clone() },
            VmSpec { cpu: "Nehalem".to_owned().try_into().unwrap(), ..base.clone() },
            VmSpec { pmu: true, ..base.clone() },
        ] {
            assert_ne!(key(&base), key(&other), "{other:?}");
        }
    }

    #[test]
    fn a_changed_file_makes_another_key_and_outdates_the_old_shape() {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(dir.path());
        let before = TemplateShape::of(&spec).unwrap().unwrap();
        assert!(before.is_current());
        fs::write(&spec.kernel, "another kernel").unwrap();
        assert!(!before.is_current());
        assert_ne!(before.key(), TemplateShape::of(&spec).unwrap().unwrap().key());
    }

    #[test]
    fn what_cannot_be_cloned_has_no_shape() {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(dir.path());
        let daemon = VmSpec { channel: ChannelKind::VhostUserVsock { daemon: "d".into() }, ..spec.clone() };
        assert_eq!(TemplateShape::of(&daemon).unwrap(), None);
        for args in [
            "a init_on_free=1",
            "init-on-free=1",
            "\"init_on_free=1\"",
            "init_\"on_free\"=1",
            "page_poison=1",
        ] {
            let zeros = VmSpec { kernel_args: args.into(), ..spec.clone() };
            assert_eq!(TemplateShape::of(&zeros).unwrap(), None, "{args}");
        }
        let missing = VmSpec { image: dir.path().join("nowhere"), ..spec };
        assert!(TemplateShape::of(&missing).unwrap_err().to_string().contains("nowhere"));
    }
}
