//! The command line that containerd passes to a shim (containerd, runtime v2 README, "Commands" and "Flags").

use std::{ffi::OsString, path::PathBuf};

use go_flag::FlagSet;

use crate::error::ShimError;

/// What to do: the first word that is not a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Action {
    /// Without an action: serve the task API on the listener that `start` has passed.
    #[default]
    Serve,
    Start,
    Delete,
    Info,
    Version,
}

/// Flags in Go's style (`-id x`, `--id=x`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ShimArgs {
    pub action: Action,
    pub namespace: String,
    pub id: String,
    /// containerd's gRPC socket.
    pub address: String,
    pub bundle: PathBuf,
    pub debug: bool,
}

impl ShimArgs {
    /// # Errors
    /// A flag or the action is unknown, or a flag has no value.
    pub(crate) fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Self, ShimError> {
        let mut args = Self::default();
        let (mut bundle, mut publish_binary, mut socket) = (String::new(), String::new(), String::new());
        let (mut info, mut version) = (false, false);
        let mut flags = FlagSet::new();
        flags.add_flag("namespace", &mut args.namespace);
        flags.add_flag("id", &mut args.id);
        flags.add_flag("address", &mut args.address);
        flags.add_flag("bundle", &mut bundle);
        flags.add_flag("debug", &mut args.debug);
        flags.add_flag("publish-binary", &mut publish_binary);
        flags.add_flag("socket", &mut socket);
        flags.add_flag("info", &mut info);
        flags.add_flag("v", &mut version);
        let words: Vec<OsString> = words.into_iter().collect();
        let rest: Vec<String> =
            flags.parse(&words).map_err(|source| ShimError::Usage { problem: source.to_string() })?;
        args.action = match rest.first().map(String::as_str) {
            _ if version => Action::Version,
            _ if info => Action::Info,
            None => Action::Serve,
            Some("start") => Action::Start,
            Some("delete") => Action::Delete,
            Some(other) => {
                return Err(ShimError::Usage {
                    problem: format!("unknown action {other:?}; known are start and delete"),
                });
            }
        };
        args.bundle = bundle.into();
        Ok(args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<ShimArgs, ShimError> {
        ShimArgs::parse(line.split(' ').map(OsString::from))
    }

    #[test]
    fn containerds_start_and_delete() {
        let args = parse(
            "-namespace default -address /c.sock -publish-binary /usr/bin/containerd -id x -debug start",
        )
        .unwrap();
        assert_eq!((args.action, args.namespace.as_str(), args.id.as_str()), (Action::Start, "default", "x"));
        assert!(args.debug);
        let args = parse("-namespace default --id=x -bundle /run/b delete").unwrap();
        assert_eq!((args.action, args.bundle), (Action::Delete, PathBuf::from("/run/b")));
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
    }

    #[test]
    fn unknown_words_are_named() {
        for line in ["-what start", "-id x restart"] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains("what") || error.contains("restart"), "{error}");
        }
    }
}
