//! Streams on descriptors that the caller has passed on.

use std::{
    fs::File,
    io::Seek,
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rustix::{
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{OptionalActions, tcgetattr, tcsetattr},
};

use super::*;

fn inherit(stdin: Option<OwnedFd>, outputs: [Option<OwnedFd>; 2], terminal: bool) -> HostStdio {
    let source = |fd: Option<OwnedFd>| fd.map_or(StdioSource::Null, StdioSource::Inherited);
    let [stdout, stderr] = outputs.map(source);
    let stdio = ProcessStdio { stdin: source(stdin), stdout, stderr, terminal };
    assert_eq!(stdio.names(), StdioNames { terminal, ..StdioNames::default() });
    HostStdio::open(&stdio, &owner()).unwrap()
}

/// Starts to copy an inherited stdin. Returns the guest's end, and the count at the end of the input.
fn start(stdin: OwnedFd, terminal: bool) -> (DuplexStream, oneshot::Receiver<u64>, StdinCopy) {
    let host = inherit(Some(stdin), [None, None], terminal);
    let (to_guest, guest) = duplex(1 << 20);
    let (from_guest, to_guest) = tokio::io::split(to_guest);
    let (ended, total) = oneshot::channel();
    // CloseIO does not end a stream that the caller ends.
    let end = StdinEnd { closed: watch::Sender::new(true).subscribe(), terminal };
    let reader = host.stdin.unwrap().open().unwrap();
    let copy =
        StdinCopy::start(reader, end, from_guest, to_guest, async move |count| ended.send(count).unwrap());
    (guest, total, copy)
}

/// What the guest receives from an inherited stdin until its end.
async fn received(stdin: OwnedFd) -> Vec<u8> {
    let (mut guest, total, _copy) = start(stdin, false);
    let mut text = vec![0; total.await.unwrap().try_into().unwrap()];
    guest.read_exact(&mut text).await.unwrap();
    text
}

/// Sends a text from the guest to an inherited output, and closes the output.
async fn send(sink: Option<OutputSink>, text: &str) {
    let (mut guest, from_guest) = duplex(1 << 20);
    let output = OutputCopy::to("stdout", from_guest, sink.unwrap());
    guest.write_all(text.as_bytes()).await.unwrap();
    output.finish(text.len() as u64).await.unwrap();
}

fn blocks(fd: &impl std::os::fd::AsFd) -> bool {
    let flags = fcntl(fd, FcntlArg::F_GETFL).unwrap();
    !OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK)
}

#[tokio::test]
async fn three_pipes_carry_the_streams_to_their_ends() {
    let (stdin, mut writer) = io::pipe().unwrap();
    let theirs = stdin.try_clone().unwrap();
    let text = tokio::task::spawn_blocking(move || {
        // More than a pipe holds, in parts.
        let part = vec![b'x'; 100_000];
        (0..3).for_each(|_| writer.write_all(&part).unwrap());
    });
    assert_eq!(received(stdin.into()).await.len(), 300_000);
    text.await.unwrap();
    assert!(blocks(&theirs), "the caller's description was changed");
    let (mut stdout, to_stdout) = io::pipe().unwrap();
    let (mut stderr, to_stderr) = io::pipe().unwrap();
    let host = inherit(None, [Some(to_stdout.into()), Some(to_stderr.into())], false);
    send(host.stdout, "out").await;
    send(host.stderr, "err").await;
    let (mut out, mut err) = (String::new(), String::new());
    // The ends arrive, so no writing end is left.
    stdout.read_to_string(&mut out).unwrap();
    stderr.read_to_string(&mut err).unwrap();
    assert_eq!((out.as_str(), err.as_str()), ("out", "err"));
}

#[tokio::test]
async fn a_pipe_that_is_full_is_waited_for() {
    let (mut stdout, to_stdout) = io::pipe().unwrap();
    let host = inherit(None, [Some(to_stdout.into()), None], false);
    let reader = tokio::task::spawn_blocking(move || {
        let mut text = Vec::new();
        stdout.read_to_end(&mut text).unwrap();
        text
    });
    send(host.stdout, &"y".repeat(300_000)).await;
    assert_eq!(reader.await.unwrap().len(), 300_000);
}

