//! Containers without a network namespace, which pasta connects with the outside: published ports, connections to the
//! host's network, and what is refused.

use std::{
    io::{ErrorKind::WouldBlock, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    containerd::Containerd,
    ctr::Run,
    process::Running,
    setup::{Setup, Value},
};
use nix::sys::signal::{Signal, kill};

use super::{end, lab::Lab, life::process, moved::checkpoint, until};
use crate::{
    fork::{fork, forking, sh},
    harness::{IMAGE, NEWEST, fails_saying, on_newest_containerd, run_with, works},
};

on_newest_containerd!(
    published_ports_lead_into_the_container,
    connections_to_the_outside,
    what_cannot_be_published,
    the_hosts_network_is_refused,
    ended_with_the_shim,
    restored_and_forked,
    published_ports_of_udp,
);

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const PATIENCE: Duration = Duration::from_secs(120);
/// Answers each connection.
const SERVER: &str = "nc -ll -p 80 -e echo from the container";

/// A container of the shell with annotations.
fn run<'a>(containerd: &'a Containerd, script: &str, annotations: &[(&str, &str)]) -> Run<'a> {
    let run = containerd.run(IMAGE, &["sh", "-c", script]);
    let annotate = |run: Run<'a>, (name, value): &(&str, &str)| {
        run.flag(format!("--annotation=io.machinen.{name}={value}"))
    };
    annotations.iter().fold(run, annotate)
}

/// A port on which nothing of the host listens.
fn free() -> Result<u16> {
    Ok(TcpListener::bind((LOCALHOST, 0))?.local_addr()?.port())
}

/// The address of the host by which it reaches others.
fn host_address() -> Result<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // Nothing is sent; the address only has to have a route.
    socket.connect((Ipv4Addr::new(198, 51, 100, 1), 9)).context("the host has no default route")?;
    Ok(socket.local_addr()?.ip())
}

/// What a port of the host answers, once the container's server has been seen to listen.
fn answer(address: IpAddr, port: u16) -> Result<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let asked = TcpStream::connect((address, port)).and_then(|mut stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            // pasta of 2023 completes a connection from another address than localhost only then.
            stream.write_all(b"hello\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text).map(|_| text)
        });
        match asked {
            Ok(text) if !text.is_empty() => return Ok(text),
            asked => {
                ensure!(Instant::now() < deadline, "port {port} of {address} does not answer: {asked:?}");
            }
        }
        wait();
    }
}

#[expect(clippy::disallowed_methods, reason = "that another process listens has no event")]
fn wait() {
    std::thread::sleep(Duration::from_millis(20));
}

fn refused(port: u16) -> Result<()> {
    let error = TcpStream::connect((LOCALHOST, port)).err().context("something listens")?;
    ensure!(error.kind() == std::io::ErrorKind::ConnectionRefused, "{error}");
    Ok(())
}

fn started<'a>(run: &Run<'a>) -> Result<Running> {
    let running = run.spawn(PATIENCE)?;
    running.wait_for_stdout("ready")?;
    Ok(running)
}

fn published_ports_lead_into_the_container(containerd: &mut Containerd) -> Result<()> {
    let (local, everywhere) = (free()?, free()?);
    let ports = format!("{local}:80,0.0.0.0:{everywhere}:80");
    let script = format!("{SERVER} & nc -ll -p 81 -e echo not published & echo ready; wait");
    let container = run(containerd, &script, &[("ports", &ports)]);
    let running = started(&container)?;
    for (address, port) in [(LOCALHOST, local), (LOCALHOST, everywhere), (host_address()?, everywhere)] {
        let text = answer(address, port)?;
        ensure!(text == "from the container\n", "{address} {port}: {text}");
    }
    // Only what was asked for.
    let elsewhere = TcpStream::connect((host_address()?, local));
    ensure!(elsewhere.is_err(), "a port of localhost is reached at another address");
    let inventory = containerd.inventory()?;
    let pasta = inventory.processes.iter().filter(|process| process.command.starts_with("pasta ")).count();
    ensure!(pasta == 1, "{inventory}");
    end(containerd, &container, running)?;
    refused(local)
}

