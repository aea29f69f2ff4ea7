//! Per-container overrides: the annotations `io.machinen.*`, one row of [`KEYS`] each.
//!
//! Only keys in `annotations.allow` of the configuration are accepted, with sizes up to its `max_*` keys. An
//! annotation with the prefix that is unknown, not allowed, malformed or too large is an error, because a container that silently runs with other limits
//! than requested would be worse. For the same reason, an annotation that shapes the VM is an error on a
//! container that joins a VM of another shape.

use std::collections::HashMap;

use machinen_base::error::{ErrorKind, HasKind};
use machinen_vm::{ChannelKind, ChannelMode, VmSpec};

use super::{
    Config, TcpMode, TemplateMode, VerifyMode, VmConfig,
    copies::{InvalidCopy, parse_copies},
    ports::parse_ports,
};

/// Annotations of this prefix are on containers of Kubernetes pods (containerd's CRI plugin and CRI-O).
const KUBERNETES: &str = "io.kubernetes.cri";

/// The prefix of machinen's annotations.
pub const PREFIX: &str = "io.machinen.";

/// One annotation: a row of [`KEYS`].
#[derive(Debug)]
pub struct Annotation {
    /// The name without [`PREFIX`].
    pub name: &'static str,
    /// What the annotation shapes.
    pub scope: Scope,
    /// Applies a value to the configuration of one container.
    apply: fn(&mut Config, &str) -> Result<(), Refusal>,
}

