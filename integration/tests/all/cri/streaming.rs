//! `kubectl exec`, `attach` and `port-forward`: streams through containerd's server.

use anyhow::{Result, ensure};
use machinen_integration::cri::{
    Container, Node, api,
    stream::{SIZE, STDERR, STDIN, STDOUT, Streams},
};

use super::both_runtimes;

both_runtimes! {
    every: [],
    oldest_and_newest: [processes_with_streams],
    newest: [processes_on_a_terminal, attached_to_the_first_process, forwarded_ports, a_port_without_a_server],
}

fn exec(node: &Node, container: &Container<'_>, script: &str, tty: bool) -> Result<Streams> {
    let request = api::ExecRequest {
        container_id: container.id().to_owned(),
        cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
        tty,
        stdin: true,
        stdout: true,
        // A terminal has one stream of output.
        stderr: !tty,
    };
    Streams::open(node, &node.client().exec(request)?.url)
}

fn processes_with_streams(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let container = pod.idle("main")?;
    let mut streams = exec(node, &container, "read -r line; echo got $line; echo err >&2; exit 3", false)?;
    streams.send(STDIN, b"a line\n")?;
    streams.to_end()?;
    let (out, err, code) = (streams.text(STDOUT), streams.text(STDERR), streams.exit_code()?);
    ensure!(out == "got a line\n" && err == "err\n" && code == 3, "{out:?} {err:?} {code}");
    // All of a large output arrives.
    let mut large = exec(node, &container, "dd if=/dev/zero bs=1000 count=2000 2> /dev/null", false)?;
    large.to_end()?;
    let length = large.text(STDOUT).len();
    ensure!(length == 2_000_000 && large.exit_code()? == 0, "{length} bytes, {:?}", large.exit_code());
    pod.remove()
}

fn processes_on_a_terminal(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let container = pod.idle("main")?;
    let script = "tty; until stty size | grep '40 100'; do sleep 0.1; done; read -r line; exit 4";
    let mut streams = exec(node, &container, script, true)?;
    streams.wait_for(STDOUT, "/dev/pts/")?;
    streams.send(SIZE, br#"{"Width":100,"Height":40}"#)?;
    streams.wait_for(STDOUT, "40 100")?;
    streams.send(STDIN, b"end\n")?;
    streams.to_end()?;
    ensure!(streams.exit_code()? == 4, "{}", streams.text(STDOUT));
    let first = pod.start("first", &["sh", "-c", "tty; echo err >&2"], |config| config.tty = true)?;
    first.wait()?;
    let log: String =
        first.log()?.iter().map(|line| format!("{} {}|", line.stream, line.text.trim_end())).collect();
    ensure!(log.starts_with("stdout /dev/") && log.ends_with("|stdout err|"), "{log}");
    pod.remove()
}

fn attached_to_the_first_process(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let script = "while read -r line; do echo got $line; done";
    let container = pod.start("main", &["sh", "-c", script], |config| config.stdin = true)?;
    for line in ["first", "second"] {
        // Who attached before has gone, and the process goes on.
        let request = api::AttachRequest {
            container_id: container.id().to_owned(),
            stdin: true,
            stdout: true,
            stderr: true,
            tty: false,
        };
        let mut streams = Streams::open(node, &node.client().attach(request)?.url)?;
        streams.send(STDIN, format!("{line}\n").as_bytes())?;
        streams.wait_for(STDOUT, &format!("got {line}\n"))?;
    }
    container.wait_for_log("got second")?;
    pod.remove()
}

/// The server listens on the loopback network of the pod.
fn forwarded_ports(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    // busybox's server of the web is the one that can listen on one address only.
    let script =
        "mkdir /tmp/www; echo hello > /tmp/www/index.html; exec httpd -f -p 127.0.0.1:8080 -h /tmp/www";
    let container = pod.start("main", &["sh", "-c", script], |_| ())?;
    container.shell("until wget -q -O - http://127.0.0.1:8080/; do sleep 0.1; done 2> /dev/null")?;
    let request = api::PortForwardRequest { pod_sandbox_id: pod.id().to_owned(), port: vec![8080] };
    let mut streams = Streams::open(node, &node.client().port_forward(request)?.url)?;
    // Stream 0 has the data and stream 1 the errors; both begin with the port.
    streams.send(0, b"GET / HTTP/1.0\r\n\r\n")?;
    streams.wait_for(0, "hello")?;
    pod.remove()
}

fn a_port_without_a_server(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let request = api::PortForwardRequest { pod_sandbox_id: pod.id().to_owned(), port: vec![8081] };
    let mut streams = Streams::open(node, &node.client().port_forward(request)?.url)?;
    streams.to_end()?;
    ensure!(streams.text(1).contains("refused"), "{:?}", streams.text(1));
    pod.remove()
}
