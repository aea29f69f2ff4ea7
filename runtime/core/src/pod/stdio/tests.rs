//! Streams of every kind, with real fifos, files and programs.

use std::{
    fs::OpenOptions,
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
};

use nix::{sys::stat::Mode, unistd::mkfifo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::{oneshot, watch},
};

use super::*;

mod inherited;

fn owner() -> StreamOwner {
    StreamOwner { namespace: "ns".to_owned(), id: "c".to_owned() }
}

/// The names of three streams; an empty one is /dev/null.
#[derive(Default)]
struct Names {
    stdin: String,
    stdout: String,
    stderr: String,
    terminal: bool,
}

fn open(names: Names) -> Result<HostStdio, StdioError> {
    let source = |stream, name: &str| match name {
        "" => StdioSource::Null,
        name => StdioSource::Named(StreamUri::parse(stream, name).unwrap()),
    };
    let stdio = ProcessStdio {
        stdin: source("stdin", &names.stdin),
        stdout: source("stdout", &names.stdout),
        stderr: source("stderr", &names.stderr),
        terminal: names.terminal,
    };
    HostStdio::open(&stdio, &owner())
}

fn fifo(dir: &tempfile::TempDir, name: &str) -> String {
    let path = dir.path().join(name);
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn output_ends_at_the_count_not_at_the_end_of_the_stream() {
    let dir = tempfile::tempdir().unwrap();
    let name = fifo(&dir, "out");
    let host = open(Names { stdout: name.clone(), ..Default::default() }).unwrap();
    let mut reader = std::fs::File::open(&name).unwrap();
    let (mut guest, from_guest) = duplex(4096);
    let output = OutputCopy::start("stdout", from_guest, host.stdout.unwrap());
    guest.write_all(b"hello").await.unwrap();
    output.finish(5).await.unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
}

#[tokio::test]
async fn missing_output_is_reported() {
    let (guest, from_guest) = duplex(4096);
    let output = OutputCopy::start("stdout", from_guest, tokio::io::sink());
    drop(guest);
    assert_eq!(output.finish(5).await.unwrap_err(), "stdout lost bytes: 0 of 5 arrived");
}

#[tokio::test(start_paused = true)]
async fn output_that_never_comes_does_not_hold_up_the_exit() {
    let (mut guest, from_guest) = duplex(4096);
    let output = OutputCopy::start("stdout", from_guest, tokio::io::sink());
    guest.write_all(b"four").await.unwrap();
    let error = output.finish(5).await.unwrap_err();
    assert!(error.contains("only 4 bytes came"), "{error}");
    drop(guest);
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_is_gone_does_not_hold_up_the_exit() {
    let (mut guest, from_guest) = duplex(1 << 20);
    let (sink, unread) = duplex(16);
    let output = OutputCopy::start("stdout", from_guest, sink);
    guest.write_all(&[7; 1000]).await.unwrap();
    let error = output.finish(1000).await.unwrap_err();
    assert!(error.contains("accepts nothing"), "{error}");
    drop(unread);
}

/// Stdin of a process that starts now: the fifo's name, CloseIO, the guest's end, and the count at the end of
/// the input.
struct Fed {
    name: String,
    close: watch::Sender<bool>,
    guest: DuplexStream,
    total: oneshot::Receiver<u64>,
    _input: StdinCopy,
}

impl Fed {
    /// `before` runs when the fifo exists and is not open yet.
    fn start(
        dir: &tempfile::TempDir,
        terminal: bool,
        before: impl FnOnce(&str, &watch::Sender<bool>),
    ) -> Self {
        let name = fifo(dir, "in");
        let host = open(Names { stdin: name.clone(), terminal, ..Default::default() }).unwrap();
        let close = watch::Sender::new(false);
        before(&name, &close);
        let (to_guest, guest) = duplex(1 << 20);
        let (ended, total) = oneshot::channel();
        let end = StdinEnd { closed: close.subscribe(), terminal };
        let input = StdinCopy::start(
            host.stdin.unwrap().open().unwrap(),
            end,
            tokio::io::empty(),
            to_guest,
            async move |count| {
                ended.send(count).unwrap();
            },
        );
        Self { name, close, guest, total, _input: input }
    }

    fn write(&self, text: &str) {
        OpenOptions::new().write(true).open(&self.name).unwrap().write_all(text.as_bytes()).unwrap();
    }

    async fn expect(&mut self, text: &str) {
        let mut buffer = vec![0; text.len()];
        self.guest.read_exact(&mut buffer).await.unwrap();
        assert_eq!(buffer, text.as_bytes());
    }
}

#[tokio::test]
async fn stdin_ends_when_the_caller_closes_it_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let mut fed = Fed::start(&dir, false, |_, _| ());
    for text in ["one ", "two"] {
        // Each writer opens and closes the fifo, as a client that detaches and attaches again.
        fed.write(text);
        fed.expect(text).await;
    }
    assert!(fed.total.try_recv().is_err());
    fed.close.send_replace(true);
    assert_eq!(fed.total.await.unwrap(), 7);
}

#[tokio::test]
async fn a_fifo_has_no_reader_before_the_process_starts() {
    let dir = tempfile::tempdir().unwrap();
    let open_now =
        |name: &str| OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(name).map(drop);
    let fed = Fed::start(&dir, false, |name, _| {
        let refused = open_now(name).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ENXIO));
    });
    open_now(&fed.name).unwrap();
}