/// Why a value is not applied.
#[derive(Debug)]
enum Refusal {
    /// It is malformed. The text describes the valid values.
    Malformed(&'static str),
    /// It is larger than a key of the configuration allows.
    AboveMax { max: u64, key: &'static str },
}

impl From<&'static str> for Refusal {
    fn from(valid: &'static str) -> Self {
        Self::Malformed(valid)
    }
}

/// What an annotation shapes.
#[derive(Debug, Clone, Copy)]
pub enum Scope {
    /// The VM, which is made for the first container of a pod. On a container that joins a running VM, the
    /// value must be the one that the VM has.
    Vm(Differs),
    /// The container alone.
    Container,
}

/// Compares the configuration of a container with a running VM: what the VM has, if that differs.
type Differs = fn(&Config, &VmSpec) -> Option<String>;

const PORT_LIST: &str = "ports as [ADDRESS:]HOST:CONTAINER[/udp], such as 8080:80, 0.0.0.0:53:53/udp or [::1]:80:80, separated by \
                         commas; each of the host's once, and at most 128";
const COPY_LIST: &str = "copy mounts as HOST:CONTAINER with two absolute paths without `..`, such as /srv/data:/data, separated by commas";
const DIGEST: &str = "sha256: and 64 lower-case hexadecimal digits";

/// Every annotation, with its scope and its effect.
pub const KEYS: &[Annotation] = &[
    Annotation {
        name: "memory-ceiling",
        scope: Scope::Vm(|config, vm| {
            (config.vm.memory_mib != vm.memory_mib).then(|| format!("{} MiB", vm.memory_mib))
        }),
        apply: |config, value| {
            let mib = number(value, 128, 1 << 20).ok_or("a whole number of MiB from 128 to 1048576")?;
            at_most(mib, config.annotations.max_memory_mib.max(config.vm.memory_mib), "max_memory_mib")?;
            config.vm.memory_mib = mib;
            Ok(())
        },
    },
    Annotation {
        name: "vcpus",
        scope: Scope::Vm(|config, vm| (config.vm.vcpus != vm.vcpus).then(|| vm.vcpus.to_string())),
        apply: |config, value| {
            let vcpus = number(value, 1, 64).ok_or("a whole number from 1 to 64")?;
            at_most(vcpus, config.annotations.max_vcpus.max(config.vm.vcpus), "max_vcpus")?;
            config.vm.vcpus = vcpus;
            Ok(())
        },
    },
    Annotation {
        name: "rootdisk-size",
        scope: Scope::Container,
        apply: |config, value| {
            let mib = number(value, 64, 1 << 24).ok_or("a whole number of MiB from 64 to 16777216")?;
            let max = config.annotations.max_rootdisk_size_mib.max(config.rootdisk.writable_size_mib);
            at_most(mib, max, "max_rootdisk_size_mib")?;
            config.rootdisk.writable_size_mib = mib.into();
            Ok(())
        },
    },
    Annotation {
        name: "copy-mount",
        scope: Scope::Container,
        apply: |config, value| {
            config.rootdisk.copies = parse_copies(value).map_err(|invalid| match invalid {
                InvalidCopy::Malformed(_) => Refusal::Malformed(COPY_LIST),
                InvalidCopy::Duplicate(_) => "copy mounts whose destinations differ".into(),
                InvalidCopy::TooMany => "at most 16 copy mounts".into(),
            })?;
            Ok(())
        },
    },
    Annotation {
        name: "copy-mount-size",
        scope: Scope::Container,
        apply: |config, value| {
            let mib = number(value, 64, 1 << 24).ok_or("a whole number of MiB from 64 to 16777216")?;
            let max = config.annotations.max_rootdisk_size_mib.max(config.rootdisk.copy_size_mib);
            at_most(mib, max, "max_rootdisk_size_mib")?;
            config.rootdisk.copy_size_mib = mib.into();
            Ok(())
        },
    },
    Annotation {
        name: "kernel-args",
        scope: Scope::Vm(|config, vm| {
            (config.vm.all_kernel_args() != vm.kernel_args).then(|| format!("{:?}", vm.kernel_args))
        }),
        apply: |config, value| {
            if value.len() > 1024 || !value.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
                return Err("at most 1024 printable ASCII characters".into());
            }
            if !config.vm.kernel_args.is_empty() {
                config.vm.kernel_args.push(' ');
            }
            config.vm.kernel_args.push_str(value);
            Ok(())
        },
    },
    Annotation {
        name: "pre-dump",
        scope: Scope::Container,
        apply: |config, value| {
            config.checkpoint.pre_dump = value.parse().map_err(|_| "true or false")?;
            Ok(())
        },
    },
    Annotation {
        name: "verify",
        scope: Scope::Container,
        apply: |config, value| {
            config.checkpoint.verify = match value {
                "off" => VerifyMode::Off,
                "restore" => VerifyMode::Restore,
                _ => return Err("off or restore".into()),
            };
            Ok(())
        },
    },
    Annotation {
        name: "lazy",
        scope: Scope::Container,
        apply: |config, value| {
            config.restore.lazy = value.parse().map_err(|_| "true or false")?;
            Ok(())
        },
    },
    Annotation {
        name: "tcp",
        scope: Scope::Container,
        apply: |config, value| {
            config.restore.tcp = match value {
                "keep" => TcpMode::Keep,
                "close" => TcpMode::Close,
                _ => return Err("keep or close".into()),
            };
            Ok(())
        },
    },
    Annotation {
        name: "checkpoint-digest",
        scope: Scope::Container,
        apply: |config, value| {
            let digits = value.strip_prefix("sha256:").ok_or(DIGEST)?;
            let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
            if digits.len() != 64 || !digits.bytes().all(is_hex) {
                return Err(DIGEST.into());
            }
            config.restore.digest = Some(value.to_owned());
            Ok(())
        },
    },
    Annotation {
        name: "network",
        scope: Scope::Container,
        apply: |config, value| match value {
            "pasta" => {
                config.network.outside = true;
                Ok(())
            }
            "routed" => {
                config.network.routed = true;
                Ok(())
            }
            _ => Err("pasta or routed".into()),
        },
    },
    Annotation {
        name: "ports",
        scope: Scope::Container,
        apply: |config, value| {
            config.network.ports = parse_ports(value).map_err(|_| PORT_LIST)?;
            config.network.outside = true;
            Ok(())
        },
    },
    Annotation {
        name: "channel",
        scope: Scope::Vm(|config, vm| {
            let fits = match config.vm.channel {
                ChannelMode::Auto => true,
                ChannelMode::Vsock => vm.channel != ChannelKind::Serial,
                ChannelMode::Serial => vm.channel == ChannelKind::Serial,
            };
            (!fits).then(|| vm.channel.guest_name().to_owned())
        }),
        apply: |config, value| {
            config.vm.channel = match value {
                "auto" => ChannelMode::Auto,
                "vsock" => ChannelMode::Vsock,
                "serial" => ChannelMode::Serial,
                _ => return Err("auto, vsock or serial".into()),
            };
            Ok(())
        },
    },
];

