//! Asks the server of a private host to run a program.

use std::{
    env,
    io::{IoSlice, Read, Write},
    net::Shutdown,
    os::{
        fd::AsRawFd,
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::Path,
};

use anyhow::{Context, Result};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::{Deserialize, Serialize};

/// What is to run, with bytes because nothing has to be UTF-8. The standard streams travel with its first byte.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Returns the program's status.
pub(crate) fn run(socket: &Path, program: &[&str]) -> Result<u8> {
    let failed = || format!("cannot ask {}", socket.display());
    let mut connection = UnixStream::connect(socket).with_context(failed)?;
    let bytes = |text: &std::ffi::OsStr| text.as_bytes().to_vec();
    let request = Request {
        args: program.iter().map(|&arg| arg.to_owned()).collect(),
        env: env::vars_os().map(|(name, value)| (bytes(&name), bytes(&value))).collect(),
    };
    let request = serde_json::to_vec(&request)?;
    let streams =
        [std::io::stdin().as_raw_fd(), std::io::stdout().as_raw_fd(), std::io::stderr().as_raw_fd()];
    let first = [IoSlice::new(&request[..1])];
    let control = [ControlMessage::ScmRights(&streams)];
    sendmsg::<()>(connection.as_raw_fd(), &first, &control, MsgFlags::empty(), None).with_context(failed)?;
    connection.write_all(&request[1..]).with_context(failed)?;
    connection.shutdown(Shutdown::Write).with_context(failed)?;
    let mut status = String::new();
    connection.read_to_string(&mut status).with_context(failed)?;
    status.parse().with_context(|| format!("{} could not be run: {status}", program[0]))
}
