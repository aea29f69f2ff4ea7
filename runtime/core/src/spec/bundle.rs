//! Reads a bundle's `config.json`, with errors that name what is wrong.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
};

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::{Links, open_regular},
};
use oci_spec::runtime::{Process, Spec};
use serde_json::Value;

use super::json;

/// Larger files are refused, bytes: the agent accepts messages of 4 MiB.
pub(crate) const MAX_CONFIG: u64 = 3 << 20;

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The file cannot be read.
    #[error("cannot read the OCI configuration {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is empty.
    #[error("the OCI configuration {} is empty", path.display())]
    Empty {
        /// The file or directory.
        path: PathBuf,
    },
    /// The file is larger than any configuration.
    #[error("the OCI configuration {} is larger than {MAX_CONFIG} bytes", path.display())]
    TooLarge {
        /// The file or directory.
        path: PathBuf,
    },
    /// The file is not JSON of the runtime-spec.
    #[error("the OCI configuration {} is not valid", path.display())]
    Parse {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// The configuration lacks something, or contradicts itself.
    #[error("the OCI configuration {} {problem}", path.display())]
    Invalid {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

impl HasKind for BundleError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            _ => ErrorKind::InvalidArgument,
        }
    }
}

/// Loads `<bundle>/config.json` and checks what every container needs.
///
/// Source: runtime-spec, config.md ("Process": args and cwd, "Specification version").
///
/// # Errors
/// The file is missing, empty, too large, not JSON, not an OCI configuration, or has no process to run.
pub fn load(bundle: &Path) -> Result<Spec, BundleError> {
    let path = bundle.join("config.json");
    let mut text = Vec::new();
    open_regular(&path, Links::Follow)
        .and_then(|file| file.take(MAX_CONFIG + 1).read_to_end(&mut text))
        .map_err(|source| BundleError::Read { path: path.clone(), source })?;
    parse(&text, path)
}

/// Parses the content of the file at `path`, which is used in errors only.
///
/// # Errors
/// The same as for [`load`].
pub fn parse(text: &[u8], path: PathBuf) -> Result<Spec, BundleError> {
    if text.iter().all(u8::is_ascii_whitespace) {
        return Err(BundleError::Empty { path });
    }
    if text.len() as u64 > MAX_CONFIG {
        return Err(BundleError::TooLarge { path });
    }
    let typed = |text| -> Result<Spec, serde_json::Error> {
        let mut value: Value = serde_json::from_slice(text)?;
        if !value.is_object() {
            return Err(serde::de::Error::custom("it is not an object with ociVersion, process and root"));
        }
        json::configuration(&mut value);
        serde_json::from_value(value)
    };
    let mut spec = typed(text).map_err(|source| BundleError::Parse { path: path.clone(), source })?;
    if spec.version().is_empty() {
        // The specification requires a version, but clients that leave it out have always been served.
        spec.set_version("1.0.0".to_owned());
    }
    match problem(&spec) {
        Some(problem) => Err(BundleError::Invalid { path, problem }),
        None => Ok(spec),
    }
}

fn problem(spec: &Spec) -> Option<String> {
    if !spec.version().starts_with("1.") {
        return Some(format!("has ociVersion {:?}; version 1 is supported", spec.version()));
    }
    let Some(process) = spec.process() else {
        return Some("has no process to run".to_owned());
    };
    if process.args().as_ref().is_none_or(|args| args.first().is_none_or(String::is_empty)) {
        return Some("has no command in process.args".to_owned());
    }
    if !process.cwd().is_absolute() {
        return Some(format!("has the relative process.cwd {:?}; it must be absolute", process.cwd()));
    }
    if let Some(variable) = odd_variable(process) {
        return Some(format!("has {variable:?} in process.env; it must be NAME=VALUE"));
    }
    if spec.root().is_none() {
        return Some("has no root, the path of the root file system".to_owned());
    }
    let devices = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()?.devices().as_ref());
    let number = devices.into_iter().flatten().position(|rule| rule.access().is_none());
    number.map(|number| format!("has no access in linux.resources.devices[{number}]; it takes one or more of the letters r, w and m"))
}

/// Returns a variable without a name or a value, which runc refuses too.
pub(super) fn odd_variable(process: &Process) -> Option<&str> {
    let is_odd = |variable: &&String| variable.split_once('=').is_none_or(|(name, _)| name.is_empty());
    process.env().iter().flatten().find(is_odd).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use machinen_base::error::chain;

    fn load_text(text: &str) -> Result<Spec, BundleError> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), text).unwrap();
        load(dir.path())
    }

    #[test]
    fn a_default_configuration_loads() {
        let text = serde_json::to_string(&Spec::default()).unwrap();
        load_text(&text).unwrap();
    }

    #[test]
    fn the_least_configuration_loads() {
        load_text("{\"process\": {\"cwd\": \"/\", \"args\": [\"a\"]}, \"root\": {\"path\": \"rootfs\"}}")
            .unwrap();
    }

    #[test]
    fn errors_name_the_problem() {
        for (text, expected) in [
            ("", "is empty"),
            (" \n", "is empty"),
            ("{\"ociVersion\": ", "is not valid: EOF"),
            ("[]", "is not valid"),
            ("{\"ociVersion\": \"2.0\", \"linux\": {}}", "ociVersion \"2.0\""),
            ("{\"ociVersion\": \"1.0.2\", \"linux\": {}}", "no process"),
            (
                "{\"ociVersion\": \"1.0.2\", \"process\": {\"cwd\": \"/\", \"user\": {\"uid\": 0, \"gid\": 0}}}",
                "no command",
            ),
            (
                "{\"ociVersion\": \"1.0.2\", \"process\": {\"cwd\": \"tmp\", \"args\": [\"a\"], \"user\": {\"uid\": 0, \"gid\": 0}}}",
                "must be absolute",
            ),
            (
                "{\"process\": {\"cwd\": \"/\", \"args\": [\"a\"], \"env\": [\"NAME\"]}}",
                "\"NAME\" in process.env",
            ),
            ("{\"process\": {\"cwd\": \"/\", \"args\": [\"a\"]}}", "has no root"),
            (
                "{\"process\": {\"cwd\": \"/\", \"args\": [\"a\"]}, \"root\": {}, \
                  \"linux\": {\"resources\": {\"devices\": [{\"allow\": true, \"access\": \"\"}]}}}",
                "linux.resources.devices[0]",
            ),
        ] {
            let error = chain(&load_text(text).unwrap_err());
            assert!(error.contains(expected) && error.contains("config.json"), "{text}: {error}");
        }
        let error = chain(&load(Path::new("/nonexistent")).unwrap_err());
        assert!(error.contains("/nonexistent/config.json"), "{error}");
    }
}