fn connections_to_the_outside(containerd: &mut Containerd) -> Result<()> {
    let server = TcpListener::bind((host_address()?, 0))?;
    let (address, hidden) = (server.local_addr()?, TcpListener::bind((LOCALHOST, 0))?);
    // The client leaves its direction open: pasta of 2023 may lose the end of an answer to one that does not.
    let script = format!(
        "cat /etc/resolv.conf; ip -o -4 addr show dev eth0; mkfifo /open; nc {} {} 0<>/open; \
         timeout 5 nc -w 2 10.0.2.2 {} < /dev/null; echo end",
        address.ip(),
        address.port(),
        hidden.local_addr()?.port(),
    );
    let running = run(containerd, &script, &[("network", "pasta")]).spawn(PATIENCE)?;
    server.accept()?.0.write_all(b"from the host\n")?;
    let output = running.wait()?.ok()?.text();
    for wanted in ["nameserver 10.0.2.3\n", "inet 10.0.2.100/24", "from the host\n", "end\n"] {
        ensure!(output.contains(wanted), "no {wanted:?} in {output}");
    }
    // Whatever answers at the gateway's address, it is not the host's localhost.
    hidden.set_nonblocking(true)?;
    let reached = hidden.accept();
    ensure!(reached.as_ref().is_err_and(|error| error.kind() == WouldBlock), "{reached:?}");
    // Without the annotation there is loopback only.
    let output = run(containerd, "ls /sys/class/net", &[]).ok()?;
    ensure!(output == "lo\n", "{output}");
    Ok(())
}

fn what_cannot_be_published(containerd: &mut Containerd) -> Result<()> {
    let taken = TcpListener::bind((LOCALHOST, 0))?;
    let port = taken.local_addr()?.port();
    let ports = format!("{port}:80");
    let named = format!("cannot publish the port 127.0.0.1:{port}:80");
    fails_saying(containerd, &run(containerd, "true", &[("ports", &ports)]), &[&named, "in use"])?;
    fails_saying(
        containerd,
        &run(containerd, "true", &[("ports", "80")]),
        &["io.machinen.ports", "it takes"],
    )?;
    let lab = Lab::wired()?;
    let both = run(containerd, "true", &[("ports", "8080:80")]).flag(lab.flag());
    let path = lab.path().display().to_string();
    fails_saying(containerd, &both, &["without a network namespace", &path])?;
    works(containerd)
}

/// Of `ctr run --net-host`, and of a namespace that is the host's by its path.
fn the_hosts_network_is_refused(containerd: &mut Containerd) -> Result<()> {
    let alternative = ["the host's own network", "io.machinen.network=pasta", "io.machinen.ports"];
    for flag in ["--net-host", "--with-ns=network:/proc/self/ns/net"] {
        fails_saying(containerd, &run(containerd, "true", &[]).flag(flag), &alternative)?;
        let output = run(containerd, "ls /sys/class/net", &[("network", "pasta")]).flag(flag).ok()?;
        ensure!(output == "eth0\nlo\n", "{flag}: {output}");
    }
    Ok(())
}

/// The process that owns a VM may be killed at any time, and so may pasta.
fn ended_with_the_shim(containerd: &mut Containerd) -> Result<()> {
    let port = free()?;
    let ports = format!("{port}:80");
    let script = format!("{SERVER} & echo ready; wait");
    let before = containerd.inventory()?;
    let container = run(containerd, SERVER, &[("ports", &ports)]).detached().flag("--null-io");
    container.ok()?;
    answer(LOCALHOST, port)?;
    let from = containerd.log().position();
    let shim = process(containerd, container.container(), ["containerd-shim-machinen-v1", "-id"])?;
    kill(shim, Signal::SIGKILL)?;
    containerd.log().wait_for(from, |line| line.contains("cleaning up dead shim"))?;
    super::life::remove(containerd, container.container())?;
    containerd.settle(&before)?;
    refused(port)?;
    // Without pasta the container runs on with its loopback interface.
    let container = run(containerd, &script, &[("ports", &ports)]);
    let running = started(&container)?;
    answer(LOCALHOST, port)?;
    let from = containerd.log().position();
    kill(process(containerd, "", ["pasta ", "--netns"])?, Signal::SIGKILL)?;
    containerd.log().wait_for(from, |line| line.contains("pasta has ended"))?;
    let gone = format!("{}; ls /sys/class/net", until("! ip addr show dev eth0 > /dev/null"));
    let left = sh(containerd, container.container(), &gone)?;
    ensure!(left == "lo", "{left}");
    end(containerd, &container, running)
}

