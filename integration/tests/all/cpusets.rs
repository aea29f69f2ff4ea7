//! Sets of the host's CPUs and nodes, in VMs that have fewer.

use std::{fs, path::PathBuf};

use anyhow::{Result, ensure};
use containerd_shim_protos::{
    api,
    protobuf::{MessageField, well_known_types::any::Any},
};
use machinen_integration::{bundle::Bundle, containerd::Containerd, served::Served};
use serde_json::{Value, json};
use ttrpc::Code;

use crate::harness::on_newest_containerd;

on_newest_containerd!(a_set_has_as_many_of_the_guests_cpus, invalid_sets_are_refused);

/// A container with these limits in a VM with two CPUs.
fn limited(bundle: &Bundle, resources: &Value) -> Result<PathBuf> {
    bundle.config(&["sleep", "1000"], |spec| {
        spec["annotations"] = json!({"io.machinen.vcpus": "2"});
        spec["linux"]["resources"] = resources.clone();
    })
}

fn update(served: &Served<'_>, resources: &Value) -> api::UpdateTaskRequest {
    let any = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
        value: resources.to_string().into_bytes(),
        ..Default::default()
    };
    api::UpdateTaskRequest {
        id: served.shim.id.clone(),
        resources: MessageField::some(any),
        ..Default::default()
    }
}

/// The CPUs that a process in the container may run on.
fn may_run_on(served: &Served<'_>, wanted: &str) -> Result<()> {
    let look = format!("[ $(grep Cpus_allowed_list /proc/self/status | cut -f 2) = {wanted} ]");
    ensure!(served.exec_to("look", &["sh", "-c", &look], "")? == 0, "not on CPUs {wanted}");
    Ok(())
}

fn a_set_has_as_many_of_the_guests_cpus(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let first = Served::run(containerd, &limited(&bundle, &json!({"cpu": {"cpus": "4-7", "mems": "1"}}))?)?;
    may_run_on(&first, "0-1")?;
    for (resources, wanted) in [
        (json!({"cpu": {"cpus": "6"}}), "0"),
        (json!({"cpu": {"cpus": "7", "mems": "0-1"}}), "1"),
        (json!({"cpu": {"cpus": "", "shares": 512}}), "1"),
        (json!({"unified": {"cpuset.cpus": "12-15", "cpuset.mems": "1"}}), "0-1"),
        (json!({"cpu": {"cpus": "2"}}), "0"),
    ] {
        first.client.ok::<api::Empty>("Update", &update(&first, &resources))?;
        may_run_on(&first, wanted)?;
    }
    // A second container that shares no CPU with the first, in the same VM.
    let mut other =
        first.in_same_vm(containerd, &limited(&bundle, &json!({"unified": {"cpuset.cpus": "3"}}))?)?;
    other.create(|_| ())?;
    other.begin()?;
    may_run_on(&other, "1")?;
    other.client.ok::<api::Empty>("Kill", &other.kill("", 9))?;
    other.wait("")?;
    other.client.ok::<api::DeleteResponse>("Delete", &other.delete(""))?;
    fs::remove_dir_all(&other.shim.bundle)?;
    first.end()
}

fn invalid_sets_are_refused(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let served = Served::run(containerd, &bundle.config(&["sleep", "1000"], |_| ())?)?;
    for set in ["a", "5-2", "1-", "0-99999999999", ","] {
        for (field, resources) in [
            ("linux.resources.cpu.cpus", json!({"cpu": {"cpus": set}})),
            ("linux.resources.cpu.mems", json!({"cpu": {"mems": set}})),
            ("linux.resources.unified", json!({"unified": {"cpuset.cpus": set}})),
        ] {
            let refused = served.client.refused("Update", &update(&served, &resources))?;
            let other = served.in_same_vm(containerd, &limited(&bundle, &resources)?)?;
            let not_created = other.client.refused("Create", &other.shim.create_request())?;
            fs::remove_dir_all(&other.shim.bundle)?;
            for (code, message) in [refused, not_created] {
                let named = message.contains(field) && message.contains(&format!("{set:?}"));
                ensure!(
                    code == Code::INVALID_ARGUMENT && named && message.contains("0-3,8"),
                    "{set}: {message}"
                );
            }
        }
    }
    served.end()
}
