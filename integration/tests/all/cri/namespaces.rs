//! The namespaces that the containers of a pod share.

use anyhow::{Result, ensure};
use machinen_integration::cri::{Container, Handler, Node, api};

use super::both_runtimes;

both_runtimes! {
    every: [],
    oldest_and_newest: [hostname_network_and_ipc],
    newest: [processes_on_request, a_container_sees_its_target],
}

fn hostname_network_and_ipc(node: &mut Node) -> Result<()> {
    let pod = node.pod(|config| config.hostname = "web-0".to_owned())?;
    let (first, second) = (pod.idle("first")?, pod.idle("second")?);
    let read = |container: &Container<'_>| -> Result<Vec<String>> {
        let kinds = "for kind in net ipc uts pid mnt; do readlink /proc/self/ns/$kind; done; hostname";
        Ok(container.shell(kinds)?.lines().map(str::to_owned).collect())
    };
    let (one, two) = (read(&first)?, read(&second)?);
    ensure!(
        one.len() == 6 && one[..3] == two[..3] && one[5] == two[5] && one[5] == "web-0",
        "{one:?} {two:?}"
    );
    ensure!(one[3] != two[3] && one[4] != two[4], "{one:?} {two:?}");
    // POSIX shared memory is a file in a directory that both have.
    first.shell("echo shared > /dev/shm/segment")?;
    // A container that starts later has the same.
    let third = pod.idle("third")?;
    for container in [&second, &third] {
        ensure!(container.shell("cat /dev/shm/segment")? == "shared\n", "the directory is not shared");
    }
    // One listens, and the other connects on the loopback network.
    let server = ["nc", "-ll", "-p", "7000", "-e", "echo", "from the neighbour"];
    let server = pod.start("server", &server, |_| ())?;
    let heard = second.shell("until nc 127.0.0.1 7000 < /dev/null; do sleep 0.1; done 2> /dev/null")?;
    ensure!(heard == "from the neighbour\n", "{heard}");
    ensure!(server.runs()?, "the server has ended");
    // Another pod is another machine.
    let other = node.pod(|_| ())?;
    let stranger = other.idle("stranger")?;
    let reached = stranger.exec(&["nc", "-w", "5", "127.0.0.1", "7000"], 30)?;
    ensure!(reached.exit_code != 0, "{reached:?}");
    ensure!(stranger.shell("ls /dev/shm")?.is_empty(), "the other pod's memory is here");
    other.remove()?;
    pod.remove()
}

fn pid_mode(mode: api::NamespaceMode) -> impl FnOnce(&mut api::PodSandboxConfig) {
    move |config| {
        let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        let options = security.and_then(|security| security.namespace_options.as_mut());
        options.expect("the pod has namespaces").pid = mode.into();
    }
}

/// `shareProcessNamespace: true`.
fn processes_on_request(node: &mut Node) -> Result<()> {
    let pod = node.pod(pid_mode(api::NamespaceMode::Pod))?;
    let first = pod.start("first", &["tail", "-f", "/dev/null"], |_| ())?;
    let second = pod.idle("second")?;
    let both = [&first, &second].map(|container| container.shell("readlink /proc/self/ns/pid"));
    let [one, two] = both;
    ensure!(one? == two?, "the namespaces differ");
    // The first process is the pod's, not that of a container.
    let init = second.shell("tr '\\0' ' ' < /proc/1/cmdline")?;
    let wanted = match node.handler() {
        Handler::MachinenSandbox | Handler::MachinenSandboxOther => "/pause ",
        Handler::Runc
        | Handler::Machinen
        | Handler::MachinenOther
        | Handler::Installed
        | Handler::InstalledOther => "/bin/sleep 1000000 ",
    };
    ensure!(init == wanted, "{init}");
    second.shell("killall -KILL tail")?;
    ensure!(first.wait()?.exit_code == 137, "{:?}", first.status());
    ensure!(second.runs()?, "the second container ended with the first");
    // The file systems stay apart.
    let script = "echo mine > /tmp/mine; exec tail -f /dev/null";
    let again = pod.start("first", &["sh", "-c", script], |_| ())?;
    let script = "until pidof tail > /dev/null; do sleep 0.1; done; head -n 1 /proc/$(pidof tail)/root/etc/passwd; ls /tmp";
    let seen = second.shell(script)?;
    ensure!(seen.starts_with("root:") && !seen.contains("mine"), "{seen}");
    ensure!(again.runs()?, "{:?}", again.status());
    pod.remove()
}

/// `kubectl debug --target`.
fn a_container_sees_its_target(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let target = pod.start("target", &["sh", "-c", "echo secret > /tmp/file; exec sleep 424242"], |_| ())?;
    let debugger = pod.start("debugger", &["sleep", "100000"], |config| {
        let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        let security = security.expect("the container has a security context");
        security.namespace_options = Some(api::NamespaceOption {
            pid: api::NamespaceMode::Target.into(),
            target_id: target.id().to_owned(),
            ..Default::default()
        });
        security.capabilities =
            Some(api::Capability { add_capabilities: vec!["SYS_PTRACE".to_owned()], ..Default::default() });
    })?;
    let init = debugger.shell("tr '\\0' ' ' < /proc/1/cmdline")?;
    ensure!(init == "sleep 424242 ", "{init}");
    ensure!(debugger.shell("cat /proc/1/root/tmp/file")? == "secret\n", "no file of the target");
    ensure!(debugger.shell("ls /tmp")?.is_empty(), "the file systems are the same");
    debugger.stop(0)?;
    ensure!(target.runs()?, "the target ended with the debugger");
    pod.remove()
}