/// Why an annotation was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// The value is malformed.
    #[error("annotation {PREFIX}{name} has the value {value:?}; it takes {expected}")]
    BadValue {
        /// The annotation, without its prefix.
        name: &'static str,
        /// The value.
        value: String,
        /// What values are valid.
        expected: &'static str,
    },
    /// The value is larger than the configuration allows.
    #[error(
        "annotation {PREFIX}{name} has the value {value:?}, more than the {max} that annotations.{key} in the configuration allows"
    )]
    TooLarge {
        /// The annotation, without its prefix.
        name: &'static str,
        /// The value.
        value: String,
        /// The largest value.
        max: u64,
        /// The key of the configuration.
        key: &'static str,
    },
    /// No annotation has this name.
    #[error("annotation {PREFIX}{name} is unknown; known are {}", known_keys())]
    Unknown {
        /// The annotation, without its prefix.
        name: String,
    },
    /// The configuration does not allow the annotation.
    #[error("annotation {PREFIX}{name} is not allowed here; annotations.allow in the configuration decides")]
    NotAllowed {
        /// The annotation, without its prefix.
        name: &'static str,
    },
    /// The annotation would show a pod what only the node's administrator may show it.
    #[error(
        "annotation {PREFIX}copy-mount names directories of the host and is not allowed for pods; rootdisk.copies_in_pods in the configuration decides"
    )]
    InPod,
    /// The annotation shapes the VM, and the pod's VM runs with another value.
    #[error(
        "annotation {PREFIX}{name} has the value {value:?}, but the container joins a VM that runs with {running}; remove the annotation, set it on the pod's first container, or use a pod of its own"
    )]
    VmRuns {
        /// The annotation, without its prefix.
        name: &'static str,
        /// The value.
        value: String,
        /// What the VM has.
        running: String,
    },
}

impl HasKind for AnnotationError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotAllowed { .. } | Self::InPod | Self::TooLarge { .. } => ErrorKind::PermissionDenied,
            Self::VmRuns { .. } => ErrorKind::FailedPrecondition,
            Self::BadValue { .. } | Self::Unknown { .. } => ErrorKind::InvalidArgument,
        }
    }
}

/// Returns the configuration of one container: `config` with the container's annotations applied. Unless the
/// configuration allows it, no template is built of a VM that annotations have shaped, because a
/// client that sets annotations could otherwise fill the templates' memory with VMs that no other container uses.
///
/// # Errors
/// The first annotation, by name, that is unknown, not allowed, malformed or too large.
pub fn apply(config: &Config, annotations: &HashMap<String, String>) -> Result<Config, AnnotationError> {
    let mut result = config.clone();
    for (name, value) in with_prefix(annotations) {
        let Some(key) = find(name) else {
            return Err(AnnotationError::Unknown { name: name.to_owned() });
        };
        if !config.annotations.allow.iter().any(|allowed| allowed == name) {
            return Err(AnnotationError::NotAllowed { name: key.name });
        }
        (key.apply)(&mut result, value).map_err(|refusal| refused(key.name, value, refusal))?;
        if matches!(key.scope, Scope::Vm(_)) && !config.annotations.templates {
            result.template.mode = without_builds(config.template.mode);
        }
    }
    // The author of a pod may not read the host's directories.
    let in_pod = annotations.keys().any(|name| name.starts_with(KUBERNETES));
    if in_pod && !result.rootdisk.copies.is_empty() && !config.rootdisk.copies_in_pods {
        return Err(AnnotationError::InPod);
    }
    Ok(result)
}

