//! Processors that the configuration names (`vm.cpu`): what a container sees, and where its checkpoint is restored.

use anyhow::{Result, ensure};
use containerd_shim_protos::api::CreateTaskRequest;
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    served::Served,
    setup::{Setup, Value},
};
use ttrpc::Code;

use super::{COUNTER, checkpoint, counts_from};
use crate::harness::{IMAGE, fails_saying, on_newest_containerd, works};

on_newest_containerd!(a_model_is_what_a_container_sees, a_checkpoint_needs_the_features_that_it_had);

/// A model that every host with KVM and the emulation have, and one that lacks most of its features.
const MODEL: &str = "Nehalem";
const LESS: &str = "qemu64";

fn cpu(containerd: &Containerd, model: &str) -> Result<()> {
    containerd.configure(&Setup::new().set("vm", "cpu", Value::text(model)))
}

fn a_model_is_what_a_container_sees(containerd: &mut Containerd) -> Result<()> {
    cpu(containerd, MODEL)?;
    let flags = containerd.run(IMAGE, &["grep", "-m1", "^flags", "/proc/cpuinfo"]).ok()?;
    let has = |flag: &str| flags.split_ascii_whitespace().any(|word| word == flag);
    ensure!(has("sse4_2") && has("popcnt") && !has("avx") && !has("bmi1"), "{MODEL} has {flags}");
    // QEMU knows whether there is such a model; machinen, whether it is a model at all.
    cpu(containerd, "Nehalam")?;
    let run = containerd.run(IMAGE, &["true"]);
    fails_saying(containerd, &run, &["vm.cpu", "Nehalam", "-cpu help"])?;
    cpu(containerd, "host,migratable=off")?;
    fails_saying(containerd, &run, &["cpu = ", "host,migratable=off", "-cpu help"])?;
    containerd.configure(&Setup::new())?;
    works(containerd)
}

fn a_checkpoint_needs_the_features_that_it_had(containerd: &mut Containerd) -> Result<()> {
    cpu(containerd, MODEL)?;
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sh", "-c", COUNTER], |_| ())?;
    let served = Served::run(containerd, &config)?;
    let (status, text) = served.shell(&counts_from(100))?;
    ensure!(status == 0, "the counter does not count: {status}: {text}");
    let dir = containerd.root().join("images");
    checkpoint(&served, &dir)?;
    served.end()?;
    cpu(containerd, LESS)?;
    let poor = Served::of(containerd, &config)?;
    let request = CreateTaskRequest { checkpoint: dir.display().to_string(), ..poor.shim.create_request() };
    let (code, text) = poor.client.refused("Create", &request)?;
    ensure!(code == Code::FAILED_PRECONDITION, "{code:?}: {text}");
    ensure!(text.contains("lacks: ") && text.contains("sse4_2") && text.contains("vm.cpu"), "{text}");
    poor.shim.shut_down(&poor.client)?;
    cpu(containerd, &format!("{MODEL},+aes"))?;
    let restored = Served::restored(containerd, &config, &dir)?;
    let (status, text) = restored.shell(&counts_from(101))?;
    ensure!(status == 0, "the restored counter does not count: {status}: {text}");
    restored.end()?;
    Ok(std::fs::remove_dir_all(&dir)?)
}
