//! Terminals of inits and of other processes.

use machinen_protocol::api;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;

use crate::support::{Guest, PATIENCE, RawStream, Spec, status, within};

/// Reads until the text appears.
async fn expect(stream: &mut RawStream, wanted: &str) -> String {
    let mut seen = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&seen).into_owned();
        if text.contains(wanted) {
            return text;
        }
        let read = tokio::time::timeout(PATIENCE, stream.read_buf(&mut seen)).await;
        assert!(matches!(read, Ok(Ok(1..))), "{read:?} instead of {wanted:?}, after {text:?}");
    }
}

async fn terminal(guest: &mut Guest) -> (api::Stdio, RawStream, RawStream) {
    let (stdin, to_stdin) = guest.stream().await;
    let (stdout, from_stdout) = guest.stream().await;
    (api::Stdio { stdin, stdout, terminal: true, ..Default::default() }, to_stdin, from_stdout)
}

fn sized(script: &str) -> Spec {
    Spec::sh(script).with(|spec| spec["process"]["consoleSize"] = json!({"height": 33, "width": 77}))
}

/// Checks what holds for every terminal.
const SESSION: &str = "stty size; tty; tty </dev/tty; trap 'stty size; resized=yes' WINCH; echo ready; \
                       while [ -z \"$resized\" ]; do sleep 0.05; done; echo resized; \
                       while read -r line; do echo \"got $line\"; done; echo end; exit 5";

async fn session(guest: &Guest, exec: &str, mut input: RawStream, mut output: RawStream) {
    // Carriage returns show that it is a terminal.
    let seen = expect(&mut output, "ready\r\n").await;
    assert!(seen.starts_with("33 77\r\n/dev/pts/"), "{seen:?}");
    assert!(seen.contains("/dev/tty\r\n"), "{seen:?}");
    guest.resize("c", exec, 120, 40).await.unwrap();
    let seen = expect(&mut output, "resized\r\n").await;
    assert!(seen.starts_with("40 120\r\n"), "{seen:?}");
    input.write_all(b"hello\n").await.unwrap();
    let seen = expect(&mut output, "got hello\r\n").await;
    assert!(seen.starts_with("hello\r\n"), "the terminal does not echo: {seen:?}");
    input.write_all(b"\x04").await.unwrap();
    expect(&mut output, "end\r\n").await;
    let ended = within(guest.wait_exec("c", exec)).await;
    assert_eq!((ended.exit_status, ended.stderr_bytes), (5, 0));
    assert_eq!(status(guest.resize("c", exec, 1, 1).await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn an_init_has_a_terminal() {
    let mut guest = Guest::start().await;
    let (stdio, input, output) = terminal(&mut guest).await;
    guest.create_with("c", &sized(SESSION), stdio).await.unwrap();
    guest.start_container("c").await.unwrap();
    session(&guest, "", input, output).await;
    guest.delete("c").await.unwrap();
}

#[tokio::test]
async fn another_process_has_one_too() {
    let mut guest = Guest::start().await;
    guest.idle("c", &Spec::new(&["sleep", "1000"])).await;
    let (stdio, input, output) = terminal(&mut guest).await;
    guest.exec_with("c", "e", &sized(SESSION), stdio).await.unwrap();
    session(&guest, "e", input, output).await;
    guest.delete_exec("c", "e").await.unwrap();
}

#[tokio::test]
async fn the_console_is_the_inits_terminal() {
    let mut guest = Guest::start().await;
    let (stdio, _input, mut output) = terminal(&mut guest).await;
    let user = |spec: &mut serde_json::Value| spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let script = "echo one >/dev/stdout; ls -l $(tty); echo two";
    guest.create_with("c", &sized(script).with(user), stdio).await.unwrap();
    guest.start_container("c").await.unwrap();
    let seen = expect(&mut output, "two\r\n").await;
    assert!(seen.starts_with("one\r\n") && seen.contains(" me "), "{seen:?}");
    within(guest.wait("c")).await;
    guest.delete("c").await.unwrap();
    let (stdio, _input, mut output) = terminal(&mut guest).await;
    guest.create_with("c", &sized("echo hello >/dev/console"), stdio).await.unwrap();
    guest.start_container("c").await.unwrap();
    expect(&mut output, "hello\r\n").await;
}

#[tokio::test]
async fn a_host_that_goes_away_hangs_the_terminal_up() {
    let mut guest = Guest::start().await;
    guest.idle("c", &Spec::new(&["sleep", "1000"])).await;
    let (stdio, input, mut output) = terminal(&mut guest).await;
    let script = "trap 'touch /tmp/hup; exit 9' HUP; echo ready; while :; do echo more; sleep 0.05; done";
    guest.exec_with("c", "e", &sized(script), stdio).await.unwrap();
    expect(&mut output, "ready").await;
    drop((input, output));
    assert_eq!(within(guest.wait_exec("c", "e")).await.exit_status, 9);
    assert_eq!(guest.run_in("c", "f", &Spec::new(&["stat", "/tmp/hup"]), b"").await.code, 0);
}

#[tokio::test]
async fn every_byte_before_the_exit_arrives() {
    let mut guest = Guest::start().await;
    guest.idle("c", &Spec::new(&["sleep", "1000"])).await;
    for round in 0..10 {
        let (stdio, _input, mut output) = terminal(&mut guest).await;
        // A surviving process keeps the terminal open.
        let script = "sleep 1000 <&0 & seq 1 2000; echo last words";
        guest.exec_with("c", "e", &sized(script), stdio).await.unwrap();
        let (seen, ended) =
            tokio::join!(expect(&mut output, "last words\r\n"), within(guest.wait_exec("c", "e")));
        assert_eq!(seen.len() as u64, ended.stdout_bytes, "round {round}");
        guest.delete_exec("c", "e").await.unwrap();
    }
}

#[tokio::test]
async fn what_has_no_terminal_is_not_resized() {
    let mut guest = Guest::start().await;
    guest.idle("c", &Spec::new(&["sleep", "1000"])).await;
    assert_eq!(status(guest.resize("c", "", 80, 25).await).0, Code::FAILED_PRECONDITION);
    let (stderr, _stream) = guest.stream().await;
    let stdio = api::Stdio { stderr, terminal: true, ..Default::default() };
    assert_eq!(
        status(guest.exec_with("c", "e", &Spec::new(&["true"]), stdio).await).0,
        Code::INVALID_ARGUMENT
    );
    // A terminal that is not read does not block its process.
    let stdio = api::Stdio { terminal: true, ..Default::default() };
    guest.exec_with("c", "e", &Spec::sh("seq 1 100000; exit 4"), stdio).await.unwrap();
    assert_eq!(within(guest.wait_exec("c", "e")).await.exit_status, 4);
}
