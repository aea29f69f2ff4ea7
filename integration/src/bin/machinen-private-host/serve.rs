//! Runs programs for others, as children of this process.

use std::{
    ffi::OsString,
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStringExt,
            net::{UnixListener, UnixStream},
            process::ExitStatusExt,
        },
    },
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{private_host::READY, sys};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::run::Request;

/// Serves until this process is killed.
pub(crate) fn serve(socket: &Path) -> Result<()> {
    let listener =
        UnixListener::bind(socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
    eprintln!("{READY}");
    for connection in listener.incoming() {
        let mut connection = connection.context("cannot accept a connection")?;
        thread::spawn(move || {
            let answer = answer(&mut connection).unwrap_or_else(|error| format!("{error:#}"));
            // Without the other side there is no reader of the status.
            let _gone = connection.write_all(answer.as_bytes());
        });
    }
    Ok(())
}

fn answer(connection: &mut UnixStream) -> Result<String> {
    let mut child = start(connection)?;
    let end = sys::pidfd_open(child.id()).context("cannot watch a child")?;
    let mut fds = [
        PollFd::new(end.as_fd(), PollFlags::POLLIN),
        // The other side has said everything: only its end is an event, which poll(2) reports always.
        PollFd::new(connection.as_fd(), PollFlags::empty()),
    ];
    poll(&mut fds, PollTimeout::NONE).context("cannot wait for a child")?;
    if !fds[0].any().unwrap_or(false) {
        child.kill().context("cannot kill a child")?;
    }
    Ok(status_of(child.wait().context("cannot wait for a child")?).to_string())
}

fn start(connection: &mut UnixStream) -> Result<Child> {
    let mut first = [0];
    let (count, streams) = sys::receive_with_fds(connection, &mut first).context("no request")?;
    ensure!(count == 1, "an empty request");
    let mut request = first.to_vec();
    connection.read_to_end(&mut request).context("half a request")?;
    let request: Request = serde_json::from_slice(&request).context("not a request")?;
    let [stdin, stdout, stderr]: [OwnedFd; 3] =
        streams.try_into().map_err(|_| anyhow::anyhow!("not three streams"))?;
    let (program, args) = request.args.split_first().context("no program")?;
    let env = request.env.into_iter();
    #[expect(clippy::disallowed_methods, reason = "this program is the supervisor")]
    let child = Command::new(program)
        .args(args)
        .env_clear()
        .envs(env.map(|(name, value)| (OsString::from_vec(name), OsString::from_vec(value))))
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::from(stdout))
        .stderr(Stdio::from(stderr))
        .spawn();
    child.with_context(|| format!("cannot execute {program}"))
}

/// 128+n when signal n ended it.
fn status_of(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}
