//! Standard streams: their bytes, their ends, and peers that misbehave.

use std::time::Duration;

use machinen_protocol::{
    MAX_UNCLAIMED_STREAMS, api,
    preamble::{Answer, Preamble, StreamKind},
};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;

use crate::support::{Guest, Spec, status, within};

#[tokio::test]
async fn megabytes_both_ways() {
    let mut guest = Guest::start().await;
    let input: Vec<u8> = (0..5_000_000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    let output = guest.run_with_input(&Spec::sh("cat >/tmp/f; cat /tmp/f; cat /tmp/f >&2"), &input).await;
    assert_eq!(output.code, 0);
    assert!(output.stdout == String::from_utf8_lossy(&input) && output.stderr == output.stdout);
}

#[tokio::test]
async fn stdin_ends_when_the_host_closes_it() {
    let mut guest = Guest::start().await;
    assert_eq!(guest.run_with_input(&Spec::sh("cat; echo end"), b"").await.stdout, "end\n");
    assert_eq!(guest.run_with_input(&Spec::sh("cat; echo end"), b"x").await.stdout, "xend\n");
    // A process that never reads blocks no call.
    assert_eq!(guest.run_with_input(&Spec::new(&["true"]), &[0; 1 << 20]).await.code, 0);
}

#[tokio::test]
async fn an_end_before_what_was_read_is_refused() {
    let mut guest = Guest::start().await;
    let (stdin, mut input) = guest.stream().await;
    let (stdout, mut output) = guest.stream().await;
    let stdio = api::Stdio { stdin, stdout, ..Default::default() };
    guest.create_with("c", &Spec::new(&["cat"]), stdio).await.unwrap();
    guest.start_container("c").await.unwrap();
    input.write_all(b"hello").await.unwrap();
    within(output.read_exact(&mut [0; 5])).await.unwrap();
    assert_eq!(status(guest.end_stdin("c", 3).await).0, Code::INVALID_ARGUMENT);
    guest.end_stdin("c", 5).await.unwrap();
    assert_eq!(guest.wait("c").await.stdout_bytes, 5);
}

#[tokio::test]
async fn without_streams_it_is_dev_null() {
    let guest = Guest::start().await;
    guest.create("c", &Spec::sh("cat && echo out && echo err >&2")).await.unwrap();
    guest.start_container("c").await.unwrap();
    let ended = guest.wait("c").await;
    assert_eq!((ended.exit_status, ended.stdout_bytes, ended.stderr_bytes), (0, 0, 0));
}

#[tokio::test]
async fn a_slow_host_slows_the_process_and_loses_nothing() {
    let mut guest = Guest::start().await;
    let (stdout, mut output) = guest.stream().await;
    let spec = Spec::sh("dd if=/dev/zero bs=65536 count=64 2>/dev/null; echo done > /tmp/done");
    guest.create_with("c", &spec, api::Stdio { stdout, ..Default::default() }).await.unwrap();
    guest.start_container("c").await.unwrap();
    // Much less than 4 MiB is buffered between the process and a host that does not read.
    let waited = tokio::time::timeout(Duration::from_millis(300), guest.wait("c")).await;
    assert!(waited.is_err(), "ended although the output was not read: {waited:?}");
    let mut bytes = vec![1; 64 << 16];
    within(output.read_exact(&mut bytes)).await.unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
    assert_eq!(guest.wait("c").await.stdout_bytes, 64 << 16);
}

#[tokio::test]
async fn a_host_that_goes_away_breaks_the_pipe() {
    let mut guest = Guest::start().await;
    let (stdout, output) = guest.stream().await;
    guest.create_with("c", &Spec::new(&["yes"]), api::Stdio { stdout, ..Default::default() }).await.unwrap();
    guest.start_container("c").await.unwrap();
    drop(output);
    // The kernel does not send SIGPIPE to the init of a pid namespace, but returns the error.
    assert_eq!(within(guest.wait("c")).await.exit_status, 1);
}

#[tokio::test]
async fn processes_that_outlive_the_init_delay_no_call() {
    let mut guest = Guest::start().await;
    let (stdout, mut output) = guest.stream().await;
    // Without a pid namespace, the kernel does not kill the processes that the init leaves behind.
    let spec = Spec::sh("sleep 1000 & echo hi").with(|s| {
        s["linux"]["namespaces"] = json!([{"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]);
    });
    guest.create_with("c", &spec, api::Stdio { stdout, ..Default::default() }).await.unwrap();
    guest.start_container("c").await.unwrap();
    assert_eq!(within(guest.wait("c")).await.stdout_bytes, 3);
    within(output.read_exact(&mut [0; 3])).await.unwrap();
    guest.delete("c").await.unwrap();
}

#[tokio::test]
async fn every_byte_before_the_exit_arrives() {
    let mut guest = Guest::start().await;
    for round in 0..20 {
        let output = guest.run(&Spec::sh("echo -n last words; kill -9 $$")).await;
        // The init of a pid namespace cannot kill itself: it exits as usual.
        assert_eq!((&*output.stdout, output.code), ("last words", 0), "round {round}");
    }
}

#[tokio::test]
async fn streams_are_claimed_once_and_bounded() {
    let mut guest = Guest::start().await;
    let unknown = api::Stdio { stdout: 99, ..Default::default() };
    assert_eq!(
        status(guest.create_with("c", &Spec::new(&["true"]), unknown).await).0,
        Code::INVALID_ARGUMENT
    );
    let mut held = Vec::new();
    for _ in 0..MAX_UNCLAIMED_STREAMS {
        held.push(guest.stream().await);
    }
    let more = Preamble { kind: StreamKind::Raw, token: 1000 };
    assert_eq!(guest.greet(more.encode()).await.1.unwrap(), Answer::Refused);
    let stdio = api::Stdio { stdin: held[0].0, ..Default::default() };
    guest.create_with("c", &Spec::new(&["true"]), stdio.clone()).await.unwrap();
    assert_eq!(guest.greet(more.encode()).await.1.unwrap(), Answer::Accepted);
    assert_eq!(status(guest.create_with("d", &Spec::new(&["true"]), stdio).await).0, Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn other_first_bytes_are_refused() {
    let guest = Guest::start().await;
    let stdio = Preamble { kind: StreamKind::Raw, token: 1 }.encode();
    let mut other_version = stdio;
    other_version[8] = 99;
    assert_eq!(guest.greet(other_version).await.1.unwrap(), Answer::WrongVersion);
    assert_eq!(guest.greet([0; 24]).await.1.unwrap(), Answer::Refused);
    let control = Preamble { kind: StreamKind::Control, token: 0 }.encode();
    assert_eq!(guest.greet(control).await.1.unwrap(), Answer::Refused);
    assert_eq!(
        guest.greet(Preamble { kind: StreamKind::Raw, token: 0 }.encode()).await.1.unwrap(),
        Answer::Refused
    );
    // The agent still works.
    guest.configure().await.unwrap();
}
