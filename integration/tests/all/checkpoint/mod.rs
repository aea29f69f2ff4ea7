//! Checkpoint and restore, by containerd's clients and by its API.

mod api;
mod cgroups;
mod clients;
mod damage;
mod failures;
pub(crate) mod inspect;
mod joined;
mod killed;
mod processors;
mod refused;
mod sockets;
mod state;
mod stdin;
mod terminals;
mod verify;
mod watches;
mod workloads;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;
use containerd_shim_protos::{
    api::{CheckpointTaskRequest, Empty},
    protobuf::{Message, MessageField, well_known_types::any::Any},
    shim::oci::CheckpointOptions,
};
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
    served::Served,
    shim::Client,
};
use serde_json::json;
use ttrpc::Code;

pub(crate) use clients::remove_what_containerd_leaves;

/// Counts in memory, and shows the count in a file. The file is part of a checkpoint, which may be taken while it is open:
/// it is not on the root file system, which the restored container may have another one of.
const COUNTER: &str = "i=100; while :; do i=$((i+1)); echo $i >/dev/shm/new; mv /dev/shm/new /dev/shm/count; usleep 50000; done";

/// A shell command that succeeds if the counter counts on within some seconds, from at least `least`.
fn counts_from(least: u32) -> String {
    format!(
        "cd /dev/shm; until [ -s count ]; do usleep 50000; done; a=$(cat count); [ $a -ge {least} ] || exit 3; \
         for n in $(seq 200); do [ $(cat count) -gt $((a+2)) ] && exit 0; usleep 50000; done; exit 4"
    )
}

pub(crate) fn request(
    served: &Served<'_>,
    path: &Path,
    options: Option<&CheckpointOptions>,
) -> Result<CheckpointTaskRequest> {
    let options = match options {
        None => MessageField::none(),
        Some(options) => MessageField::some(Any {
            type_url: "containerd.runc.v1.CheckpointOptions".to_owned(),
            value: options.write_to_bytes()?,
            ..Default::default()
        }),
    };
    Ok(CheckpointTaskRequest {
        id: served.shim.id.clone(),
        path: path.display().to_string(),
        options,
        ..Default::default()
    })
}

/// Takes a checkpoint with the default options.
pub(crate) fn checkpoint(served: &Served<'_>, path: &Path) -> Result<()> {
    served.client.ok::<Empty>("Checkpoint", &request(served, path, None)?).map(drop)
}

/// Replaces a container by another one that is restored from a checkpoint of it.
fn moved<'a>(containerd: &'a Containerd, source: &Served<'_>, config: &Path) -> Result<Served<'a>> {
    let dir = containerd.root().join("images");
    checkpoint(source, &dir)?;
    source.end()?;
    let restored = Served::restored(containerd, config, &dir)?;
    fs::remove_dir_all(&dir)?;
    Ok(restored)
}

/// The configuration of a container that runs a program with these capabilities and a file system in memory on
/// /tmp.
fn python(bundle: &Bundle, name: &str, program: &str, capabilities: &[&str]) -> Result<PathBuf> {
    fs::write(bundle.rootfs().join(name), program)?;
    bundle.config(&["python3.13", &format!("/{name}")], |spec| {
        let capabilities =
            json!({"bounding": capabilities, "effective": capabilities, "permitted": capabilities});
        spec["process"]["capabilities"] = capabilities;
        spec["process"]["env"] = json!(["PATH=/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1"]);
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(mount("/tmp", "tmpfs", "tmpfs", &["mode=1777"]));
    })
}

fn refused(client: &Client, request: &CheckpointTaskRequest) -> Result<(Code, String)> {
    client.refused("Checkpoint", request)
}