fn restored_and_forked(containerd: &mut Containerd) -> Result<()> {
    let (first, second) = (free()?, free()?);
    let ports = format!("{first}:80");
    let source = run(containerd, SERVER, &[("ports", &ports)]).detached().flag("--null-io");
    source.ok()?;
    answer(LOCALHOST, first)?;
    let (source, new) = (source.container(), containerd.new_id());
    let output = forking(containerd, &[source, &new])?.run()?;
    let error = output.error_text();
    ensure!(
        output.status != 0 && error.contains("published ports") && error.contains("--publish"),
        "{output}"
    );
    fork(containerd, &["--publish", &format!("{second}:80"), source, &new])?;
    for port in [first, second] {
        let text = answer(LOCALHOST, port)?;
        ensure!(text == "from the container\n", "{text}");
    }
    [source, &new].into_iter().try_for_each(|id| containerd.end(id))?;
    refused(first)?;
    refused(second)?;
    restored(containerd, first)
}

fn restored(containerd: &Containerd, port: u16) -> Result<()> {
    use machinen_integration::{bundle::Bundle, served::Served};
    let bundle = Bundle::busybox(containerd)?;
    // A port for which no capability is needed.
    let config = bundle.config(&["nc", "-ll", "-p", "8000", "-e", "echo", "from the container"], |spec| {
        spec["annotations"] = serde_json::json!({ "io.machinen.ports": format!("{port}:8000") });
    })?;
    let source = Served::run(containerd, &config)?;
    answer(LOCALHOST, port).context("before the checkpoint")?;
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir, true)?;
    source.wait("")?;
    source.end_stopped()?;
    refused(port)?;
    let restored = Served::restored(containerd, &config, &dir)?;
    let text = answer(LOCALHOST, port).context("after the restore")?;
    ensure!(text == "from the container\n", "{text}");
    restored.end()?;
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

fn published_ports_of_udp(containerd: &mut Containerd) -> Result<()> {
    use machinen_integration::{bundle::Bundle, served::Served};
    const ECHO: &str = "
import socket, sys
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.bind(('0.0.0.0', int(sys.argv[1])))
while True:
    data, peer = one.recvfrom(2048)
    one.sendto(data, peer)
";
    let port = UdpSocket::bind((LOCALHOST, 0))?.local_addr()?.port();
    let bundle = Bundle::with_workloads(containerd)?;
    // pasta of 2023 loses the answers to localhost if the two ports differ.
    let config = bundle.config(&["python3.13", "-c", ECHO, &port.to_string()], |spec| {
        let ports = format!("0.0.0.0:{port}:{port}/udp");
        spec["annotations"] = serde_json::json!({ "io.machinen.ports": ports });
    })?;
    let served = Served::run(containerd, &config)?;
    for address in [LOCALHOST, host_address()?] {
        let socket = UdpSocket::bind((address, 0))?;
        socket.connect((address, port))?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        let deadline = Instant::now() + PATIENCE;
        let mut answer = [0; 16];
        // A datagram before the server has its port is lost.
        while socket.send(b"query").and_then(|_| socket.recv(&mut answer)).is_err() {
            ensure!(Instant::now() < deadline, "no answer at {address}");
        }
        ensure!(answer.starts_with(b"query"), "{answer:?}");
    }
    served.end()
}

/// A host without pasta, and one that gives it to all containers with the host's network.
#[test]
fn configured() {
    let without = Setup::new().set("network", "pasta", Value::text("/no/such/pasta"));
    run_with(NEWEST, &without, |containerd| {
        let container = run(containerd, "true", &[("network", "pasta")]);
        fails_saying(containerd, &container, &["/no/such/pasta not found", "Debian package passt"])?;
        works(containerd)
    });
    for (host, interfaces) in [("pasta", "eth0\nlo\n"), ("loopback", "lo\n")] {
        run_with(NEWEST, &Setup::new().set("network", "host", Value::text(host)), |containerd| {
            let output = run(containerd, "ls /sys/class/net", &[]).flag("--net-host").ok()?;
            ensure!(output == interfaces, "{host}: {output}");
            Ok(())
        });
    }
}
