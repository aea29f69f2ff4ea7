//! The effects of an OCI configuration, seen from inside the container.

use serde_json::json;
use ttrpc::Code;

use crate::support::{Guest, Spec, status};

/// Runs a script in a container for each line of the table, and compares its output.
async fn expect(cases: &[(&str, Spec, &str)]) {
    let mut guest = Guest::start().await;
    for (name, spec, printed) in cases {
        let output = guest.run(spec).await;
        assert_eq!((output.stdout.trim_end(), output.code), (*printed, 0), "{name}: {output:?}");
    }
}

#[tokio::test]
async fn process() {
    let long = "x".repeat(4096);
    expect(&[
        ("args", Spec::new(&["echo", "a b", "", "c"]), "a b  c"),
        ("a long argument", Spec::new(&["sh", "-c", "echo ${#0}", &long]), "4096"),
        (
            "environment as it stands",
            Spec::new(&["env"])
                .with(|s| s["process"]["env"] = json!(["Z=1", "PATH=/bin", "A=x=y", "HOME=/h"])),
            "Z=1\nPATH=/bin\nA=x=y\nHOME=/h",
        ),
        (
            "1000 variables",
            Spec::sh("tr '\\0' '\\n' < /proc/$$/environ | wc -l").with(|s| {
                let many = (0..1000).map(|n| format!("VAR_{n}={}", "v".repeat(64)));
                s["process"]["env"] = many.chain(["PATH=/bin".into(), "HOME=/".into()]).collect();
            }),
            "1002",
        ),
        ("home of root", Spec::sh("echo $HOME"), "/root"),
        (
            "home of a user",
            Spec::sh("echo $HOME").with(|s| s["process"]["user"]["uid"] = json!(1000)),
            "/home/me",
        ),
        (
            "home of an unknown user",
            Spec::sh("echo $HOME").with(|s| s["process"]["user"]["uid"] = json!(4242)),
            "/",
        ),
        ("working directory", Spec::sh("pwd").with(|s| s["process"]["cwd"] = json!("/etc")), "/etc"),
        (
            "made working directory",
            Spec::sh("pwd").with(|s| s["process"]["cwd"] = json!("/new/dir")),
            "/new/dir",
        ),
        (
            "user, groups and umask",
            Spec::sh("id -u; id -g; id -G; umask").with(|s| {
                s["process"]["user"] =
                    json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 7], "umask": 63});
            }),
            "1000\n1001\n1001 5 7\n0077",
        ),
        (
            "no groups",
            Spec::sh("id -G; umask").with(|s| s["process"]["user"] = json!({"uid": 0, "gid": 0})),
            "0\n0022",
        ),
        (
            "a relative command",
            Spec::new(&["./busybox", "echo", "hi"]).with(|s| s["process"]["cwd"] = json!("/bin")),
            "hi",
        ),
        (
            "a pipe's end is the user's own",
            Spec::sh("echo hi > /dev/stdout").with(|s| s["process"]["user"]["uid"] = json!(1000)),
            "hi",
        ),
        ("broken pipes kill", Spec::sh("yes | head -n 1"), "y"),
        (
            "no signal is ignored",
            Spec::new(&["grep", "SigIgn", "/proc/self/status"]),
            "SigIgn:\t0000000000000000",
        ),
        ("no signal is blocked", Spec::sh("grep SigBlk /proc/self/status"), "SigBlk:\t0000000000000000"),
        ("nothing else is open", Spec::sh("ls /proc/self/fd | wc -l"), "4"),
    ])
    .await;
}

