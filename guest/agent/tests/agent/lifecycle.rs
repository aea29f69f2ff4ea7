//! A container's states, and what remains after its end.

use ttrpc::Code;

use crate::support::{Guest, Spec, status};

#[tokio::test]
async fn configure_returns_kernel_and_agent() {
    let guest = Guest::start().await;
    let answer = guest.configure().await.unwrap();
    assert!(answer.kernel_release.starts_with(|c: char| c.is_ascii_digit()), "{answer:?}");
    assert_eq!(answer.agent_version, env!("CARGO_PKG_VERSION"));
    assert!(guest.shutdown().await.success());
}

#[tokio::test]
async fn a_whole_life() {
    let mut guest = Guest::start().await;
    let output = guest.run(&Spec::sh("echo out; echo err >&2; exit 3")).await;
    assert_eq!((output.code, &*output.stdout, &*output.stderr), (3, "out\n", "err\n"));
    assert_eq!(guest.containers_left(), 0);
    let again = guest.run(&Spec::new(&["true"])).await;
    assert_eq!(again.code, 0);
    assert!(guest.shutdown().await.success());
}

#[tokio::test]
async fn start_twice_and_delete_while_running_are_refused() {
    let guest = Guest::start().await;
    guest.create("a", &Spec::new(&["sleep", "1000"])).await.unwrap();
    assert_eq!(status(guest.create("a", &Spec::new(&["true"])).await).0, Code::ALREADY_EXISTS);
    guest.start_container("a").await.unwrap();
    assert_eq!(status(guest.start_container("a").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(status(guest.delete("a").await).0, Code::FAILED_PRECONDITION);
    guest.signal("a", libc::SIGKILL, false).await.unwrap();
    let ended = guest.wait("a").await;
    assert_eq!(ended.exit_status, 137);
    assert_eq!(
        status(guest.signal("a", libc::SIGTERM, false).await),
        (Code::NOT_FOUND, "process already finished".into())
    );
    guest.delete("a").await.unwrap();
    guest.delete("a").await.unwrap();
    assert_eq!(status(guest.start_container("a").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn a_container_that_never_started_is_deleted() {
    let guest = Guest::start().await;
    guest.create("a", &Spec::new(&["true"])).await.unwrap();
    guest.delete("a").await.unwrap();
    assert_eq!(guest.containers_left(), 0);
}
