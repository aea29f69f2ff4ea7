//! Decodes how containerd names the standard streams of a process: by three texts, which are empty for
//! /dev/null.

use containerd_shim_protos::ttrpc;
use machinen::pod::stdio::{ProcessStdio, StdioSource, StreamUri};

use crate::error::to_ttrpc;

/// # Errors
/// A name is not understood.
pub(crate) fn decode(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> ttrpc::Result<ProcessStdio> {
    let source = |stream, name: &str| match name {
        "" => Ok(StdioSource::Null),
        name => StreamUri::parse(stream, name).map(StdioSource::Named).map_err(|error| to_ttrpc(&error)),
    };
    Ok(ProcessStdio {
        stdin: source("stdin", stdin)?,
        stdout: source("stdout", stdout)?,
        stderr: source("stderr", stderr)?,
        terminal,
    })
}

/// Encodes the name of a stream.
pub(crate) fn name(uri: Option<&StreamUri>) -> String {
    uri.map(StreamUri::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::ttrpc::Code;

    use super::*;

    #[test]
    fn an_empty_name_is_null_and_others_are_kept() {
        let stdio = decode("/in", "binary:///l?a=b", "", true).unwrap();
        assert!(matches!(stdio.stderr, StdioSource::Null));
        let names = stdio.names();
        let text = [&names.stdin, &names.stdout, &names.stderr].map(|uri| name(uri.as_ref()));
        assert_eq!((text, names.terminal), (["/in", "binary:///l?a=b", ""].map(str::to_owned), true));
    }

    #[test]
    fn a_name_that_is_not_understood_is_an_invalid_argument() {
        let Err(ttrpc::Error::RpcStatus(status)) = decode("", "relative", "", false) else {
            panic!("accepted")
        };
        assert_eq!(status.code.enum_value(), Ok(Code::INVALID_ARGUMENT));
        assert!(status.message.contains("stdout \"relative\" is not understood"), "{status:?}");
    }
}