#[tokio::test]
async fn a_file_keeps_its_position_for_all_that_have_it_open() {
    let (mut log, input) = (tempfile::tempfile().unwrap(), tempfile::NamedTempFile::new().unwrap());
    log.write_all(b"before ").unwrap();
    let outputs = [Some(log.try_clone().unwrap().into()), Some(log.try_clone().unwrap().into())];
    let host = inherit(None, outputs, false);
    send(host.stdout, "out ").await;
    send(host.stderr, "err ").await;
    log.write_all(b"after").unwrap();
    let mut text = String::new();
    log.rewind().unwrap();
    log.read_to_string(&mut text).unwrap();
    assert_eq!(text, "before out err after");
    std::fs::write(input.path(), "a file").unwrap();
    assert_eq!(received(File::open(input.path()).unwrap().into()).await, b"a file");
}

#[tokio::test]
async fn a_socket_is_used_in_both_directions_without_a_change_of_its_mode() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"to the guest").unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(received(ours.try_clone().unwrap().into()).await, b"to the guest");
    let host = inherit(None, [Some(ours.try_clone().unwrap().into()), None], false);
    send(host.stdout, "from the guest").await;
    assert!(blocks(&ours), "the socket was changed");
    drop(ours);
    let mut text = String::new();
    theirs.read_to_string(&mut text).unwrap();
    assert_eq!(text, "from the guest");
}

#[tokio::test]
async fn a_terminal_has_one_output_and_ends_when_it_is_hung_up() {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let path = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    let slave: OwnedFd =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path).unwrap().into();
    let mut master = File::from(master);
    let mut mode = tcgetattr(&slave).unwrap();
    mode.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &mode).unwrap();
    let fd = || Some(slave.try_clone().unwrap());
    let host = inherit(fd(), [fd(), fd()], true);
    assert!(host.terminal && host.stderr.is_none());
    send(host.stdout, "shown\r\n").await;
    let mut shown = [0; 7];
    master.read_exact(&mut shown).unwrap();
    assert_eq!(&shown, b"shown\r\n");
    let (mut guest, total, _copy) = start(fd().unwrap(), true);
    master.write_all(b"typed").unwrap();
    let mut typed = [0; 5];
    guest.read_exact(&mut typed).await.unwrap();
    assert_eq!(&typed, b"typed");
    drop(master);
    assert_eq!(total.await.unwrap(), 5);
    assert!(blocks(&slave), "the terminal was changed");
}

#[tokio::test]
async fn dev_null_is_an_empty_input_and_takes_all_output() {
    let null = || OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
    assert_eq!(received(null().into()).await, b"");
    let host = inherit(None, [Some(null().into()), None], false);
    send(host.stdout, "dropped").await;
}

#[tokio::test]
async fn a_pipe_that_no_process_reads_is_reported() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let host = inherit(None, [Some(writer.into()), None], false);
    let (mut guest, from_guest) = duplex(4096);
    let output = OutputCopy::to("stdout", from_guest, host.stdout.unwrap());
    guest.write_all(b"text").await.unwrap();
    let error = output.finish(4).await.unwrap_err();
    assert!(error.contains("stdout could not be delivered: Broken pipe"), "{error}");
}

#[tokio::test]
async fn a_descriptor_that_cannot_be_opened_again_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = fifo(&dir, "out");
    let both = OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    let writer = OpenOptions::new().write(true).open(&fifo).unwrap();
    drop(both);
    let stdout = StdioSource::Inherited(writer.into());
    let stdio = ProcessStdio { stdout, ..ProcessStdio::default() };
    let error = HostStdio::open(&stdio, &owner()).unwrap_err();
    assert_eq!(error.to_string(), "cannot use the inherited descriptor of stdout");
}
