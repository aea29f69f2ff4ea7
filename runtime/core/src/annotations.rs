//! Per-container overrides: the annotations `io.machinen.*`, one row of [`KEYS`] each.
//!
//! Only keys in `annotations.allow` of the configuration are accepted. An annotation with the prefix that is
//! unknown, not allowed or malformed is an error, because a container that silently runs with other limits
//! than requested would be worse.

use std::collections::HashMap;

use machinen_base::error::{ErrorKind, HasKind};
use machinen_vm::ChannelMode;

use crate::config::{Config, TcpMode, VerifyMode};

/// The prefix of machinen's annotations.
pub const PREFIX: &str = "io.machinen.";

/// Applies a value to the configuration of one container. The error describes the valid values.
type Apply = fn(&mut Config, &str) -> Result<(), &'static str>;

/// Every annotation, without its prefix, and its effect.
pub const KEYS: &[(&str, Apply)] = &[
    ("memory-ceiling", |config, value| {
        config.vm.memory_mib =
            number(value, 128, 1 << 20).ok_or("a whole number of MiB from 128 to 1048576")?;
        Ok(())
    }),
    ("vcpus", |config, value| {
        config.vm.vcpus = number(value, 1, 64).ok_or("a whole number from 1 to 64")?;
        Ok(())
    }),
    ("rootdisk-size", |config, value| {
        let mib: u32 = number(value, 64, 1 << 24).ok_or("a whole number of MiB from 64 to 16777216")?;
        config.rootdisk.writable_size_mib = mib.into();
        Ok(())
    }),
    ("kernel-args", |config, value| {
        if value.len() > 1024 || !value.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            return Err("at most 1024 printable ASCII characters");
        }
        if !config.vm.kernel_args.is_empty() {
            config.vm.kernel_args.push(' ');
        }
        config.vm.kernel_args.push_str(value);
        Ok(())
    }),
    ("pre-dump", |config, value| {
        config.checkpoint.pre_dump = value.parse().map_err(|_| "true or false")?;
        Ok(())
    }),
    ("verify", |config, value| {
        config.checkpoint.verify = match value {
            "off" => VerifyMode::Off,
            "restore" => VerifyMode::Restore,
            _ => return Err("off or restore"),
        };
        Ok(())
    }),
    ("lazy", |config, value| {
        config.restore.lazy = value.parse().map_err(|_| "true or false")?;
        Ok(())
    }),
    ("tcp", |config, value| {
        config.restore.tcp = match value {
            "keep" => TcpMode::Keep,
            "close" => TcpMode::Close,
            _ => return Err("keep or close"),
        };
        Ok(())
    }),
    ("channel", |config, value| {
        config.vm.channel = match value {
            "auto" => ChannelMode::Auto,
            "vsock" => ChannelMode::Vsock,
            "serial" => ChannelMode::Serial,
            _ => return Err("auto, vsock or serial"),
        };
        Ok(())
    }),
];

/// Why an annotation was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    #[error("annotation {PREFIX}{name} has the value {value:?}; it takes {expected}")]
    BadValue { name: &'static str, value: String, expected: &'static str },
    #[error("annotation {PREFIX}{name} is unknown; known are {}", known_keys())]
    Unknown { name: String },
    #[error("annotation {PREFIX}{name} is not allowed here; annotations.allow in the configuration decides")]
    NotAllowed { name: &'static str },
}

impl HasKind for AnnotationError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotAllowed { .. } => ErrorKind::PermissionDenied,
            Self::BadValue { .. } | Self::Unknown { .. } => ErrorKind::InvalidArgument,
        }
    }
}

/// Returns the configuration of one container: `config` with the container's annotations applied.
///
/// # Errors
/// The first annotation, by name, that is unknown, not allowed or malformed.
pub fn apply(config: &Config, annotations: &HashMap<String, String>) -> Result<Config, AnnotationError> {
    let mut ours: Vec<(&str, &str)> = annotations
        .iter()
        .filter_map(|(name, value)| Some((name.strip_prefix(PREFIX)?, value.as_str())))
        .collect();
    ours.sort_unstable();
    let mut result = config.clone();
    for (name, value) in ours {
        let Some(&(name, set)) = KEYS.iter().find(|(known, _)| *known == name) else {
            return Err(AnnotationError::Unknown { name: name.to_owned() });
        };
        if !config.annotations.allow.iter().any(|allowed| allowed == name) {
            return Err(AnnotationError::NotAllowed { name });
        }
        set(&mut result, value).map_err(|expected| AnnotationError::BadValue {
            name,
            value: value.chars().take(80).collect(),
            expected,
        })?;
    }
    Ok(result)
}

/// All keys for messages, separated by commas.
pub fn known_keys() -> String {
    KEYS.iter().map(|&(name, _)| name).collect::<Vec<_>>().join(", ")
}

fn number(value: &str, least: u32, most: u32) -> Option<u32> {
    value.parse().ok().filter(|number| (least..=most).contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &str, value: &str) -> Result<Config, AnnotationError> {
        apply(&Config::default(), &HashMap::from([(name.to_owned(), value.to_owned())]))
    }

    #[test]
    fn each_key_reaches_its_setting() {
        assert_eq!(with("io.machinen.memory-ceiling", "900").unwrap().vm.memory_mib, 900);
        assert_eq!(with("io.machinen.vcpus", "3").unwrap().vm.vcpus, 3);
        assert_eq!(with("io.machinen.rootdisk-size", "4096").unwrap().rootdisk.writable_size_mib, 4096);
        assert_eq!(with("io.machinen.kernel-args", "a=b").unwrap().vm.kernel_args, "a=b");
        assert_eq!(with("io.machinen.channel", "serial").unwrap().vm.channel, ChannelMode::Serial);
        assert!(with("io.machinen.lazy", "true").unwrap().restore.lazy);
        assert_eq!(with("io.machinen.tcp", "close").unwrap().restore.tcp, TcpMode::Close);
    }

    #[test]
    fn annotations_without_the_prefix_are_ignored() {
        assert_eq!(with("io.kubernetes.cri.sandbox-id", "x").unwrap(), Config::default());
    }

    #[test]
    fn errors_name_the_valid_values() {
        for (name, value) in [
            ("io.machinen.memory-ceiling", "lots"),
            ("io.machinen.memory-ceiling", "12"),
            ("io.machinen.vcpus", "0"),
            ("io.machinen.rootdisk-size", "-1"),
            ("io.machinen.kernel-args", "a\nb"),
            ("io.machinen.channel", "pigeon"),
            ("io.machinen.tcp", "open"),
        ] {
            let error = with(name, value).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("it takes"), "{error}");
        }
    }

    #[test]
    fn unknown_and_disallowed_keys_are_refused() {
        assert!(matches!(with("io.machinen.memory", "1"), Err(AnnotationError::Unknown { .. })));
        let mut config = Config::default();
        config.annotations.allow.clear();
        let annotations = HashMap::from([("io.machinen.vcpus".to_owned(), "1".to_owned())]);
        assert_eq!(apply(&config, &annotations), Err(AnnotationError::NotAllowed { name: "vcpus" }));
    }
}
