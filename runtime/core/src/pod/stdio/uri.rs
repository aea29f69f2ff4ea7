//! The names that callers give to standard streams (containerd, `core/runtime/v2/README.md`, "Logging").
//!
//! ```text
//!   /path   fifo:///path       a fifo; a path may also be a file that is there already
//!   file:///path               a file, appended to
//!   binary:///program?k=v      a program that reads fd 3 (stdout) and fd 4 (stderr), and closes fd 5 when ready
//!   binary-v2:///program?k=v   the same, but it must write a byte to fd 5
//! ```

use std::{fmt, path::PathBuf};

use percent_encoding::percent_decode_str;

use super::StdioError;

/// A name of a standard stream that was understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamUri {
    text: String,
    pub(super) target: StreamTarget,
}

/// What a name leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum StreamTarget {
    Fifo(PathBuf),
    File(PathBuf),
    Program(LoggerProgram),
}

/// A logging program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LoggerProgram {
    pub(super) path: PathBuf,
    /// Names and values of the URI's query, in the order in which containerd passes them.
    pub(super) args: Vec<String>,
    /// The program writes a byte when it is ready; otherwise closing the descriptor is enough.
    pub(super) must_report: bool,
}

impl StreamUri {
    /// Parses the name of `stream`, which is stdin, stdout or stderr.
    ///
    /// # Errors
    /// The scheme is unknown, or the path is not absolute.
    pub fn parse(stream: &'static str, name: &str) -> Result<Self, StdioError> {
        Ok(Self { text: name.to_owned(), target: StreamTarget::parse(stream, name)? })
    }
}

/// The name as the caller gave it.
impl fmt::Display for StreamUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl StreamTarget {
    fn parse(stream: &'static str, name: &str) -> Result<Self, StdioError> {
        let bad = || StdioError::Scheme { stream, name: name.to_owned() };
        let Some((scheme, rest)) = name.split_once("://") else {
            return if name.starts_with('/') { Ok(Self::Fifo(name.into())) } else { Err(bad()) };
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        if !path.starts_with('/') {
            return Err(bad());
        }
        let path: PathBuf = percent_decode_str(path).decode_utf8().map_err(|_| bad())?.as_ref().into();
        match scheme {
            "fifo" => Ok(Self::Fifo(path)),
            "file" => Ok(Self::File(path)),
            "binary" | "binary-v2" => {
                let pairs = form_urlencoded::parse(query.as_bytes());
                let args = pairs.flat_map(|(key, value)| [key.into_owned(), value.into_owned()]).collect();
                Ok(Self::Program(LoggerProgram { path, args, must_report: scheme == "binary-v2" }))
            }
            _ => Err(bad()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(name: &str) -> StreamTarget {
        StreamTarget::parse("stdout", name).unwrap()
    }

    #[test]
    fn the_schemes_of_containerd() {
        assert_eq!(parse("/a b%20c?d"), StreamTarget::Fifo("/a b%20c?d".into()));
        assert_eq!(parse("fifo:///a"), StreamTarget::Fifo("/a".into()));
        assert_eq!(parse("file:///var/log/a%20b"), StreamTarget::File("/var/log/a b".into()));
        let program = |name| match parse(name) {
            StreamTarget::Program(program) => program,
            other => panic!("{other:?}"),
        };
        let nerdctl = program("binary:///usr/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=%2Fvar%2Flib%2Fnerdctl");
        assert_eq!(nerdctl.path, PathBuf::from("/usr/bin/nerdctl"));
        assert_eq!(nerdctl.args, ["_NERDCTL_INTERNAL_LOGGING", "/var/lib/nerdctl"]);
        assert!(!nerdctl.must_report && program("binary-v2:///l").must_report);
        assert_eq!(program("binary:///l?a&b=1+2").args, ["a", "", "b", "1 2"]);
    }

    #[test]
    fn invalid_names_are_reported() {
        for name in ["", "relative", "npipe:///a", "file://host/a", "binary://logger", "file:///%ff"] {
            let error = StreamTarget::parse("stderr", name).unwrap_err().to_string();
            assert!(error.contains("stderr") && error.contains(name), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_name_is_parsed_or_refused(name in "(/|[a-z0-9-]{0,9}://)?[ -~\u{e4}%?&=]{0,40}") {
            if let Ok(uri) = StreamUri::parse("stdin", &name) {
                prop_assert_eq!(uri.to_string(), name);
            }
        }
    }
}
