//! Takes the place of QEMU where a test has a [`FakeVmm`](machinen_integration::fake::FakeVmm).
//!
//! Like QEMU, this program runs as a user without privileges. It therefore only passes what it was given to
//! the test: its monitor, console and channel, and its arguments. The test answers when this process has to
//! end, and how.

use std::{
    env,
    io::{IoSlice, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::ExitCode,
};

use anyhow::{Context, Result};
use machinen_integration::{fake, sys};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

fn main() -> ExitCode {
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("fake-qemu: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<u8> {
    let args: Vec<String> = env::args().collect();
    let dir = Path::new(&args[0]).parent().context("no directory in the program's name")?;
    let mut broker = UnixStream::connect(dir.join(fake::SOCKET)).context("cannot reach the test")?;
    let inherited = fake::inherited_sockets(&args)?;
    let fds: Vec<OwnedFd> = inherited
        .into_iter()
        .map(sys::inherited)
        .collect::<std::io::Result<_>>()
        .context("a descriptor is missing")?;
    let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let text = serde_json::to_vec(&args)?;
    let (first, rest) = text.split_at(1);
    // The descriptors travel with the first byte.
    let rights = [ControlMessage::ScmRights(&raw)];
    sendmsg::<()>(broker.as_raw_fd(), &[IoSlice::new(first)], &rights, MsgFlags::empty(), None)
        .context("cannot hand over the descriptors")?;
    broker.write_all(rest).context("cannot hand over the arguments")?;
    broker.shutdown(Shutdown::Write).context("cannot finish the handing over")?;
    // The received descriptors are still open under their numbers; a VM that has ended has closed all of
    // them.
    drop(fds);
    let mut end = Vec::new();
    broker.read_to_end(&mut end).context("the test is gone")?;
    let (code, words) = end.split_first().context("the test gave no exit code")?;
    std::io::stderr().write_all(words).context("cannot write the last words")?;
    Ok(*code)
}
