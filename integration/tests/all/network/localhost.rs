//! The localhost of the container's namespace on the host leads into the container.

use std::{
    fs::File,
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use machinen_base::netns;
use machinen_integration::{bundle::Bundle, containerd::Containerd, served::Served};

use super::{
    lab::Lab,
    moved::{checkpoint, config},
    run, until,
};
use crate::harness::{on_every_containerd, on_newest_containerd};

on_every_containerd!(servers_are_reached);
on_newest_containerd!(
    only_what_listens_is_reached,
    directions_end_by_themselves,
    the_end_of_the_vm_ends_connections,
    after_a_checkpoint_and_a_restore,
    the_localhost_of_the_pid,
    datagrams_reach_servers,
    the_hosts_own_localhost_is_not_changed,
);

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
/// How long a change may take to get around on a slow host.
const PATIENCE: Duration = Duration::from_secs(60);

/// Calls `work` in the namespace at the path.
fn inside<T: Send>(path: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    netns::inside(File::open(path)?.as_fd(), work)
}

/// Connects in a namespace.
fn dial(namespace: &Path, address: IpAddr, port: u16) -> io::Result<TcpStream> {
    let stream = inside(namespace, || TcpStream::connect((address, port)))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

#[expect(clippy::disallowed_methods, reason = "that another process listens has no event")]
fn wait() {
    thread::sleep(Duration::from_millis(10));
}

/// Connects as soon as something listens.
fn dial_soon(namespace: &Path, address: IpAddr, port: u16) -> Result<TcpStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match dial(namespace, address, port) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused && Instant::now() < deadline => {
                wait();
            }
            dialed => return dialed.with_context(|| format!("{address}, port {port}")),
        }
    }
}

/// Waits until nothing listens any more.
fn refused_soon(namespace: &Path, address: IpAddr, port: u16) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while let Ok(stream) = dial(namespace, address, port) {
        drop(stream);
        ensure!(Instant::now() < deadline, "{address}, port {port} still accepts connections");
        wait();
    }
    Ok(())
}

