//! Calls for the cgroup of a running container. They need no controller, so they behave the same on a host as
//! in a VM.

use machinen_protocol::api;
use ttrpc::Code;

use crate::support::{Guest, Spec, container, context, status, within};

fn file(name: &str, content: &str) -> api::CgroupFile {
    api::CgroupFile { name: name.into(), content: content.into(), ..Default::default() }
}

async fn write(guest: &Guest, files: &[api::CgroupFile]) -> ttrpc::Result<api::Empty> {
    let request =
        api::WriteCgroupRequest { container_id: "c".into(), files: files.to_vec(), ..Default::default() };
    guest.agent.write_cgroup(context(), &request).await
}

async fn read(guest: &Guest, name: &str) -> ttrpc::Result<Option<String>> {
    let request = api::ReadCgroupRequest {
        container_id: "c".into(),
        names: vec![name.into(), "memory.no-such-file".into()],
        ..Default::default()
    };
    let files = guest.agent.read_cgroup(context(), &request).await?.files;
    assert!(files.len() <= 1, "{files:?}");
    Ok(files.into_iter().next().map(|file| file.content))
}

async fn frozen(guest: &Guest) -> bool {
    read(guest, "cgroup.events").await.unwrap().unwrap().lines().any(|line| line == "frozen 1")
}

#[tokio::test]
async fn a_paused_container_can_be_resumed_and_killed() {
    let guest = Guest::start().await;
    guest.create("c", &Spec::sh("while :; do :; done")).await.unwrap();
    guest.start_container("c").await.unwrap();
    assert!(!frozen(&guest).await);
    for _ in 0..3 {
        guest.agent.pause_container(context(), &container("c")).await.unwrap();
        assert!(frozen(&guest).await);
        guest.agent.resume_container(context(), &container("c")).await.unwrap();
        assert!(!frozen(&guest).await);
    }
    guest.agent.pause_container(context(), &container("c")).await.unwrap();
    guest.signal("c", libc::SIGTERM, false).await.unwrap();
    guest.signal("c", libc::SIGKILL, false).await.unwrap();
    assert_eq!(within(guest.wait("c")).await.exit_status, 137);
    let (code, _) = status(guest.agent.pause_container(context(), &container("c")).await);
    assert_eq!(code, Code::NOT_FOUND);
    guest.delete("c").await.unwrap();
    assert!(guest.shutdown().await.success());
}

#[tokio::test]
async fn a_paused_guest_is_shut_down() {
    let guest = Guest::start().await;
    guest.create("c", &Spec::new(&["sleep", "1000"])).await.unwrap();
    guest.start_container("c").await.unwrap();
    guest.agent.pause_container(context(), &container("c")).await.unwrap();
    assert!(guest.shutdown().await.success());
}

#[tokio::test]
async fn limits_are_all_taken_or_none() {
    let guest = Guest::start().await;
    guest.create("c", &Spec::new(&["sleep", "1000"])).await.unwrap();
    guest.start_container("c").await.unwrap();
    write(&guest, &[file("cgroup.max.depth", "3")]).await.unwrap();
    assert_eq!(read(&guest, "cgroup.max.depth").await.unwrap().as_deref(), Some("3\n"));
    let both = [file("cgroup.max.depth", "5"), file("cgroup.max.descendants", "many")];
    let (code, text) = status(write(&guest, &both).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("cgroup.max.descendants") && text.contains("many"), "{text}");
    assert_eq!(read(&guest, "cgroup.max.depth").await.unwrap().as_deref(), Some("3\n"));
    for (name, code) in [
        ("memory.no-such-file", Code::UNIMPLEMENTED),
        ("../cgroup.procs", Code::INVALID_ARGUMENT),
        ("child/pids.max", Code::INVALID_ARGUMENT),
    ] {
        assert_eq!(status(write(&guest, &[file(name, "1")]).await).0, code, "{name}");
    }
    assert_eq!(status(read(&guest, "/etc/passwd").await).0, Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn watching_memory_ends_with_the_container() {
    let guest = Guest::start().await;
    guest.create("c", &Spec::new(&["true"])).await.unwrap();
    let request = api::WaitOutOfMemoryRequest { container_id: "c".into(), ..Default::default() };
    let watch = guest.agent.wait_out_of_memory(context(), &request);
    let (answer, started) = tokio::join!(watch, guest.start_container("c"));
    started.unwrap();
    let answer = answer.unwrap();
    assert!(answer.ended && answer.killed == 0, "{answer:?}");
}