fn refused(name: &'static str, value: &str, refusal: Refusal) -> AnnotationError {
    let value = shortened(value);
    match refusal {
        Refusal::Malformed(expected) => AnnotationError::BadValue { name, value, expected },
        Refusal::AboveMax { max, key } => AnnotationError::TooLarge { name, value, max, key },
    }
}

fn without_builds(mode: TemplateMode) -> TemplateMode {
    match mode {
        TemplateMode::Auto | TemplateMode::Use => TemplateMode::Use,
        TemplateMode::Off => TemplateMode::Off,
    }
}

/// Checks that a container can join the VM `running`: its annotations that shape the VM have the values that
/// this VM has, or was requested with: a limit of the first container may have made its VM smaller. `config` is the
/// container's configuration with its annotations applied, and `first` that of the container that the VM was made for.
///
/// # Errors
/// The first annotation, by name, that asks for a different VM.
pub fn check_join(
    config: &Config,
    annotations: &HashMap<String, String>,
    first: &VmConfig,
    running: &VmSpec,
) -> Result<(), AnnotationError> {
    for (name, value) in with_prefix(annotations) {
        if let Some(&Annotation { name, scope: Scope::Vm(differs), .. }) = find(name)
            && let Some(running) = differs(config, running)
            && !is_requested(name, value, config, first)
        {
            return Err(AnnotationError::VmRuns { name, value: shortened(value), running });
        }
    }
    Ok(())
}

/// Whether an annotation asks for what the VM was requested with.
fn is_requested(name: &str, value: &str, config: &Config, first: &VmConfig) -> bool {
    let mut with = Config { vm: first.clone(), ..config.clone() };
    find(name).is_some_and(|key| (key.apply)(&mut with, value).is_ok()) && with.vm == *first
}

/// The names of all annotations, without their prefix.
pub fn names() -> impl Iterator<Item = &'static str> {
    KEYS.iter().map(|key| key.name)
}

/// The annotations that a configuration without `annotations.allow` accepts: those that cannot make a container
/// cost more than one without annotations, and do not change how its VM works.
pub(super) fn harmless() -> impl Iterator<Item = &'static str> {
    names().filter(|name| !["kernel-args", "channel"].contains(name))
}

/// All names for messages, separated by commas.
pub fn known_keys() -> String {
    names().collect::<Vec<_>>().join(", ")
}

/// machinen's annotations without their prefix, sorted by name.
fn with_prefix(annotations: &HashMap<String, String>) -> Vec<(&str, &str)> {
    let mut ours: Vec<(&str, &str)> = annotations
        .iter()
        .filter_map(|(name, value)| Some((name.strip_prefix(PREFIX)?, value.as_str())))
        .collect();
    ours.sort_unstable();
    ours
}

fn find(name: &str) -> Option<&'static Annotation> {
    KEYS.iter().find(|key| key.name == name)
}

/// The value as errors quote it.
fn shortened(value: &str) -> String {
    value.chars().take(80).collect()
}

fn number(value: &str, least: u32, most: u32) -> Option<u32> {
    value.parse().ok().filter(|number| (least..=most).contains(number))
}

/// Checks a size against the largest one that the configuration allows, which its key `key` has.
fn at_most(value: u32, max: impl Into<u64>, key: &'static str) -> Result<(), Refusal> {
    let max = max.into();
    match u64::from(value) <= max {
        true => Ok(()),
        false => Err(Refusal::AboveMax { max, key }),
    }
}

#[cfg(test)]
mod tests;
