//! Checkpoint and restore of containers that have a network.

use std::{
    fs,
    io::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::ChildStdin,
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{
    api::{Empty, PauseRequest, ResumeRequest},
    shim::oci::CheckpointOptions,
};
use machinen_integration::{bundle::Bundle, containerd::Containerd, process::Running, served::Served};
use serde_json::json;

use super::{
    capture::Capture,
    lab::{Lab, OTHER, OTHER6, OWN, OWN6},
    until,
};
use crate::{checkpoint::request, harness::on_newest_containerd};

on_newest_containerd!(
    connections_outlast_a_container_that_ends_with_its_checkpoint,
    connections_move_to_another_namespace,
    a_paused_container_that_is_resumed_keeps_its_connections,
    restored_with_other_addresses,
    a_trial_restore_has_the_addresses,
);

/// Sends everything back that arrives.
pub(super) const ECHO: &str = "nc -ll -p 7000 -e cat";

/// A configuration with a network namespace.
pub(super) fn config(
    bundle: &Bundle,
    namespace: &Path,
    script: &str,
    annotations: &[(&str, &str)],
) -> Result<PathBuf> {
    bundle.config(&["sh", "-c", script], |spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("an array");
        namespaces.retain(|namespace| namespace["type"] != "network");
        namespaces.push(json!({ "type": "network", "path": namespace }));
        for (name, value) in annotations {
            spec["annotations"][format!("io.machinen.{name}")] = (*value).into();
        }
    })
}

/// A connection from the neighbour to the container.
pub(super) struct Connection {
    client: Running,
    stdin: ChildStdin,
    sent: String,
}

impl Connection {
    pub(super) fn open(lab: &Lab, address: &str) -> Result<Self> {
        let mut client = lab.talk_in_peer(&["busybox", "nc", address, "7000"])?;
        let stdin = client.stdin().context("no stdin")?;
        Ok(Self { client, stdin, sent: String::new() })
    }

    pub(super) fn send(&mut self, line: &str) -> Result<()> {
        let line = format!("{line}\n");
        self.stdin.write_all(line.as_bytes())?;
        self.sent.push_str(&line);
        Ok(())
    }

    /// Waits until everything has come back.
    pub(super) fn returned(&self) -> Result<()> {
        self.client.wait_for_stdout(&self.sent)
    }

    pub(super) fn exchange(&mut self, line: &str) -> Result<()> {
        self.send(line)?;
        self.returned()
    }
}

/// A running container that listens.
pub(super) fn listening<'a>(containerd: &'a Containerd, config: &Path) -> Result<Served<'a>> {
    let served = Served::run(containerd, config)?;
    // Port 7000, in the state LISTEN.
    let ready = until("cat /proc/net/tcp /proc/net/tcp6 | grep -q ':1B58 .* 0A '");
    ensure!(served.exec_to("ready", &["sh", "-c", &ready], "")? == 0, "the program does not listen");
    Ok(served)
}

fn pause(served: &Served<'_>) -> Result<()> {
    let request = PauseRequest { id: served.shim.id.clone(), ..Default::default() };
    served.client.ok::<Empty>("Pause", &request).map(drop)
}

/// The message with which a restore is refused.
fn refused_restore(containerd: &Containerd, config: &Path, dir: &Path) -> Result<String> {
    let served = Served::of(containerd, config)?;
    let mut request = served.shim.create_request();
    request.checkpoint = dir.display().to_string();
    let (_, message) = served.client.refused("Create", &request)?;
    served.shim.shut_down(&served.client)?;
    Ok(message)
}

pub(super) fn checkpoint(served: &Served<'_>, dir: &Path, exit: bool) -> Result<()> {
    let options = CheckpointOptions { open_tcp: true, exit, ..Default::default() };
    served.client.ok::<Empty>("Checkpoint", &request(served, dir, Some(&options))?).map(drop)
}

fn own() -> Ipv4Addr {
    OWN.parse().expect("it is an address")
}

fn connections_outlast_a_container_that_ends_with_its_checkpoint(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let bundle = Bundle::busybox(containerd)?;
    let config = config(&bundle, &lab.path(), ECHO, &[])?;
    let source = listening(containerd, &config)?;
    let mut connection = Connection::open(&lab, OWN)?;
    connection.exchange("before")?;
    let capture = Capture::of(&lab.peer_path())?;
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir, true)?;
    source.wait("")?;
    source.end_stopped()?;
    // The namespace's own kernel answers to nothing of this. The packet is sent again and again.
    connection.send("meanwhile")?;
    let peer = Lab::mac_in(&lab.peer_path())?;
    let mut seen = capture.wait_for("packet of the neighbour", |frame| frame.sender() == Some(peer))?;
    let restored = Served::restored(containerd, &config, &dir)?;
    connection.returned()?;
    connection.exchange("after")?;
    seen.extend(capture.frames()?);
    let end = seen.iter().find(|frame| frame.ends_connection(own()));
    ensure!(end.is_none(), "the neighbour has seen the end of the connection: {end:?}");
    restored.end()?;
    // Without a checkpoint, the end of a container is the end of its connections.
    capture.wait_for("end of the connection", |frame| frame.ends_connection(own()))?;
    fs::remove_dir_all(&dir)?;
    lab.nothing_is_left()
}

