//! Additional processes in a running container.

use serde_json::json;
use ttrpc::Code;

use crate::support::{Guest, Spec, status, within};

fn idle() -> Spec {
    Spec::new(&["sleep", "1000"])
}

#[tokio::test]
async fn a_whole_life() {
    let mut guest = Guest::start().await;
    guest.idle("c", &idle()).await;
    let output = guest.run_in("c", "e", &Spec::sh("cat; echo err >&2; exit 3"), b"in").await;
    assert_eq!((output.code, &*output.stdout, &*output.stderr), (3, "in", "err\n"));
    // The id is free again.
    let output = guest.run_in("c", "e", &Spec::sh("echo $$ $HOME; kill -TERM $$"), b"").await;
    assert_eq!(output.code, 143);
    assert!(output.stdout.ends_with(" /root\n"), "{output:?}");
    assert!(guest.shutdown().await.success());
}

#[tokio::test]
async fn it_is_in_the_container() {
    let mut guest = Guest::start().await;
    guest.idle("c", &idle()).await;
    let script = "for ns in mnt pid ipc uts cgroup; do readlink /proc/1/ns/$ns; done >/tmp/1; \
                  for ns in mnt pid ipc uts cgroup; do readlink /proc/self/ns/$ns; done >/tmp/2; \
                  diff /tmp/1 /tmp/2 && grep ^0: /proc/self/cgroup && grep ^0: /proc/1/cgroup && ls /proc/self/fd | wc -l";
    let output = guest.run_in("c", "e", &Spec::sh(script), b"").await;
    // ls itself has one more than 0, 1 and 2.
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert!(lines.len() == 3 && lines[0] == lines[1] && lines[2] == "4", "{output:?}");
}

#[tokio::test]
async fn the_process_matches_its_spec() {
    let mut guest = Guest::start().await;
    guest.idle("c", &idle()).await;
    let script = "id -u; id -g; id -G; pwd; umask; echo $A; ulimit -n; grep -E 'CapEff|CapBnd|NoNewPrivs' \
                  /proc/self/status | tr '\\t' ' '; cat /proc/self/oom_score_adj";
    let spec = Spec::sh(script).with(|spec| {
        spec["process"]["user"] = json!({"uid": 1000, "gid": 100, "additionalGids": [7, 9], "umask": 0o27});
        spec["process"]["cwd"] = json!("/tmp");
        spec["process"]["env"] = json!(["PATH=/bin", "A=b c"]);
        spec["process"]["capabilities"] = json!({"bounding": ["CAP_KILL", "CAP_CHOWN"]});
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 300, "soft": 200}]);
        spec["process"]["oomScoreAdj"] = json!(123);
    });
    let output = guest.run_in("c", "e", &spec, b"").await;
    let wanted = "1000\n100\n100 7 9\n/tmp\n0027\nb c\n200\nCapEff: 0000000000000000\n\
                  CapBnd: 0000000000000021\nNoNewPrivs: 1\n123\n";
    assert_eq!(output.stdout, wanted, "{output:?}");
    let spec =
        Spec::sh("grep NoNewPrivs /proc/self/status; umask; cat /proc/self/oom_score_adj").with(|spec| {
            spec["process"]["noNewPrivileges"] = json!(false);
        });
    let output = guest.run_in("c", "e", &spec, b"").await;
    assert_eq!(output.stdout, "NoNewPrivs:\t0\n0022\n0\n", "{output:?}");
}

#[tokio::test]
async fn the_containers_filter_holds() {
    let mut guest = Guest::start().await;
    let spec = idle().with(|spec| {
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
        });
    });
    guest.idle("c", &spec).await;
    for confined in [true, false] {
        let spec = Spec::sh("grep Seccomp: /proc/self/status; mkdir /tmp/d").with(|spec| {
            spec["process"]["noNewPrivileges"] = json!(confined);
        });
        let output = guest.run_in("c", "e", &spec, b"").await;
        assert_eq!((output.code, &*output.stdout), (1, "Seccomp:\t2\n"), "{output:?}");
        assert!(output.stderr.contains("not supported"), "{output:?}");
    }
}

#[tokio::test]
async fn what_cannot_be_executed_is_named() {
    let mut guest = Guest::start().await;
    guest.idle("c", &idle()).await;
    let not_executable = Spec::new(&["/etc/passwd"]);
    let cases = [
        (Spec::new(&["nothing"]), Code::NOT_FOUND, "exec: \"nothing\": executable file not found in $PATH"),
        (Spec::new(&["/no/thing"]), Code::NOT_FOUND, "stat /no/thing: no such file or directory"),
        (not_executable, Code::PERMISSION_DENIED, "exec: \"/etc/passwd\": permission denied"),
        (Spec::new(&["/etc"]), Code::PERMISSION_DENIED, "exec: \"/etc\": is a directory"),
        (
            Spec::new(&["true"]).with(|spec| spec["process"]["cwd"] = json!("/nowhere")),
            Code::INVALID_ARGUMENT,
            "chdir to cwd (\"/nowhere\") set in config.json failed: no such file or directory",
        ),
        (
            Spec::new(&["true"])
                .with(|spec| spec["process"]["capabilities"] = json!({"bounding": ["CAP_X"]})),
            Code::INVALID_ARGUMENT,
            "the process cannot be parsed",
        ),
        (Spec::new(&[]), Code::INVALID_ARGUMENT, "has no process.args"),
    ];
    for (spec, code, words) in cases {
        let refused = status(guest.exec("c", "e", &spec).await);
        assert!(refused.0 == code && refused.1.contains(words), "{refused:?}");
        // The refused call has left nothing behind.
        assert_eq!(guest.run_in("c", "e", &Spec::new(&["true"]), b"").await.code, 0);
    }
}

