//! Decodes how the creator of a process names its standard streams: by three texts, which are empty for /dev/null.
//!
//! containerd's texts are those of [`StreamUri`]. A client on this host that has the streams open itself, as a command
//! line has, names them `fd://PID/NUMBER`: the descriptor NUMBER of its process PID, which is duplicated
//! (pidfd_getfd(2)). That process then stands for the one that is made: if it ends first, the process is killed.

use std::{io, os::fd::OwnedFd};

use containerd_shim_protos::ttrpc;
use machinen::pod::stdio::{ProcessStdio, StdioSource, StreamUri};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::error::{invalid, to_ttrpc};

const FD_SCHEME: &str = "fd://";

/// The standard streams of a process that is to be made.
#[derive(Debug)]
pub(crate) struct NamedStdio {
    pub(crate) stdio: ProcessStdio,
    /// A pidfd of the process that the streams come from, if that is how they are named.
    pub(crate) stand_in: Option<OwnedFd>,
}

/// # Errors
/// A name is not understood, or its descriptor is not open.
pub(crate) fn decode(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> ttrpc::Result<NamedStdio> {
    let mut stand_in = None;
    let mut source = |stream, name: &str| match name {
        "" => Ok(StdioSource::Null),
        name if name.starts_with(FD_SCHEME) => {
            inherited(&mut stand_in, name).or_else(|problem| invalid(format!("{stream} {name:?}: {problem}")))
        }
        name => StreamUri::parse(stream, name).map(StdioSource::Named).map_err(|error| to_ttrpc(&error)),
    };
    let stdio = ProcessStdio {
        stdin: source("stdin", stdin)?,
        stdout: source("stdout", stdout)?,
        stderr: source("stderr", stderr)?,
        terminal,
    };
    Ok(NamedStdio { stdio, stand_in: stand_in.map(|(_, pidfd)| pidfd) })
}

/// Duplicates the descriptor with this name. All descriptors of a process come from the same stand-in.
fn inherited(stand_in: &mut Option<(i32, OwnedFd)>, name: &str) -> Result<StdioSource, String> {
    let numbers = name.trim_start_matches(FD_SCHEME).split_once('/');
    let numbers = numbers.and_then(|(pid, fd)| Some((pid.parse().ok()?, fd.parse().ok()?)));
    let (pid, fd): (i32, i32) = numbers.ok_or("it must be fd://PID/NUMBER")?;
    if stand_in.is_none() {
        let opened = Pid::from_raw(pid)
            .ok_or(io::ErrorKind::InvalidInput.into())
            .and_then(|pid| pidfd_open(pid, PidfdFlags::NONBLOCK).map_err(io::Error::from));
        *stand_in = Some((pid, opened.map_err(|error| format!("cannot open process {pid}: {error}"))?));
    }
    match stand_in {
        Some((of, pidfd)) if *of == pid => pidfd_getfd(pidfd, fd, PidfdGetfdFlags::empty())
            .map(StdioSource::Inherited)
            .map_err(|error| format!("cannot duplicate the descriptor: {error}")),
        _ => Err("the streams must be of one process".to_owned()),
    }
}

/// Encodes the name of a stream.
pub(crate) fn name(uri: Option<&StreamUri>) -> String {
    uri.map(StreamUri::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use containerd_shim_protos::ttrpc::Code;

    use super::*;

    fn refusal(stdin: &str, stdout: &str) -> String {
        let Err(ttrpc::Error::RpcStatus(status)) = decode(stdin, stdout, "", false) else {
            panic!("accepted")
        };
        assert_eq!(status.code.enum_value(), Ok(Code::INVALID_ARGUMENT));
        status.message
    }

    #[test]
    fn an_empty_name_is_null_and_others_are_kept() {
        let NamedStdio { stdio, stand_in } = decode("/in", "binary:///l?a=b", "", true).unwrap();
        assert!(matches!(stdio.stderr, StdioSource::Null) && stand_in.is_none());
        let names = stdio.names();
        let text = [&names.stdin, &names.stdout, &names.stderr].map(|uri| name(uri.as_ref()));
        assert_eq!((text, names.terminal), (["/in", "binary:///l?a=b", ""].map(str::to_owned), true));
    }

    #[test]
    fn a_name_that_is_not_understood_is_an_invalid_argument() {
        let message = refusal("", "relative");
        assert!(message.contains("stdout \"relative\" is not understood"), "{message}");
    }

    #[test]
    fn descriptors_of_a_process_are_duplicated() {
        let (reader, _writer) = io::pipe().unwrap();
        let own = format!("fd://{}/{}", std::process::id(), reader.as_raw_fd());
        let NamedStdio { stdio, stand_in } = decode(&own, "", "", false).unwrap();
        let StdioSource::Inherited(fd) = stdio.stdin else { panic!("not inherited") };
        let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
        assert_eq!(inode(&fd), inode(&reader.into()));
        assert!(stand_in.is_some());
    }

    #[test]
    fn descriptors_that_are_not_there_are_named() {
        let pid = std::process::id();
        for (name, problem) in [
            ("fd://x/1".to_owned(), "fd://PID/NUMBER"),
            ("fd://0/1".to_owned(), "cannot open process 0"),
            (format!("fd://{pid}/100000"), "cannot duplicate"),
        ] {
            let message = refusal(&name, "");
            assert!(message.contains(&name) && message.contains(problem), "{message}");
        }
        let message = refusal(&format!("fd://{pid}/0"), "fd://1/0");
        assert!(message.contains("of one process"), "{message}");
    }
}
