//! Volumes at unusual places, in unusual states and with unusual files, when their container is restored.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::{DeleteResponse, Empty};
use machinen_integration::{bundle::Bundle, containerd::Containerd, served::Served};
use serde_json::{Value, json};

use super::{bind, shell, source};
use crate::{
    checkpoint::{checkpoint, request},
    harness::on_newest_containerd,
};

on_newest_containerd!(
    mounts_of_all_kinds,
    unix_sockets,
    programs_and_memory_fetched_later,
    in_the_vm_of_another_container,
    a_lost_server_fails_a_checkpoint,
);

const READY: &str = "until [ -e /dev/shm/ready ]; do usleep 50000; done";

/// A destination with a space, one behind a link of the image, one below another volume, and mounts that the container
/// has made of a volume and of a part of one, also in a mount namespace of their own.
fn mounts_of_all_kinds(containerd: &mut Containerd) -> Result<()> {
    let (data, outer, inner) = (source(containerd)?, source(containerd)?, source(containerd)?);
    fs::create_dir(data.join("part"))?;
    fs::write(data.join("part/f"), "part\n")?;
    fs::write(inner.join("f"), "inner\n")?;
    let bundle = Bundle::busybox(containerd)?;
    std::os::unix::fs::symlink("/var", bundle.rootfs().join("link"))?;
    for name in ["mnt", "again", "own"] {
        fs::create_dir_all(bundle.rootfs().join(name))?;
    }
    let script = "mount --bind '/my data/part' /mnt; mount --bind '/my data' /again; \
                  unshare -m sh -c 'mount --bind /mnt /own; exec 3</own/f; touch /dev/shm/own; until [ -e /dev/shm/go ]; do usleep 50000; done; cat <&3 >/dev/shm/inside; cat /own/f >>/dev/shm/inside; touch /dev/shm/done' & \
                  exec 3<'/my data/part/f' 4</mnt/f 5</again/part/f 6</outer/sub/f 7</var/sub/f; \
                  until [ -e /dev/shm/own ]; do usleep 50000; done; \
                  touch /dev/shm/ready; until [ -e /dev/shm/done ]; do usleep 50000; done; for n in 3 4 5 6 7; do cat <&$n; done >/dev/shm/new; mv /dev/shm/new /dev/shm/outside; \
                  exec sleep 1000";
    let config = bundle.config(&["sh", "-ec", script], |spec| {
        bind(spec, &data, "/my data", &[]);
        bind(spec, &outer, "/outer", &[]);
        bind(spec, &inner, "/outer/sub", &[]);
        bind(spec, &inner, "/link/sub", &["ro"]);
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set]
                .as_array_mut()
                .expect("an array")
                .push("CAP_SYS_ADMIN".into());
        }
    })?;
    let served = Served::run(containerd, &config)?;
    shell(&served, READY)?;
    let dir = containerd.root().join("images");
    checkpoint(&served, &dir)?;
    served.end()?;
    let restored = Served::restored(containerd, &config, &dir)?;
    let look = "touch /dev/shm/go; until [ -s /dev/shm/outside ]; do usleep 50000; done; cat /dev/shm/outside /dev/shm/inside; \
                cat /mnt/f /again/part/f /link/sub/f; touch /link/sub/x 2>/dev/null || echo refused";
    let seen = shell(&restored, look)?;
    ensure!(seen == "part\npart\npart\ninner\ninner\npart\npart\npart\npart\ninner\nrefused\n", "{seen}");
    restored.end()?;
    // The mount point of a volume in another one is made, as for a new container.
    fs::remove_dir(outer.join("sub"))?;
    let again = Served::restored(containerd, &config, &dir)?;
    ensure!(shell(&again, "cat /outer/sub/f")? == "inner\n", "another volume is mounted");
    again.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

/// Listens on a name of its bind(2) and on another one, and answers with the label.
const SOCKETS: &str = r#"
import os, socket, threading
def serve(label, server):
    while True:
        client, _ = server.accept(); client.sendall(label); client.close()
for label in ["plain", "renamed"]:
    server = socket.socket(socket.AF_UNIX); server.bind(f"/data/{label}.new" if label == "renamed" else f"/data/{label}")
    server.listen()
    if label == "renamed": os.rename("/data/renamed.new", "/data/renamed")
    threading.Thread(target=serve, args=(label.encode(), server)).start()
open("/dev/shm/ready", "w").close()
"#;
const ASK: &str = r#"
import socket
for label in ["plain", "renamed"]:
    client = socket.socket(socket.AF_UNIX); client.connect(f"/data/{label}"); print(client.recv(99).decode())
"#;

fn python(bundle: &Bundle, program: &str, data: &Path, change: impl FnOnce(&mut Value)) -> Result<PathBuf> {
    bundle.config(&["python3.13", "-c", program], |spec| {
        bind(spec, data, "/data", &[]);
        spec["process"]["env"] = json!(["PATH=/usr/bin:/bin", "LC_ALL=C", "PYTHONDONTWRITEBYTECODE=1"]);
        change(spec);
    })
}