fn all(mut stream: TcpStream) -> Result<String> {
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn kill(containerd: &Containerd, id: &str) -> Result<()> {
    containerd.ctr_ok(&["tasks", "kill", "--signal", "SIGKILL", id]).map(drop)
}

fn servers_are_reached(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let servers = ["127.0.0.1:7001", "0.0.0.0:7002", "[::1]:7003", "[::]:7004"];
    let commands = servers.map(|address| format!("busybox httpd -h /srv -p {address}"));
    let script =
        format!("mkdir -p /srv; echo served > /srv/file; {}; echo ready; sleep 1000", commands.join("; "));
    let container = run(containerd, &lab, &script);
    let running = container.spawn(Duration::from_secs(180))?;
    running.wait_for_stdout("ready")?;
    for (address, port) in [(V4, 7001), (V4, 7002), (V6, 7003), (V6, 7004), (V4, 7004)] {
        let client = dial_soon(&lab.path(), address, port)?;
        (&client).write_all(b"GET /file HTTP/1.0\r\n\r\n")?;
        let text = all(client)?;
        ensure!(text.ends_with("\r\nserved\n"), "{address}, port {port}: {text}");
    }
    for (address, port) in [(V6, 7001), (V6, 7002), (V4, 7003)] {
        let error = dial(&lab.path(), address, port).err().context("a connection")?;
        ensure!(error.kind() == ErrorKind::ConnectionRefused, "{address}, port {port}: {error}");
    }
    kill(containerd, container.container())?;
    running.wait()?;
    lab.nothing_is_left()
}

fn only_what_listens_is_reached(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let path = lab.path();
    // Another process of the namespace has a port, and the container cannot take that from it.
    let sidecar = inside(&path, || TcpListener::bind("127.0.0.1:7001"))?;
    let script = format!(
        "nc -ll -p 7001 -e echo from the container & nc -ll -p 7002 -e echo open & server=$!; \
         echo ready; {}; kill $server; echo closed; wait",
        until("test -e /close")
    );
    let container = run(containerd, &lab, &script);
    let running = container.spawn(Duration::from_secs(180))?;
    running.wait_for_stdout("ready")?;
    ensure!(all(dial_soon(&path, V4, 7002)?)? == "open\n", "not the container's answer");
    let client = dial(&path, V4, 7001)?;
    let (accepted, _) = sidecar.accept()?;
    ensure!(accepted.peer_addr()? == client.local_addr()?, "not the sidecar's connection");
    let before = Instant::now();
    let error = dial(&path, V4, 7003).err().context("a connection to a port on which nothing listens")?;
    ensure!(error.kind() == ErrorKind::ConnectionRefused, "{error}");
    ensure!(before.elapsed() < Duration::from_secs(1), "refused after {:?}", before.elapsed());
    let id = container.container();
    containerd.ctr_ok(&["tasks", "exec", "--exec-id", "close", id, "touch", "/close"])?;
    running.wait_for_stdout("closed")?;
    refused_soon(&path, V4, 7002)?;
    kill(containerd, id)?;
    running.wait().map(drop)
}

fn directions_end_by_themselves(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let container =
        run(containerd, &lab, "nc -ll -p 7001 -e cat & nc -ll -p 7002 -e wc -c & echo ready; wait");
    let running = container.spawn(Duration::from_secs(240))?;
    running.wait_for_stdout("ready")?;
    // More than all buffers on the way have room for, and not a multiple of any.
    let data: Vec<u8> = (0..6_000_001_u32).map(|number| (number / 3) as u8).collect();
    let counted = dial_soon(&lab.path(), V4, 7002)?;
    (&counted).write_all(&data)?;
    counted.shutdown(Shutdown::Write)?;
    ensure!(all(counted)? == format!("{}\n", data.len()), "the end did not arrive after the data");
    let echo = dial_soon(&lab.path(), V4, 7001)?;
    let mut reader = echo.try_clone()?;
    let back = thread::spawn(move || {
        let mut back = Vec::new();
        reader.read_to_end(&mut back).map(|_| back)
    });
    (&echo).write_all(&data)?;
    echo.shutdown(Shutdown::Write)?;
    let back = back.join().map_err(|_| anyhow::anyhow!("panic"))??;
    ensure!(back == data, "{} of {} bytes came back", back.len(), data.len());
    // Many at once, and one after the other.
    let path = lab.path();
    let exchange = || -> Result<()> {
        for _ in 0..5 {
            let client = dial(&path, V4, 7001)?;
            (&client).write_all(b"a line\n")?;
            client.shutdown(Shutdown::Write)?;
            ensure!(all(client)? == "a line\n", "not what was sent");
        }
        Ok(())
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..8).map(|_| scope.spawn(exchange)).collect();
        clients.into_iter().try_for_each(|client| client.join().map_err(|_| anyhow::anyhow!("panic"))?)
    })?;
    kill(containerd, container.container())?;
    running.wait().map(drop)
}

fn the_end_of_the_vm_ends_connections(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let container = run(containerd, &lab, "nc -ll -p 7001 -e cat & echo ready; wait");
    let running = container.spawn(Duration::from_secs(180))?;
    running.wait_for_stdout("ready")?;
    let mut client = dial_soon(&lab.path(), V4, 7001)?;
    client.write_all(b"x")?;
    client.read_exact(&mut [0])?;
    kill(containerd, container.container())?;
    match client.read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => anyhow::bail!("{other:?}"),
    }
    running.wait()?;
    refused_soon(&lab.path(), V4, 7001)?;
    lab.nothing_is_left()
}

fn after_a_checkpoint_and_a_restore(containerd: &mut Containerd) -> Result<()> {
    let (lab, other, bundle) = (Lab::wired()?, Lab::wired()?, Bundle::busybox(containerd)?);
    let script = "nc -ll -p 7001 -e echo reached";
    let served = Served::run(containerd, &config(&bundle, &lab.path(), script, &[])?)?;
    ensure!(all(dial_soon(&lab.path(), V4, 7001)?)? == "reached\n", "before the checkpoint");
    let dir = containerd.root().join("checkpoint");
    checkpoint(&served, &dir, false)?;
    ensure!(all(dial_soon(&lab.path(), V4, 7001)?)? == "reached\n", "after the checkpoint");
    let config = config(&bundle, &other.path(), script, &[])?;
    let restored = Served::restored(containerd, &config, &dir)?;
    ensure!(all(dial_soon(&other.path(), V4, 7001)?)? == "reached\n", "after the restore");
    restored.end()?;
    served.end()
}