#[tokio::test]
async fn privileges() {
    let status = |what: &str| Spec::sh(&format!("grep -E '{what}' /proc/self/status | cut -f2"));
    expect(&[
        ("given capabilities", status("CapEff|CapBnd"), "00000000a80425fb\n00000000a80425fb"),
        (
            "none given, none had",
            status("CapPrm|CapEff|CapBnd").with(|s| s["process"]["capabilities"] = json!(null)),
            "0000000000000000\n0000000000000000\n0000000000000000",
        ),
        (
            "ambient capabilities of a user",
            status("CapEff|CapAmb").with(|s| {
                let one = json!(["CAP_NET_BIND_SERVICE"]);
                s["process"]["user"]["uid"] = json!(1000);
                s["process"]["capabilities"] = json!(
                    {"bounding": one, "effective": one, "permitted": one, "inheritable": one, "ambient": one}
                );
            }),
            "0000000000000400\n0000000000000400",
        ),
        ("no new privileges", status("NoNewPrivs"), "1"),
        (
            "new privileges",
            status("NoNewPrivs").with(|s| s["process"]["noNewPrivileges"] = json!(false)),
            "0",
        ),
        (
            "limits",
            Spec::sh("ulimit -n; ulimit -Hn; ulimit -c").with(|s| {
                s["process"]["rlimits"] = json!([
                    {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
                    {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}
                ]);
            }),
            "100\n200\n0",
        ),
        ("default limit", Spec::sh("ulimit -n").with(|s| s["process"]["rlimits"] = json!([])), "1024"),
        (
            "OOM score",
            Spec::sh("cat /proc/self/oom_score_adj").with(|s| s["process"]["oomScoreAdj"] = json!(321)),
            "321",
        ),
        ("default OOM score", Spec::sh("cat /proc/self/oom_score_adj"), "0"),
        ("hostname", Spec::sh("hostname").with(|s| s["hostname"] = json!("box")), "box"),
        ("own process ids", Spec::sh("echo $$"), "1"),
        (
            "own cgroup root",
            Spec::sh("cat /proc/self/cgroup | grep ^0").with(|s| {
                s["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "cgroup"}));
            }),
            "0::/",
        ),
        (
            "user namespace",
            Spec::sh("tr -s ' ' < /proc/self/uid_map; id -u").with(|s| {
                let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
                s["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
                s["linux"]["uidMappings"] = map.clone();
                s["linux"]["gidMappings"] = map;
            }),
            " 0 100000 65536\n0",
        ),
    ])
    .await;
}

#[tokio::test]
async fn file_systems() {
    expect(&[
        (
            "kinds of mounts",
            Spec::sh("cut -d' ' -f2,3 /proc/mounts | grep -vE '^/(proc|sys)/' | sort"),
            "/ overlay\n/dev tmpfs\n/dev/mqueue mqueue\n/dev/pts devpts\n/dev/shm tmpfs\n/proc proc\n/run tmpfs\n/sys sysfs",
        ),
        (
            "cgroup file system",
            Spec::sh("grep -c ' /sys/fs/cgroup cgroup2 ro' /proc/mounts; ls /sys/fs/cgroup/cgroup.procs").with(|s| {
                s["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "cgroup"}));
                s["mounts"].as_array_mut().unwrap().push(json!({
                    "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                    "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]
                }));
            }),
            "1\n/sys/fs/cgroup/cgroup.procs",
        ),
        ("masked files", Spec::sh("cat /proc/keys | wc -c; cat /proc/timer_list | wc -c"), "0\n0"),
        ("masked directories", Spec::sh("ls /sys/firmware | wc -l"), "0"),
        ("read-only paths", Spec::sh("echo 1 2>/dev/null > /proc/sys/kernel/panic || echo no"), "no"),
        ("read-only sysfs", Spec::sh("mkdir /sys/x 2>/dev/null || echo no"), "no"),
        (
            "read-only root",
            Spec::sh("touch /x 2>/dev/null || echo no; touch /run/x && echo yes").with(|s| s["root"]["readonly"] = json!(true)),
            "no\nyes",
        ),
        ("writable root", Spec::sh("touch /x /etc/x && ls /x"), "/x"),
        (
            "a small tmpfs",
            Spec::sh("dd if=/dev/zero of=/dev/shm/x bs=1024 count=2000 2>/dev/null || stat -c %s /dev/shm/x").with(|s| {
                s["mounts"][3]["options"] = json!(["size=1m"]);
            }),
            "1048576",
        ),
    ])
    .await;
}

#[tokio::test]
async fn devices() {
    let default = "crw-rw-rw- 1,7 /dev/full\ncrw-rw-rw- 1,3 /dev/null\ncrw-rw-rw- 1,8 /dev/random\n\
                   crw-rw-rw- 5,0 /dev/tty\ncrw-rw-rw- 1,9 /dev/urandom\ncrw-rw-rw- 1,5 /dev/zero";
    expect(&[
        (
            "the default set",
            Spec::sh("stat -c '%A %t,%T %n' /dev/full /dev/null /dev/random /dev/tty /dev/urandom /dev/zero"),
            default,
        ),
        ("links", Spec::sh("readlink /dev/fd; readlink /dev/stdin; readlink /dev/ptmx"), "/proc/self/fd\n/proc/self/fd/0\npts/ptmx"),
        (
            "others cannot be used",
            Spec::sh("mknod /dev/disk b 8 0 && mknod /dev/null2 c 1 3 && echo >/dev/null2; cat /dev/disk 2>&1 || true"),
            "cat: can't open '/dev/disk': Operation not permitted",
        ),
        (
            "unless they are allowed",
            Spec::sh("mknod /dev/fuse2 c 10 229; true < /dev/fuse2 && echo opened").with(|s| {
                s["linux"]["resources"]["devices"] = json!([
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"}
                ]);
            }),
            "opened",
        ),
        (
            "listed ones",
            Spec::sh("stat -c '%A %u:%g %t,%T' /dev/x/mine").with(|s| {
                s["linux"]["devices"] = json!([
                    {"path": "/dev/x/mine", "type": "c", "major": 10, "minor": 200, "fileMode": 0o640, "uid": 3, "gid": 4}
                ]);
            }),
            "crw-r----- 3:4 a,c8",
        ),
    ])
    .await;
}

#[tokio::test]
async fn sysctls() {
    let mut guest = Guest::start().await;
    let spec = Spec::sh("cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_forward").with(|s| {
        s["linux"]["sysctl"] = json!({"kernel.msgmax": "4242", "net.ipv4.ip_forward": "1"});
    });
    assert_eq!(guest.run(&spec).await.stdout, "4242\n1\n");
    let foreign = Spec::new(&["true"]).with(|s| s["linux"]["sysctl"] = json!({"kernel.panic": "1"}));
    let (code, text) = status(guest.create("c", &foreign).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("kernel.panic"), "{text}");
}

#[tokio::test]
async fn seccomp() {
    let filter = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]
    });
    let script = "mkdir /x 2>&1; grep Seccomp: /proc/self/status | cut -f2";
    let denied = "mkdir: can't create directory '/x': Operation not supported\n2";
    let filtered = |privileges: bool| {
        Spec::sh(script).with(|s| {
            s["linux"]["seccomp"] = filter.clone();
            s["process"]["noNewPrivileges"] = json!(privileges);
        })
    };
    let user = filtered(false).with(|s| {
        s["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        s["process"]["capabilities"] = json!({});
    });
    expect(&[
        ("with no new privileges", filtered(true), denied),
        ("with new privileges", filtered(false), denied),
        ("as a user without capabilities", user, denied),
    ])
    .await;
}

#[tokio::test]
async fn commands_that_cannot_be_executed() {
    let guest = Guest::start().await;
    let base = guest.disks.base();
    std::fs::write(base.join("etc/script"), "no interpreter").unwrap();
    std::fs::write(base.join("bin/lost"), "#!/no/such/interpreter\n").unwrap();
    std::fs::write(base.join("bin/noise"), "\u{7f}not a program").unwrap();
    for name in ["bin/lost", "bin/noise"] {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(base.join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    for (command, code, text) in [
        ("nonesuch", Code::NOT_FOUND, "exec: \"nonesuch\": executable file not found in $PATH"),
        (
            "/bin/nonesuch",
            Code::NOT_FOUND,
            "exec: \"/bin/nonesuch\": stat /bin/nonesuch: no such file or directory",
        ),
        ("/bin/sh/x", Code::NOT_FOUND, "exec: \"/bin/sh/x\": stat /bin/sh/x: not a directory"),
        ("/etc/script", Code::PERMISSION_DENIED, "exec: \"/etc/script\": permission denied"),
        ("/etc", Code::PERMISSION_DENIED, "exec: \"/etc\": is a directory"),
    ] {
        let got = status(guest.create("c", &Spec::new(&[command])).await);
        assert_eq!(got, (code, text.to_owned()));
    }
    for (command, code, text) in [
        ("lost", Code::NOT_FOUND, "exec /bin/lost: no such file or directory"),
        ("noise", Code::PERMISSION_DENIED, "exec /bin/noise: exec format error"),
    ] {
        guest.create("c", &Spec::new(&[command])).await.unwrap();
        assert_eq!(status(guest.start_container("c").await), (code, text.to_owned()));
        guest.wait("c").await;
        guest.delete("c").await.unwrap();
    }
    // Nothing of these containers is left.
    assert_eq!(guest.containers_left(), 0);
}

#[tokio::test]
async fn configurations_that_cannot_be() {
    let guest = Guest::start().await;
    let bad = |change: fn(&mut serde_json::Value)| Spec::new(&["true"]).with(change);
    for (spec, text) in [
        (bad(|s| s["process"]["args"] = json!([])), "no process.args"),
        (bad(|s| s["process"]["user"]["uid"] = json!("root")), "invalid type"),
        (bad(|s| s["hostname"] = json!(5)), "invalid type"),
        (bad(|s| s["ociVersion"] = json!("2.0.0")), "version"),
        (bad(|s| s["linux"]["namespaces"] = json!([{"type": "pid"}])), "MNT namespace"),
    ] {
        let (code, message) = status(guest.create("c", &spec).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
        assert!(message.contains(text), "{message}");
    }
    assert_eq!(status(guest.create("../c", &Spec::new(&["true"])).await).0, Code::INVALID_ARGUMENT);
    assert_eq!(guest.containers_left(), 0);
}