#[tokio::test]
async fn ids_states_and_signals() {
    let guest = Guest::start().await;
    guest.create("c", &idle()).await.unwrap();
    // The init does not have to be started first.
    guest.exec("c", "early", &Spec::new(&["true"])).await.unwrap();
    assert_eq!(within(guest.wait_exec("c", "early")).await.exit_status, 0);
    assert_eq!(status(guest.exec("d", "e", &idle()).await).0, Code::NOT_FOUND);
    guest.start_container("c").await.unwrap();
    assert_eq!(status(guest.exec("c", "", &idle()).await).0, Code::INVALID_ARGUMENT);
    guest.exec("c", "e", &idle()).await.unwrap();
    assert_eq!(status(guest.exec("c", "e", &idle()).await).0, Code::ALREADY_EXISTS);
    assert_eq!(status(guest.delete_exec("c", "e").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(status(guest.delete_exec("c", "").await).0, Code::INVALID_ARGUMENT);
    guest.signal_exec("c", "e", libc::SIGUSR1, false).await.unwrap();
    assert_eq!(within(guest.wait_exec("c", "e")).await.exit_status, 128 + 10);
    assert_eq!(status(guest.signal_exec("c", "e", libc::SIGTERM, false).await).0, Code::NOT_FOUND);
    guest.delete_exec("c", "e").await.unwrap();
    guest.delete_exec("c", "e").await.unwrap();
    assert_eq!(status(guest.signal_exec("c", "e", libc::SIGTERM, false).await).0, Code::NOT_FOUND);
    guest.exec("c", "e", &idle()).await.unwrap();
    guest.signal_exec("c", "e", libc::SIGKILL, true).await.unwrap();
    assert_eq!(within(guest.wait_exec("c", "e")).await.exit_status, 137);
    assert_eq!(within(guest.wait("c")).await.exit_status, 137);
}

#[tokio::test]
async fn it_ends_with_the_init() {
    let guest = Guest::start().await;
    for namespaces in [json!([{"type": "pid"}, {"type": "mount"}]), json!([{"type": "mount"}])] {
        guest.idle("c", &idle().with(|spec| spec["linux"]["namespaces"] = namespaces)).await;
        guest.exec("c", "e", &idle()).await.unwrap();
        guest.signal("c", libc::SIGKILL, false).await.unwrap();
        assert_eq!(within(guest.wait_exec("c", "e")).await.exit_status, 137);
        assert_eq!(within(guest.wait("c")).await.exit_status, 137);
        assert_eq!(status(guest.exec("c", "f", &idle()).await).0, Code::FAILED_PRECONDITION);
        guest.delete("c").await.unwrap();
    }
    assert_eq!(guest.containers_left(), 0);
}

#[tokio::test]
async fn many_at_once() {
    let mut guest = Guest::start().await;
    guest.idle("c", &idle()).await;
    let mut streams = Vec::new();
    for number in 0..20 {
        let (stdout, stream) = guest.stream().await;
        let stdio = machinen_protocol::api::Stdio { stdout, ..Default::default() };
        let spec =
            Spec::sh(&format!("while [ ! -e /tmp/go ]; do sleep 0.05; done; echo {number}; exit {number}"));
        guest.exec_with("c", &number.to_string(), &spec, stdio).await.unwrap();
        streams.push(stream);
    }
    guest.exec("c", "go", &Spec::new(&["touch", "/tmp/go"])).await.unwrap();
    for (number, stream) in (0_u32..).zip(&mut streams) {
        let wanted = format!("{number}\n");
        let mut bytes = vec![0; wanted.len()];
        within(tokio::io::AsyncReadExt::read_exact(stream, &mut bytes)).await.unwrap();
        assert_eq!(bytes, wanted.as_bytes());
        assert_eq!(within(guest.wait_exec("c", &number.to_string())).await.exit_status, number);
    }
}

#[tokio::test]
async fn a_user_namespace_is_joined() {
    let mut guest = Guest::start().await;
    // Creates the mount points that the image lacks, which the namespace's root user cannot do.
    guest.run(&Spec::new(&["true"])).await;
    let map = json!([{"containerID": 0, "hostID": 70000, "size": 65536}]);
    let spec = idle().with(|spec| {
        spec["linux"]["namespaces"] =
            json!([{"type": "user"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
    });
    guest.idle("c", &spec).await;
    let script = "id -u; readlink /proc/self/ns/user >/tmp/1; readlink /proc/1/ns/user >/tmp/2; \
                  echo seen >/dev/stderr; diff /tmp/1 /tmp/2";
    let output = guest.run_in("c", "e", &Spec::sh(script), b"").await;
    assert_eq!((output.code, &*output.stdout, &*output.stderr), (0, "0\n", "seen\n"));
}
