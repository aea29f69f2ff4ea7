//! Reading a bundle's `config.json`, with errors that name what is wrong with it.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;

use crate::error::{ErrorKind, Kind};

/// Larger files are refused, bytes: the agent takes messages of 4 MiB.
const MAX_CONFIG: u64 = 3 << 20;

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("cannot read the OCI configuration {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("the OCI configuration {} is empty", path.display())]
    Empty { path: PathBuf },
    #[error("the OCI configuration {} is larger than {MAX_CONFIG} bytes", path.display())]
    TooLarge { path: PathBuf },
    #[error("the OCI configuration {} is not valid", path.display())]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error("the OCI configuration {} {problem}", path.display())]
    Invalid { path: PathBuf, problem: String },
}

impl Kind for BundleError {
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
/// A file that is missing, empty, too large, not JSON, not an OCI configuration, or without a process to run.
pub fn load(bundle: &Path) -> Result<Spec, BundleError> {
    let path = bundle.join("config.json");
    let mut text = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(MAX_CONFIG + 1).read_to_end(&mut text))
        .map_err(|source| BundleError::Read { path: path.clone(), source })?;
    parse(&text, path)
}

/// Reads the content of the file at `path`, which is only told in errors.
///
/// # Errors
/// As for [`load`].
pub fn parse(text: &[u8], path: PathBuf) -> Result<Spec, BundleError> {
    if text.iter().all(u8::is_ascii_whitespace) {
        return Err(BundleError::Empty { path });
    }
    if text.len() as u64 > MAX_CONFIG {
        return Err(BundleError::TooLarge { path });
    }
    let spec: Spec =
        serde_json::from_slice(text).map_err(|source| BundleError::Parse { path: path.clone(), source })?;
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
    if spec.linux().is_none() {
        return Some("has no linux section; only Linux containers are supported".to_owned());
    }
    None
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::error::chain;

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
    fn what_is_wrong_is_said() {
        for (text, expected) in [
            ("", "is empty"),
            (" \n", "is empty"),
            ("{\"ociVersion\": ", "is not valid: EOF"),
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
        ] {
            let error = chain(&load_text(text).unwrap_err());
            assert!(error.contains(expected) && error.contains("config.json"), "{text}: {error}");
        }
        let error = chain(&load(Path::new("/nonexistent")).unwrap_err());
        assert!(error.contains("/nonexistent/config.json"), "{error}");
    }
}