fn unix_sockets(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let bundle = Bundle::with_workloads(containerd)?;
    let verified = python(&bundle, SOCKETS, &data, |spec| {
        spec["annotations"]["io.machinen.verify"] = "restore".into();
    })?;
    let served = Served::run(containerd, &verified)?;
    shell(&served, READY)?;
    let dir = containerd.root().join("images");
    let ask = format!("/usr/bin/python3.13 -c '{ASK}'");
    // The sockets of a trial restore would take the place of those of the container, which continues.
    let (_, message) = served.client.refused("Checkpoint", &request(&served, &dir, None)?)?;
    ensure!(
        message.contains("/data/plain and whose file is in a volume, where a trial restore"),
        "{message}"
    );
    ensure!(shell(&served, &ask)? == "plain\nrenamed\n", "the source's sockets are lost");
    served.end()?;
    fs::remove_file(data.join("plain"))?;
    fs::remove_file(data.join("renamed"))?;
    let config = python(&bundle, SOCKETS, &data, |_| ())?;
    let served = Served::run(containerd, &config)?;
    shell(&served, READY)?;
    checkpoint(&served, &dir)?;
    ensure!(shell(&served, &ask)? == "plain\nrenamed\n", "the source's sockets are lost");
    served.end()?;
    let restored = Served::restored(containerd, &config, &dir)?;
    let answers = shell(&restored, &ask)?;
    ensure!(answers == "plain\nrenamed\n", "{answers}");
    restored.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

/// The program itself and a mapped file are in the volume; memory is copied ahead of the checkpoint and fetched later.
fn programs_and_memory_fetched_later(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let bundle = Bundle::busybox(containerd)?;
    fs::copy(bundle.rootfs().join("bin/busybox"), data.join("sh"))?;
    let script = "touch /dev/shm/ready; until [ -e /dev/shm/go ]; do usleep 50000; done; echo well >/data/out; exec sleep 1000";
    let config = bundle.config(&["/data/sh", "-c", script], |spec| {
        bind(spec, &data, "/data", &[]);
        spec["annotations"] = json!({"io.machinen.lazy": "true", "io.machinen.pre-dump": "true"});
        // A process can only look at processes that have no more capabilities than itself.
        spec["process"]["capabilities"] = json!({});
    })?;
    let served = Served::run(containerd, &config)?;
    shell(&served, READY)?;
    let dir = containerd.root().join("images");
    checkpoint(&served, &dir)?;
    served.end()?;
    let restored = Served::restored(containerd, &config, &dir)?;
    let exe = shell(
        &restored,
        "readlink /proc/1/exe; touch /dev/shm/go; until [ -s /data/out ]; do usleep 50000; done",
    )?;
    ensure!(exe == "/data/sh\n" && fs::read_to_string(data.join("out"))? == "well\n", "{exe}");
    restored.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

fn in_the_vm_of_another_container(containerd: &mut Containerd) -> Result<()> {
    let (data, others) = (source(containerd)?, source(containerd)?);
    fs::write(data.join("f"), "one\ntwo\n")?;
    let bundle = Bundle::busybox(containerd)?;
    let script = "exec 3</data/f; read -r a <&3; touch /dev/shm/ready; until [ -e /dev/shm/go ]; do usleep 50000; done; \
                  read -r b <&3; echo $b >/data/out; exec sleep 1000";
    let config = bundle.config(&["sh", "-c", script], |spec| bind(spec, &data, "/data", &[]))?;
    let served = Served::run(containerd, &config)?;
    shell(&served, READY)?;
    let dir = containerd.root().join("images");
    checkpoint(&served, &dir)?;
    served.end()?;
    let other = super::served(containerd, &others)?;
    let mut restored = other.in_same_vm(containerd, &config)?;
    restored.create_from(&dir)?;
    restored.begin()?;
    shell(&restored, "touch /dev/shm/go; until [ -s /data/out ]; do usleep 50000; done")?;
    ensure!(fs::read_to_string(data.join("out"))? == "two\n", "another file was read");
    ensure!(fs::read_dir(&others)?.next().is_none(), "the other container's volume was written");
    restored.client.ok::<Empty>("Kill", &restored.kill("", 9))?;
    restored.wait("")?;
    restored.client.ok::<DeleteResponse>("Delete", &restored.delete(""))?;
    fs::remove_dir_all(&restored.shim.bundle)?;
    other.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

fn a_lost_server_fails_a_checkpoint(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let served = super::served(containerd, &data)?;
    let server = *super::life::servers(containerd)?.first().context("no server")?;
    super::life::kill(server)?;
    let dir = containerd.root().join("images");
    let (_, message) = served.client.refused("Checkpoint", &request(&served, &dir, None)?)?;
    ensure!(message.contains("/run/machinen-shares") && !dir.exists(), "{message}");
    ensure!(shell(&served, "echo well")? == "well\n", "the container does not continue");
    served.end()
}
