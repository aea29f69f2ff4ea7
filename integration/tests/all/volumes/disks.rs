//! Block devices of the host: as a device, and as a file system that the guest mounts.

use std::fs;

use anyhow::{Result, ensure};
use containerd_shim_protos::api::CheckpointTaskRequest;
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
    loop_device::LoopDevice,
    served::Served,
};
use serde_json::{Value, json};

use super::{shell, source};
use crate::harness::{fails_saying, on_newest_containerd};

on_newest_containerd!(devices_and_file_systems_on_them);

/// What `--device` of Docker adds.
fn add_device(device: &LoopDevice, spec: &mut Value, path: &str, access: &str) {
    let (major, minor) = device.numbers;
    spec["linux"]["devices"] =
        json!([{"path": path, "type": "b", "major": major, "minor": minor, "fileMode": 0o660}]);
    spec["linux"]["resources"]["devices"] = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "b", "major": major, "minor": minor, "access": access},
    ]);
}

fn devices_and_file_systems_on_them(containerd: &mut Containerd) -> Result<()> {
    let dir = source(containerd)?;
    let files = source(containerd)?;
    fs::write(files.join("file"), "of the host\n")?;
    let device = LoopDevice::new(&dir.join("image"), &files)?;
    let unchanged = LoopDevice::new(&dir.join("unchanged"), &files)?;
    let bundle = Bundle::busybox(containerd)?;
    let file_system = |options: &[&str]| {
        bundle.config(&["sleep", "1000"], |spec| {
            let mounts = spec["mounts"].as_array_mut().expect("an array");
            mounts.push(mount("/disk", "ext4", &device.path, options));
        })
    };
    let served = Served::run(containerd, &file_system(&["noatime"])?)?;
    let seen = shell(&served, "echo of the guest >/disk/file; sync; grep -c ' /disk ext4 rw' /proc/mounts")?;
    ensure!(seen == "1\n", "{seen}");
    // Neither the host nor another container mounts it meanwhile.
    let again = file_system(&[])?;
    fails_saying(containerd, &containerd.run_spec(&again), &[&device.path, "is in use on this host"])?;
    let request = CheckpointTaskRequest {
        id: served.shim.id.clone(),
        path: dir.join("checkpoint").display().to_string(),
        ..CheckpointTaskRequest::default()
    };
    let (_, refused) = served.client.refused("Checkpoint", &request)?;
    ensure!(refused.contains("not part of a checkpoint"), "{refused}");
    served.end()?;
    let script = "cat /*/file; touch /ro/new 2>&1 | grep -o Read-only";
    let config = bundle.config(&["sh", "-ec", script], |spec| {
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(mount("/disk", "ext4", &device.path, &[]));
        mounts.push(mount("/ro", "ext4", &unchanged.path, &["ro"]));
    })?;
    let seen = containerd.run_spec(&config).ok()?;
    ensure!(seen == "of the guest\nof the host\nRead-only\n", "{seen}");
    let script = "dd if=/dev/xvda bs=1 skip=1080 count=2 2>/dev/null | od -An -tx1; \
                  (echo x | dd of=/dev/xvda bs=512 seek=2 conv=notrunc) 2>&1 | grep -ciE 'not permitted|denied' || true";
    for (access, refused) in [("rw", "0"), ("r", "1")] {
        let config =
            bundle.config(&["sh", "-c", script], |spec| add_device(&device, spec, "/dev/xvda", access))?;
        let seen = containerd.run_spec(&config).ok()?;
        let words: Vec<_> = seen.split_whitespace().collect();
        ensure!(words == ["53", "ef", refused], "{access}: {seen}");
    }
    Ok(())
}