/// A server that returns what it gets, and the port that another one is on after the first message `move`.
const ECHO: &str = "
import socket
def server(port):
    found = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    found.bind(('::', port))
    return found
one = server(5300)
while True:
    data, peer = one.recvfrom(65535)
    if data == b'move':
        one = server(5301)
    one.sendto(data + b' for ' + str(one.getsockname()[1]).encode(), peer)
";

/// What a server answers to a datagram, sent again until it does.
fn ask(namespace: &Path, address: IpAddr, port: u16, text: &[u8]) -> Result<Vec<u8>> {
    let socket = inside(namespace, || UdpSocket::bind((address, 0)))?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.connect((address, port))?;
    let deadline = Instant::now() + PATIENCE;
    let mut answer = vec![0; 65_535];
    loop {
        // Nothing may listen yet, which the error of an earlier datagram says.
        let answered = socket.send(text).and_then(|_| socket.recv(&mut answer));
        match answered {
            Ok(length) => {
                answer.truncate(length);
                return Ok(answer);
            }
            Err(error) => ensure!(Instant::now() < deadline, "no answer from {address} {port}: {error}"),
        }
        wait();
    }
}

fn datagrams_reach_servers(containerd: &mut Containerd) -> Result<()> {
    let (lab, bundle) = (Lab::wired()?, Bundle::with_workloads(containerd)?);
    let config = bundle.config(&["python3.13", "-c", ECHO], |spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("an array");
        namespaces.retain(|namespace| namespace["type"] != "network");
        namespaces.push(serde_json::json!({ "type": "network", "path": lab.path() }));
    })?;
    let served = Served::run(containerd, &config)?;
    for address in [V4, V6] {
        let answer = ask(&lab.path(), address, 5300, b"query")?;
        ensure!(answer == b"query for 5300", "{address}: {}", String::from_utf8_lossy(&answer));
    }
    let large = vec![b'x'; 60_000];
    let answer = ask(&lab.path(), V4, 5300, &large)?;
    ensure!(answer.starts_with(&large), "{} bytes are answered", answer.len());
    // A port that is bound while the container runs.
    let socket = inside(&lab.path(), || UdpSocket::bind((V4, 0)))?;
    socket.send_to(b"move", (V4, 5300))?;
    let answer = ask(&lab.path(), V4, 5301, b"query")?;
    ensure!(answer == b"query for 5301", "{}", String::from_utf8_lossy(&answer));
    served.end()?;
    lab.nothing_is_left()
}

/// A container without a path has a namespace of its own, in which nsenter(1) finds the container's servers.
fn the_localhost_of_the_pid(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["nc", "-ll", "-p", "7001", "-e", "echo", "reached"], |_| ())?;
    let served = Served::run(containerd, &config)?;
    let path = format!("/proc/{}/ns/net", served.pid);
    ensure!(all(dial_soon(Path::new(&path), V4, 7001)?)? == "reached\n", "not reached");
    served.end()
}

fn the_hosts_own_localhost_is_not_changed(containerd: &mut Containerd) -> Result<()> {
    // A port that the host does not use.
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let script = format!("nc -ll -p {port} -e echo reached & echo ready; wait");
    let container = containerd.run(crate::harness::IMAGE, &["sh", "-c", &script]).flag("--net-host");
    let container = container.flag("--annotation=io.machinen.network=pasta");
    let running = container.spawn(Duration::from_secs(120))?;
    running.wait_for_stdout("ready")?;
    let id = container.container();
    let reached = until(&format!("nc 127.0.0.1 {port} < /dev/null"));
    containerd.ctr_ok(&["tasks", "exec", "--exec-id", "look", id, "sh", "-c", &reached])?;
    let error =
        TcpStream::connect((V4, port)).err().context("the host's localhost leads into the container")?;
    ensure!(error.kind() == ErrorKind::ConnectionRefused, "{error}");
    kill(containerd, id)?;
    running.wait().map(drop)
}