#[tokio::test]
async fn stdin_that_was_closed_before_the_start_has_what_is_in_its_fifo() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = None;
    let mut fed = Fed::start(&dir, false, |name, close| {
        let both = OpenOptions::new().read(true).write(true).open(name).unwrap();
        client.insert(both).write_all(b"early").unwrap();
        close.send_replace(true);
    });
    fed.expect("early").await;
    assert!(fed.total.try_recv().is_err());
    drop(client);
    assert_eq!(fed.total.await.unwrap(), 5);
}

#[tokio::test]
async fn stdin_without_a_writer_ends_at_once_when_it_is_closed_before_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let fed = Fed::start(&dir, false, |_, close| _ = close.send_replace(true));
    assert_eq!(fed.total.await.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn stdin_that_no_client_opens_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let fed = Fed::start(&dir, false, |_, _| ());
    assert_eq!(fed.total.await.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_writes_nothing_for_long_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut fed = Fed::start(&dir, false, |_, _| ());
    let mut client = OpenOptions::new().write(true).open(&fed.name).unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(fed.total.try_recv().is_err());
    client.write_all(b"text").unwrap();
    fed.expect("text").await;
    drop(client);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(fed.total.try_recv().is_err());
    fed.close.send_replace(true);
    assert_eq!(fed.total.await.unwrap(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_terminal_waits_for_clients_to_come() {
    let dir = tempfile::tempdir().unwrap();
    let mut fed = Fed::start(&dir, true, |_, _| ());
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(fed.total.try_recv().is_err());
    fed.write("typed");
    fed.expect("typed").await;
}

#[tokio::test]
async fn stdin_that_is_held_stays_with_the_caller() {
    let dir = tempfile::tempdir().unwrap();
    let name = fifo(&dir, "in");
    let host = open(Names { stdin: name.clone(), ..Default::default() }).unwrap();
    // The guest accepts less than what was written.
    let (to_guest, mut guest) = duplex(4);
    let close = watch::Sender::new(false);
    let end = StdinEnd { closed: close.subscribe(), terminal: false };
    let stdin = host.stdin.unwrap().open().unwrap();
    let input = StdinCopy::start(stdin, end, tokio::io::empty(), to_guest, async |_| ());
    let mut writer = OpenOptions::new().write(true).open(&name).unwrap();
    writer.write_all(b"first ").unwrap();
    let mut first = [0; 2];
    guest.read_exact(&mut first).await.unwrap();
    let held = input.hold().await;
    assert_eq!(*held, 6);
    writer.write_all(b"second").unwrap();
    // The bytes that were taken arrive, and no others.
    let mut rest = [0; 4];
    guest.read_exact(&mut rest).await.unwrap();
    assert_eq!([&first[..], &rest].concat(), b"first ");
    tokio::task::yield_now().await;
    assert_eq!(*held, 6);
    drop(held);
    let mut second = [0; 6];
    guest.read_exact(&mut second).await.unwrap();
    assert_eq!(&second, b"second");
}

#[test]
fn a_missing_fifo_and_a_regular_file_are_named() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _guard = runtime.enter();
    let names = Names { stdout: "/nonexistent/out".to_owned(), ..Default::default() };
    assert_eq!(open(names).unwrap_err().to_string(), "cannot open stdout /nonexistent/out");
    let file = tempfile::NamedTempFile::new().unwrap();
    let names = Names { stdin: file.path().to_str().unwrap().to_owned(), ..Default::default() };
    assert!(matches!(open(names), Err(StdioError::NotFifo { stream: "stdin", .. })));
}

#[tokio::test]
async fn a_file_is_made_and_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a b/log");
    let name = format!("file://{}/a%20b/log", dir.path().display());
    for text in ["one ", "two"] {
        let names = Names { stdout: name.clone(), stderr: name.clone(), ..Default::default() };
        let host = open(names).unwrap();
        let (mut guest, from_guest) = duplex(4096);
        let output = OutputCopy::start("stdout", from_guest, host.stdout.unwrap());
        guest.write_all(text.as_bytes()).await.unwrap();
        output.finish(text.len() as u64).await.unwrap();
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), "one two");
}

/// Runs a script as the logging program of a process that writes "out" and "err". Returns what the script has
/// written to $1.
async fn log_with(scheme: &str, script: &str) -> Result<String, StdioError> {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let query: String = form_urlencoded::Serializer::new(String::new())
        .append_pair("-c", script)
        .append_pair("sh", log.to_str().unwrap())
        .finish();
    let name = format!("{scheme}:///bin/sh?{query}");
    let mut host = open(Names { stdout: name.clone(), stderr: name, ..Default::default() })?;
    host.ready().await?;
    for (sink, text) in [(host.stdout, "out"), (host.stderr, "err")] {
        let (mut guest, from_guest) = duplex(4096);
        let output = OutputCopy::start("stdout", from_guest, sink.unwrap());
        guest.write_all(text.as_bytes()).await.unwrap();
        output.finish(3).await.unwrap();
    }
    host.logger.unwrap().finish().await;
    Ok(std::fs::read_to_string(log).unwrap())
}

#[tokio::test]
async fn a_logging_program_gets_both_streams_its_environment_and_an_end() {
    let script = "exec 5>&-; (env | sort | grep CONTAINER; cat <&3; cat <&4) >$1";
    let logged = log_with("binary", script).await.unwrap();
    assert_eq!(logged, "CONTAINER_ID=c\nCONTAINER_NAMESPACE=ns\nouterr");
}

#[tokio::test]
async fn a_program_of_binary_v2_reports_that_it_is_ready() {
    let logged = log_with("binary-v2", "echo >&5; cat <&3 >$1; cat <&4 >>$1").await.unwrap();
    assert_eq!(logged, "outerr");
    let error = log_with("binary-v2", "exec 5>&-; cat <&3").await.unwrap_err();
    assert!(matches!(error, StdioError::LoggerSilent { .. }), "{error}");
}

#[tokio::test]
async fn a_missing_program_is_named() {
    let names = Names { stdout: "binary:///no/logger".to_owned(), ..Default::default() };
    let error = open(names).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(machinen_base::error::chain(&error).contains("/no/logger not found"), "{error:?}");
}
