//! Tests of hooks on this host, without a container.

use std::{collections::HashMap, fs, os::unix::fs::PermissionsExt as _};

use machinen_base::error::chain;
use oci_spec::runtime::Spec;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// A bundle, and hooks that add lines to a file in it.
struct Fixture {
    bundle: TempDir,
    cgroups: Vec<PathBuf>,
}

impl Fixture {
    fn new() -> Self {
        Self { bundle: tempfile::tempdir().unwrap(), cgroups: Vec::new() }
    }

    fn hooks(&self, hooks: Value) -> ContainerHooks {
        let annotations = HashMap::from([("key".to_owned(), "value".to_owned())]);
        let hooks = serde_json::from_value(hooks).unwrap();
        ContainerHooks::new(hooks, &Spec::default(), "c1", self.bundle.path(), annotations)
    }

    fn dir(&self) -> PathBuf {
        self.bundle.path().join("poststop")
    }

    async fn create(&self, hooks: Value) -> Result<(), HookError> {
        self.hooks(hooks).run_at_create(std::process::id(), &self.cgroups, &self.dir()).await
    }

    fn lines(&self) -> Vec<String> {
        let text = fs::read_to_string(self.bundle.path().join("log")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn record(&self) -> Option<PoststopRecord> {
        PoststopRecord::open(&self.dir(), "c1").unwrap()
    }
}

fn shell(script: &str) -> Value {
    json!({ "path": "/bin/sh", "args": ["hook", "-c", script], "env": ["PATH=/usr/bin:/bin"] })
}

/// A hook that adds a line to the file `log` of its working directory.
fn logs(line: &str) -> Value {
    shell(&format!("echo {line} >> log"))
}

#[tokio::test]
async fn hooks_run_in_order_until_one_fails() {
    let fixture = Fixture::new();
    let all = json!({
        "createContainer": [logs("four")], "createRuntime": [logs("two"), logs("three")], "prestart": [logs("one")],
    });
    fixture.create(all).await.unwrap();
    assert_eq!(fixture.lines(), ["one", "two", "three", "four"]);
    let failing = json!({
        "createRuntime": [logs("five"), shell("echo first >&2; printf 'bad \\033[2J' >&2; exit 3"), logs("never")],
    });
    let error = chain(&fixture.create(failing).await.unwrap_err());
    assert_eq!(
        error,
        "the createRuntime hook 2 (/bin/sh) failed: it exited with status 3: first; bad \\u{1b}[2J"
    );
    assert_eq!(fixture.lines()[4..], ["five"]);
}

#[tokio::test]
async fn a_hook_reads_the_state_and_has_nothing_else_of_this_process() {
    let fixture = Fixture::new();
    let report = "cat > state; echo $0 $A; env | cut -d= -f1 | sort | xargs; ls /proc/self/fd | xargs";
    let mut hook = shell(&format!("({report}) > log"));
    hook["env"] = json!(["PATH=/usr/bin:/bin", "A=b=c"]);
    fixture.create(json!({ "createRuntime": [hook] })).await.unwrap();
    let state: Value =
        serde_json::from_slice(&fs::read(fixture.bundle.path().join("state")).unwrap()).unwrap();
    assert_eq!(
        state,
        json!({
            "ociVersion": "1.2.0", "id": "c1", "status": "creating", "pid": std::process::id(),
            "bundle": fixture.bundle.path(), "annotations": { "key": "value" },
        })
    );
    // PWD and the like are the shell's own; 3 is the directory that ls reads.
    let lines = fixture.lines();
    assert_eq!(lines[0], "hook b=c");
    assert!(
        lines[1].split(' ').all(|name| ["A", "PATH", "PWD", "SHLVL", "_", "OLDPWD"].contains(&name)),
        "{lines:?}"
    );
    assert_eq!(lines[2], "0 1 2 3");
}

#[tokio::test]
async fn a_hook_that_does_not_end_is_killed_with_its_group() {
    let fixture = Fixture::new();
    let mut hook = shell("sleep 1000 & echo $! > log; echo waiting >&2; wait");
    hook["timeout"] = json!(1);
    let error = fixture.create(json!({ "createRuntime": [hook] })).await.unwrap_err();
    assert_eq!(
        chain(&error),
        "the createRuntime hook 1 (/bin/sh) failed: it was killed, because it has not ended within 1s: waiting"
    );
    let other: u32 = fixture.lines()[0].parse().unwrap();
    machinen_base::process::await_ends(&[other], Duration::from_secs(10)).unwrap();
}

#[tokio::test]
async fn a_process_that_a_hook_leaves_behind_is_not_waited_for() {
    let fixture = Fixture::new();
    let begun = Instant::now();
    let hook = shell("sleep 30 & echo $! > log");
    fixture.create(json!({ "createRuntime": [hook] })).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20));
    let pid: i32 = fixture.lines()[0].parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn large_states_and_outputs_do_not_block() {
    let fixture = Fixture::new();
    let annotations = HashMap::from([("key".to_owned(), "x".repeat(1 << 20))]);
    let hooks = json!({ "prestart": [shell("true"), shell("head -c 1000000 /dev/zero >&2; wc -c > log")] });
    let hooks = serde_json::from_value(hooks).unwrap();
    let hooks = ContainerHooks::new(hooks, &Spec::default(), "c1", fixture.bundle.path(), annotations);
    hooks.run_at_create(std::process::id(), &[], &fixture.dir()).await.unwrap();
    assert!(fixture.lines()[0].trim().parse::<usize>().unwrap() > 1 << 20);
}

#[tokio::test]
async fn programs_that_cannot_be_started_are_named() {
    let fixture = Fixture::new();
    let plain = fixture.bundle.path().join("plain");
    fs::write(&plain, "").unwrap();
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
    for (path, words) in [
        ("/no/such/hook", "the createRuntime hook 1 (/no/such/hook) failed: /no/such/hook not found"),
        (plain.to_str().unwrap(), "Permission denied"),
    ] {
        let error = fixture.create(json!({ "createRuntime": [{ "path": path }] })).await.unwrap_err();
        assert!(chain(&error).contains(words), "{}", chain(&error));
    }
}

#[tokio::test]
async fn create_container_hooks_run_in_the_containers_namespaces() {
    let fixture = Fixture::new();
    let jail = machinen_base::process::Jail {
        namespaces: machinen_base::process::Namespaces { net: true, uts: true, ..Default::default() },
        ..Default::default()
    };
    let anchor = machinen_base::process::Spawn::new("sleep").args(["1000"]).jail(jail).start().unwrap();
    let names = "for n in net uts mnt; do readlink /proc/self/ns/$n; done >> log";
    let hooks = json!({ "createRuntime": [shell(names)], "createContainer": [shell(names)] });
    fixture.hooks(hooks).run_at_create(anchor.pid(), &[], &fixture.dir()).await.unwrap();
    let of = |pid: u32, name| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap().display().to_string();
    let lines = fixture.lines();
    let host: Vec<_> = ["net", "uts", "mnt"].map(|name| of(std::process::id(), name)).into();
    assert_eq!(lines[..3], host);
    assert_eq!(lines[3..5], [of(anchor.pid(), "net"), of(anchor.pid(), "uts")]);
    // What it mounts is its own: neither the host's nor the container's.
    assert!(lines[5] != host[2] && lines[5] != of(anchor.pid(), "mnt"));
}

#[tokio::test]
async fn failures_of_poststart_leave_the_others_alone() {
    let fixture = Fixture::new();
    let hooks = fixture.hooks(json!({ "poststart": [logs("one"), shell("exit 1"), logs("three")] }));
    let failures = hooks.run_at_start(7, &[]).await;
    assert_eq!(failures.len(), 1);
    assert!(failures[0].to_string().contains("poststart hook 2"), "{}", failures[0]);
    assert_eq!(fixture.lines(), ["one", "three"]);
}

#[tokio::test]
async fn poststop_hooks_run_once() {
    let fixture = Fixture::new();
    assert!(fixture.record().is_none());
    let hooks = json!({ "poststop": [logs("one"), shell("cat > state; exit 1"), logs("three")] });
    fixture.create(hooks).await.unwrap();
    assert_eq!(fixture.lines(), Vec::<String>::new());
    assert_eq!(recorded(&fixture.dir()).unwrap(), ["c1"]);
    let record = fixture.record().unwrap();
    let busy = PoststopRecord::open(&fixture.dir(), "c1").unwrap_err();
    assert!(busy.to_string().contains("another process runs"), "{busy}");
    let failures = record.run(&[], None).await.unwrap();
    assert_eq!(failures.len(), 1);
    assert_eq!(fixture.lines(), ["one", "three"]);
    let state: Value =
        serde_json::from_slice(&fs::read(fixture.bundle.path().join("state")).unwrap()).unwrap();
    assert_eq!((&state["status"], state.get("pid")), (&json!("stopped"), None));
    assert!(fixture.record().is_none() && !fixture.dir().exists());
}

#[tokio::test]
async fn poststop_hooks_that_a_killed_process_has_begun_are_not_repeated() {
    let fixture = Fixture::new();
    fixture.create(json!({ "poststop": [logs("one"), logs("two"), logs("three")] })).await.unwrap();
    let path = fixture.dir().join("c1");
    let mut text = fs::read(&path).unwrap();
    text.push(b'.');
    fs::write(&path, text).unwrap();
    let until = Some(Instant::now() + Duration::from_secs(60));
    assert!(fixture.record().unwrap().run(&[], until).await.unwrap().is_empty());
    assert_eq!(fixture.lines(), ["two", "three"]);
}

#[tokio::test]
async fn no_hook_runs_beyond_the_given_time() {
    let fixture = Fixture::new();
    fixture.create(json!({ "poststop": [shell("sleep 1000"), shell("sleep 1000")] })).await.unwrap();
    let failures = fixture.record().unwrap().run(&[], Some(Instant::now())).await.unwrap();
    assert_eq!(failures.len(), 2);
    assert!(chain(&failures[1]).contains("it has not ended within"), "{}", chain(&failures[1]));
}

#[test]
fn odd_records_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let line = |version| format!("{{\"version\":{version},\"bundle\":\"/\",\"state\":{{}},\"hooks\":[]}}\n");
    for (text, words) in
        [("{", "has no end"), ("[]\n", "not valid"), (&line(9), "it has the version 9"), ("\n", "not valid")]
    {
        fs::write(dir.path().join("c1"), text).unwrap();
        let error = PoststopRecord::open(dir.path(), "c1").unwrap_err().to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
    fs::write(dir.path().join("c1"), line(1)).unwrap();
    assert!(PoststopRecord::open(dir.path(), "c1").unwrap().is_some());
}
