//! Sockets of the host in volumes: a process of a container that connects to one reaches the host's process.

use std::{
    fs::{self, Permissions},
    io::{Read as _, Write as _},
    os::{
        fd::AsFd as _,
        unix::{
            fs::{PermissionsExt as _, symlink},
            net::{UnixDatagram, UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Result, ensure};
use containerd_shim_protos::api::CheckpointTaskRequest;
use machinen_integration::{bundle::Bundle, containerd::Containerd, served::Served};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde_json::json;
use tempfile::TempDir;

use super::{bind, shell, source};
use crate::harness::on_newest_containerd;

on_newest_containerd!(
    connections_reach_the_host,
    only_processes_of_volumes_are_reached,
    the_guests_own_sockets,
    a_connection_is_no_part_of_a_checkpoint,
);

/// Answers each connection with the user who has made it and with what was sent, once that has ended.
fn answer(path: &Path) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o666))?;
    thread::spawn(move || {
        for connection in listener.incoming() {
            // The listener is open as long as the test's process runs.
            let Ok(connection) = connection else { return };
            thread::spawn(move || talk(connection));
        }
    });
    Ok(())
}

fn talk(mut connection: UnixStream) -> Result<()> {
    let credentials = getsockopt(&connection.as_fd(), PeerCredentials)?;
    let mut sent = Vec::new();
    connection.read_to_end(&mut sent)?;
    write!(connection, "user {} ", credentials.uid())?;
    connection.write_all(&sent)?;
    Ok(())
}

/// A container with Python that has the volumes `/data`, and `/single` where that is given.
fn container<'a>(
    containerd: &'a Containerd,
    data: &Path,
    single: Option<&Path>,
    options: &[&str],
) -> Result<Served<'a>> {
    let bundle = Bundle::with_workloads(containerd)?;
    fs::write(bundle.rootfs().join("sockets.py"), include_str!("sockets.py"))?;
    let config = bundle.config(&["sleep", "1000"], |spec| {
        bind(spec, data, "/data", options);
        if let Some(single) = single {
            bind(spec, single, "/run/single.sock", options);
        }
    })?;
    Served::run(containerd, &config)
}

fn python(served: &Served<'_>, what: &str) -> Result<String> {
    shell(served, &format!("/usr/bin/python3.13 /sockets.py {what}"))
}

/// A directory, and a link to it with a short path: the address of a socket has at most 108 bytes.
fn short(containerd: &Containerd) -> Result<(PathBuf, TempDir)> {
    let (data, dir) = (source(containerd)?, tempfile::tempdir()?);
    symlink(&data, dir.path().join("d"))?;
    Ok((data, dir))
}

fn connections_reach_the_host(containerd: &mut Containerd) -> Result<()> {
    let (data, dir) = short(containerd)?;
    let name = dir.path().join("d");
    fs::create_dir(name.join("deep"))?;
    answer(&name.join("deep/s"))?;
    answer(&name.join("single"))?;
    answer(&name.join("closed"))?;
    fs::set_permissions(name.join("closed"), Permissions::from_mode(0o600))?;
    for options in [&["rw"][..], &["ro"]] {
        let served = container(containerd, &data, Some(&data.join("single")), options)?;
        let seen = shell(&served, "ls -l /data /data/deep | grep -c '^s'; ls -l /run | grep -o '^s'")?;
        ensure!(seen == "3\ns\n", "{seen}");
        let seen = python(&served, "attempt /run/single.sock /data/deep/s /data/single")?;
        ensure!(seen == "user 0 x\n".repeat(3), "{seen}");
        let seen = python(&served, "much /data/deep/s")?;
        ensure!(seen == "equal\n", "{seen}");
        let seen = python(&served, "many /run/single.sock")?;
        ensure!(seen == "all\n", "{seen}");
        served.end()?;
    }
    // The guest's kernel checks the permissions, and the host's process sees the user.
    let bundle = Bundle::with_workloads(containerd)?;
    fs::write(bundle.rootfs().join("sockets.py"), include_str!("sockets.py"))?;
    let command = ["/usr/bin/python3.13", "/sockets.py", "attempt", "/data/deep/s", "/data/closed"];
    let config = bundle.config(&command, |spec| {
        bind(spec, &data, "/data", &[]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["capabilities"] = json!({});
    })?;
    let seen = containerd.run_spec(&config).ok()?;
    ensure!(seen == "user 1000 x\nEACCES\n", "{seen}");
    Ok(())
}

/// What does not listen refuses, a process that has begun anew is reached, and nothing outside of the volumes is.
fn only_processes_of_volumes_are_reached(containerd: &mut Containerd) -> Result<()> {
    let (parent, dir) = short(containerd)?;
    let name = dir.path().join("d");
    fs::create_dir(name.join("data"))?;
    let data = name.join("data");
    answer(&name.join("above"))?;
    symlink(parent.join("above"), data.join("absolute"))?;
    symlink("../above", data.join("relative"))?;
    drop(UnixListener::bind(data.join("dead"))?);
    let _datagrams = UnixDatagram::bind(data.join("datagrams"))?;
    answer(&data.join("alive"))?;
    let served = container(containerd, &parent.join("data"), None, &[])?;
    let seen =
        python(&served, "attempt /data/absolute /data/relative /data/dead /data/datagrams /data/alive")?;
    ensure!(seen == "ENOENT\nENOENT\nECONNREFUSED\nECONNREFUSED\nuser 0 x\n", "{seen}");
    let seen = python(&served, "packets /data/alive")?;
    ensure!(seen == "EPROTOTYPE\n", "{seen}");
    for path in ["dead", "alive"] {
        fs::remove_file(data.join(path))?;
        answer(&data.join(path))?;
    }
    let seen = shell(&served, "sleep 1.2; /usr/bin/python3.13 /sockets.py attempt /data/dead /data/alive")?;
    ensure!(seen == "user 0 x\nuser 0 x\n", "{seen}");
    served.end()
}

/// They connect processes of the guest, as before.
fn the_guests_own_sockets(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let served = container(containerd, &data, None, &[])?;
    for name in ["first", "second"] {
        let seen = python(&served, &format!("own /data/{name}"))?;
        ensure!(seen == "of the guest\n", "{seen}");
    }
    // Its process has ended.
    let seen = shell(&served, "sleep 1.2; /usr/bin/python3.13 /sockets.py attempt /data/first")?;
    ensure!(seen == "ECONNREFUSED\n", "{seen}");
    served.end()
}

/// The container continues.
fn a_connection_is_no_part_of_a_checkpoint(containerd: &mut Containerd) -> Result<()> {
    let (data, dir) = short(containerd)?;
    let listener = UnixListener::bind(dir.path().join("d/s"))?;
    let bundle = Bundle::with_workloads(containerd)?;
    fs::write(bundle.rootfs().join("sockets.py"), include_str!("sockets.py"))?;
    let command = ["/usr/bin/python3.13", "/sockets.py", "hold", "/data/s"];
    let served = Served::run(containerd, &bundle.config(&command, |spec| bind(spec, &data, "/data", &[]))?)?;
    let (mut connection, _) = listener.accept()?;
    connection.read_exact(&mut [0])?;
    let request = CheckpointTaskRequest {
        id: served.shim.id.clone(),
        path: data.join("checkpoint").display().to_string(),
        ..CheckpointTaskRequest::default()
    };
    let (_, refused) = served.client.refused("Checkpoint", &request)?;
    ensure!(refused.contains("unix: "), "{refused}");
    ensure!(shell(&served, "echo continues")? == "continues\n");
    served.end()
}