fn connections_move_to_another_namespace(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::bridged()?;
    let bundle = Bundle::busybox(containerd)?;
    let source = listening(containerd, &config(&bundle, &lab.path(), ECHO, &[])?)?;
    let mut connection = Connection::open(&lab, OWN)?;
    connection.exchange("before")?;
    let capture = Capture::of(&lab.peer_path())?;
    let dir = containerd.root().join("images");
    // A client that pauses the container, and ends it later.
    pause(&source)?;
    checkpoint(&source, &dir, false)?;
    source.end()?;
    lab.change(&["link", "delete", "eth0"])?;
    let namespace = lab.second([OWN, OWN6])?;
    let mac = Lab::mac_in(&namespace)?;
    let mut restored = Served::of(containerd, &config(&bundle, &namespace, ECHO, &[])?)?;
    restored.create_from(&dir)?;
    let mut seen = capture.frames()?;
    let early = seen.iter().find(|frame| frame.is_of_a_container(mac));
    ensure!(early.is_none(), "the container has sent something before its start: {early:?}");
    restored.begin()?;
    seen.extend(capture.wait_for("gratuitous ARP", |frame| frame.announces(own(), mac))?);
    let own6: Ipv6Addr = OWN6.parse()?;
    if !seen.iter().any(|frame| frame.announces6(own6, mac)) {
        seen.extend(capture.wait_for("neighbour advertisement", |frame| frame.announces6(own6, mac))?);
    }
    connection.exchange("after")?;
    seen.extend(capture.frames()?);
    let end = seen.iter().find(|frame| frame.ends_connection(own()));
    ensure!(end.is_none(), "the neighbour has seen the end of the connection: {end:?}");
    restored.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

fn a_paused_container_that_is_resumed_keeps_its_connections(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let bundle = Bundle::busybox(containerd)?;
    let source = listening(containerd, &config(&bundle, &lab.path(), ECHO, &[])?)?;
    let mut connection = Connection::open(&lab, OWN)?;
    connection.exchange("before")?;
    pause(&source)?;
    let capture = Capture::of(&lab.peer_path())?;
    connection.send("while it is paused")?;
    capture.wait_for("acknowledgement", |frame| frame.is_tcp_from(own()))?;
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir, false)?;
    capture.frames()?;
    connection.send("after the checkpoint")?;
    let peer = Lab::mac_in(&lab.peer_path())?;
    let seen = capture.wait_for("packet of the neighbour", |frame| frame.sender() == Some(peer))?;
    let sent = seen.iter().find(|frame| frame.is_tcp_from(own()));
    ensure!(sent.is_none(), "data was acknowledged that the checkpoint does not have: {sent:?}");
    let resume = ResumeRequest { id: source.shim.id.clone(), ..Default::default() };
    source.client.ok::<Empty>("Resume", &resume)?;
    connection.returned()?;
    connection.exchange("after")?;
    source.end()?;
    fs::remove_dir_all(&dir)?;
    lab.nothing_is_left()
}

fn restored_with_other_addresses(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::bridged()?;
    let namespace = lab.second([OTHER, OTHER6])?;
    let bundle = Bundle::busybox(containerd)?;
    let source = listening(containerd, &config(&bundle, &lab.path(), ECHO, &[])?)?;
    let mut connection = Connection::open(&lab, OWN)?;
    connection.exchange("before")?;
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir, false)?;
    source.end()?;
    // The connection cannot be kept.
    let error = refused_restore(containerd, &config(&bundle, &namespace, ECHO, &[])?, &dir)?;
    for words in [&format!("a connection from {OWN}:7000"), "io.machinen.tcp=close"] {
        ensure!(error.contains(words), "no {words:?} in {error}");
    }
    let close = [("tcp", "close")];
    let restored = Served::restored(containerd, &config(&bundle, &namespace, ECHO, &close)?, &dir)?;
    let (status, shown) = restored.shell("ip -o addr show dev eth0; ip route")?;
    for wanted in [OTHER, OTHER6, "default via 10.77.0.1"] {
        ensure!(status == 0 && shown.contains(wanted), "no {wanted:?} in {shown}");
    }
    ensure!(!shown.contains(&format!("{OWN}/")) && !shown.contains(&format!("{OWN6}/")), "{shown}");
    Connection::open(&lab, OTHER)?.exchange("to the new address")?;
    restored.end()?;
    fs::remove_dir_all(&dir)?;
    bound_to_an_old_address(containerd, &lab, &bundle, &namespace)
}

fn bound_to_an_old_address(
    containerd: &Containerd,
    lab: &Lab,
    bundle: &Bundle,
    namespace: &Path,
) -> Result<()> {
    let script = format!("httpd -f -p {OWN}:7000");
    let source = listening(containerd, &config(bundle, &lab.path(), &script, &[])?)?;
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir, false)?;
    source.end()?;
    let close = [("tcp", "close")];
    let error = refused_restore(containerd, &config(bundle, namespace, &script, &close)?, &dir)?;
    for words in [&format!("bound to {OWN}:7000"), "does not have the address", "0.0.0.0"] {
        ensure!(error.contains(words), "no {words:?} in {error}");
    }
    Ok(fs::remove_dir_all(&dir)?)
}

fn a_trial_restore_has_the_addresses(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let bundle = Bundle::busybox(containerd)?;
    let script = format!("httpd -p {OWN}:7001; {ECHO}");
    let source = listening(containerd, &config(&bundle, &lab.path(), &script, &[("verify", "restore")])?)?;
    let mut connection = Connection::open(&lab, OWN)?;
    connection.exchange("before")?;
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir, false)?;
    connection.exchange("after")?;
    source.end()?;
    fs::remove_dir_all(&dir)?;
    lab.nothing_is_left()
}
