//! The monitor client against a scripted peer.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream as StdUnixStream,
};

use tokio::io::AsyncWriteExt as _;

use super::*;

pub(crate) const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}"#;

/// QEMU's side: answers each command with the next of `answers` (`$ID` is the command's id), then closes.
pub(crate) async fn qemu(socket: StdUnixStream, greeting: &str, answers: &[&str]) -> Vec<Value> {
    socket.set_nonblocking(true).unwrap();
    let (reader, mut writer) = UnixStream::from_std(socket).unwrap().into_split();
    writer.write_all(format!("{greeting}\r\n").as_bytes()).await.unwrap();
    let mut lines = BufReader::new(reader).lines();
    let mut commands = Vec::new();
    for answer in answers {
        let Some(line) = lines.next_line().await.unwrap() else { break };
        let command: Value = serde_json::from_str(&line).unwrap();
        let answer = answer.replace("$ID", &command["id"].to_string());
        commands.push(command);
        writer.write_all(format!("{answer}\r\n").as_bytes()).await.unwrap();
    }
    commands
}

pub(crate) const OK: &str = r#"{"return": {}, "id": $ID}"#;

#[tokio::test]
async fn commands_answers_and_events() {
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    let events = r#"{"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 2}}
{"event": "DEVICE_DELETED", "data": {"path": "/machine/x"}}
{"event": "DEVICE_DELETED", "data": {"device": "disk-1", "path": "/machine/x"}}
{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}
{"return": {"a": 1}, "id": $ID}"#;
    let refusal = r#"{"error": {"class": "GenericError", "desc": "no such thing"}, "id": $ID}"#;
    let client = async {
        let (qmp, mut received) = Qmp::connect(ours).await.unwrap();
        assert_eq!(qmp.version().to_string(), "7.2.22");
        let answer = qmp.execute("query", json!({ "x": [1] })).await.unwrap();
        assert_eq!(answer, json!({ "a": 1 }));
        let error = qmp.execute("device_del", json!({})).await.unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused device_del: no such thing (GenericError)");
        assert_eq!(received.recv().await, Ok(QmpEvent::DeviceDeleted("disk-1".into())));
        let shutdown = QmpEvent::Shutdown { reason: "guest-reset".into() };
        assert_eq!(received.recv().await, Ok(shutdown));
        assert!(matches!(qmp.execute("quit", json!({})).await, Err(QmpError::Closed)));
        assert_eq!(received.recv().await, Err(broadcast::error::RecvError::Closed));
    };
    let answers = [OK, events, refusal];
    let ((), commands) = tokio::join!(client, qemu(theirs, GREETING, &answers));
    assert_eq!(commands[0], json!({ "execute": "qmp_capabilities", "arguments": {}, "id": 0 }));
    assert_eq!(commands[1], json!({ "execute": "query", "arguments": { "x": [1] }, "id": 1 }));
}

#[tokio::test]
async fn an_old_qemu_is_named() {
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    let old = GREETING.replace(r#""minor": 2"#, r#""minor": 1"#);
    let (connected, _) = tokio::join!(Qmp::connect(ours), qemu(theirs, &old, &[]));
    let error = connected.unwrap_err();
    assert!(error.to_string().starts_with("QEMU 7.1.22 is too old, 7.2.0 or newer is needed"), "{error}");
}

#[tokio::test]
async fn a_first_message_that_is_not_a_greeting_is_an_error() {
    for (greeting, expected) in [("{}", "not a greeting"), ("hello", "not QMP")] {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let (connected, _) = tokio::join!(Qmp::connect(ours), qemu(theirs, greeting, &[]));
        let error = connected.unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    drop(theirs);
    assert!(matches!(Qmp::connect(ours).await, Err(QmpError::Closed | QmpError::Io(_))));
}

#[tokio::test]
async fn an_endless_line_is_cut_off() {
    let mut lines = Lines { reader: BufReader::new(tokio::io::repeat(b'x')), line: Vec::new() };
    let Err(error) = lines.next().await else { panic!("an endless line was accepted") };
    assert!(error.to_string().contains("longer than"), "{error}");
}

#[tokio::test]
async fn a_descriptor_travels_with_its_command() {
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    let (mut pipe, writer) = io::pipe().unwrap();
    let server = tokio::task::spawn_blocking(move || {
        let mut theirs = theirs;
        theirs.write_all(format!("{GREETING}\n").as_bytes()).unwrap();
        let mut buffer = [0; 4096];
        let count = theirs.read(&mut buffer).unwrap();
        assert!(buffer[..count].ends_with(b"\n"));
        theirs.write_all(OK.replace("$ID", "0\n").replace("\n}", "}\n").as_bytes()).unwrap();

        use std::os::fd::AsRawFd as _;

        use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
        let mut control = nix::cmsg_space!([std::os::fd::RawFd; 4]);
        let mut slices = [io::IoSliceMut::new(&mut buffer)];
        let message =
            recvmsg::<()>(theirs.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::empty()).unwrap();
        let fds: Vec<_> = message
            .cmsgs()
            .unwrap()
            .filter_map(|message| match message {
                ControlMessageOwned::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        assert_eq!(fds.len(), 1);
        std::fs::write(format!("/proc/self/fd/{}", fds[0]), b"through").unwrap();
        nix::unistd::close(fds[0]).unwrap();
        theirs.write_all(b"{\"return\": {}, \"id\": 1}\n").unwrap();
    });
    let (qmp, _events) = Qmp::connect(ours).await.unwrap();
    qmp.execute_with_fd("add-fd", json!({ "fdset-id": 2 }), writer.into()).await.unwrap();
    server.await.unwrap();
    let mut text = String::new();
    pipe.read_to_string(&mut text).unwrap();
    assert_eq!(text, "through");
}
