//! Why a configuration cannot be used.

use std::{io, path::PathBuf};

use machinen_base::error::{ErrorKind, HasKind};
use machinen_vm::MAX_NICS;

use crate::traces::EndpointError;

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A client names the file by a path that is not absolute.
    #[error(
        "the path of the configuration file {path:?} is not absolute; name it as /etc/machinen/NAME.toml"
    )]
    Relative {
        /// The path.
        path: PathBuf,
    },
    /// The file has a syntax error, an unknown key or an invalid value.
    #[error("the configuration file {} is not valid (see config/machinen.toml for every key)", path.display())]
    Parse {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: toml::de::Error,
    },
    /// `vm.network_devices` is too large.
    #[error("{} has {given} as vm.network_devices, which is at most {MAX_NICS}", path.display())]
    NetworkDevices {
        /// The file.
        path: PathBuf,
        /// The value.
        given: u32,
    },
    /// `vm.pvm_kernel` is not set, or not needed.
    #[error(
        "{} needs vm.pvm_kernel, the kernel of guests, with vm.accel = \"pvm\", and has it only with that",
        path.display()
    )]
    PvmKernel {
        /// The file.
        path: PathBuf,
    },
    /// `traces.endpoint` cannot be used.
    #[error("{} has a traces.endpoint that cannot be used", path.display())]
    Traces {
        /// The file.
        path: PathBuf,
        /// Why.
        source: EndpointError,
    },
    /// `annotations.allow` has a name that is not an annotation.
    #[error("{} has an unknown annotation {name:?} in annotations.allow; known are {known}", path.display())]
    UnknownAnnotation {
        /// The file or directory.
        path: PathBuf,
        /// The unknown name.
        name: String,
        /// All known names.
        known: String,
    },
}

impl HasKind for ConfigError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}
