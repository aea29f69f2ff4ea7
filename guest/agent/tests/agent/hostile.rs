//! Images and tenants that try to break out, and processes that try to stay.

use std::os::unix::fs::symlink;

use machinen_protocol::api;
use serde_json::json;
use ttrpc::Code;

use crate::support::{Guest, Spec, context, status, within};

#[tokio::test]
async fn links_in_the_image_lead_nowhere_else() {
    let mut guest = Guest::start().await;
    let base = guest.disks.base();
    let outside = tempfile::tempdir().unwrap();
    symlink(outside.path(), base.join("out")).unwrap();
    symlink("../../../../../../..", base.join("up")).unwrap();
    std::fs::remove_file(base.join("etc/passwd")).unwrap();
    symlink("/proc/1/environ", base.join("etc/passwd")).unwrap();
    let spec = Spec::sh("echo $HOME; pwd").with(|s| {
        s["process"]["cwd"] = json!(format!("/up{}/made", outside.path().display()));
    });
    let output = guest.run(&spec).await;
    assert_eq!((output.code, output.stdout.lines().next()), (0, Some("/")), "{output:?}");
    let spec = Spec::sh("pwd").with(|s| s["process"]["cwd"] = json!("/out/made"));
    assert_eq!(guest.run(&spec).await.code, 0);
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0, "a directory was made outside");
}

#[tokio::test]
async fn mount_points_that_are_links_stay_inside() {
    let mut guest = Guest::start().await;
    let base = guest.disks.base();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("hosts"), "untouched").unwrap();
    symlink(outside.path().join("hosts"), base.join("etc/hosts")).unwrap();
    let mut spec = Spec::sh("cat /etc/hosts");
    spec.files.push(api::InjectedFile {
        destination: "/etc/hosts".into(),
        content: b"injected\n".to_vec(),
        mode: 0o644,
        ..Default::default()
    });
    let output = guest.run(&spec).await;
    assert_eq!(std::fs::read_to_string(outside.path().join("hosts")).unwrap(), "untouched");
    // As with other runtimes, the file is created where the link leads inside the root.
    assert_eq!(output.stdout, "injected\n", "{output:?}");
}

#[tokio::test]
async fn a_link_into_a_mount_is_followed() {
    let mut guest = Guest::start().await;
    symlink("../run/resolvers/stub", guest.disks.base().join("etc/resolv.conf")).unwrap();
    let mut spec = Spec::sh("cat /etc/resolv.conf");
    spec.files.push(api::InjectedFile {
        destination: "/etc/resolv.conf".into(),
        content: b"nameserver ::1\n".to_vec(),
        mode: 0o644,
        ..Default::default()
    });
    assert_eq!(guest.run(&spec).await.stdout, "nameserver ::1\n");
}

#[tokio::test]
async fn an_injected_file_is_seen_with_its_mode() {
    let mut guest = Guest::start().await;
    let mut spec = Spec::sh("cat /etc/deep/resolv.conf; stat -c %a /etc/deep/resolv.conf");
    spec.files.push(api::InjectedFile {
        destination: "/etc/deep/resolv.conf".into(),
        content: b"nameserver ::1\n".to_vec(),
        mode: 0o640,
        ..Default::default()
    });
    assert_eq!(guest.run(&spec).await.stdout, "nameserver ::1\n640\n");
}

#[tokio::test]
async fn the_agent_is_out_of_sight() {
    let mut guest = Guest::start().await;
    let output = guest.run(&Spec::sh("set -- /proc/[0-9]*; echo $#; ls -d /run/machinen 2>&1")).await;
    assert_eq!(output.stdout, "1\nls: /run/machinen: No such file or directory\n");
}

#[tokio::test]
async fn all_processes_of_a_container_are_killed() {
    let guest = Guest::start().await;
    let spec = Spec::sh("trap '' TERM; sleep 1000 & sleep 1000 & wait");
    guest.create("c", &spec).await.unwrap();
    guest.start_container("c").await.unwrap();
    let processes = api::ReadCgroupRequest {
        container_id: "c".into(),
        names: vec!["cgroup.procs".into()],
        ..Default::default()
    };
    let count = async || {
        let read = guest.agent.read_cgroup(context(), &processes).await.unwrap();
        read.files[0].content.lines().count()
    };
    within(async {
        while count().await < 3 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    guest.signal("c", libc::SIGTERM, true).await.unwrap();
    guest.signal("c", libc::SIGKILL, true).await.unwrap();
    assert_eq!(guest.wait("c").await.exit_status, 137);
    guest.delete("c").await.unwrap();
    assert_eq!(status(guest.agent.read_cgroup(context(), &processes).await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn real_time_signals_and_nonsense() {
    let guest = Guest::start().await;
    guest.create("c", &Spec::new(&["sleep", "1000"])).await.unwrap();
    guest.start_container("c").await.unwrap();
    assert_eq!(status(guest.signal("c", 99, false).await).0, Code::INVALID_ARGUMENT);
    // An init without a handler ignores signals from inside its namespace, and all but KILL and STOP from its
    // ancestors.
    guest.signal("c", libc::SIGRTMIN() + 1, false).await.unwrap();
    guest.signal("c", libc::SIGKILL, false).await.unwrap();
    assert_eq!(guest.wait("c").await.exit_status, 137);
}

#[tokio::test]
async fn two_containers_share_a_base_and_nothing_else() {
    let guest = Guest::start().await;
    guest.create("a", &Spec::sh("touch /mine; sleep 1000")).await.unwrap();
    guest.start_container("a").await.unwrap();
    guest.create("b", &Spec::sh("sleep 0.2; test ! -e /mine")).await.unwrap();
    guest.start_container("b").await.unwrap();
    assert_eq!(guest.wait("b").await.exit_status, 0);
    assert!(!guest.disks.base().join("mine").exists());
    // A shutdown ends all running containers.
    assert!(guest.shutdown().await.success());
}

#[tokio::test]
async fn missing_disks_are_named() {
    let guest = Guest::start().await;
    let (code, text) = status(guest.create_without_disks("c", &Spec::new(&["true"])).await);
    assert_eq!(code, Code::NOT_FOUND);
    assert!(text.contains("77"), "{text}");
}

#[tokio::test]
async fn a_disk_without_a_file_system_is_named() {
    let guest = Guest::start().await;
    std::fs::remove_dir_all(guest.disks.base()).unwrap();
    std::fs::File::create(guest.disks.base()).unwrap().set_len(1 << 20).unwrap();
    let (code, text) = status(guest.create("c", &Spec::new(&["true"])).await);
    assert_eq!(code, Code::NOT_FOUND);
    assert!(text.contains("ext4") && text.contains("base"), "{text}");
}
