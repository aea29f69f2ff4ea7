//! OCI hooks of every kind, at their moments.

use std::fs;

use anyhow::{Result, ensure};
use machinen_integration::{
    bundle::mount,
    oci::{Oci, json_of},
};
use serde_json::{Value, json};

use super::with_oci;

with_oci!(in_order, a_failure_of_each);

/// The moments before the user's program, in order, with their place: the host, or the container.
const BEFORE: [&str; 4] = ["prestart", "createRuntime", "createContainer", "startContainer"];

/// Adds a hook of each kind, which appends its name to the file `order`, and writes the state that it is given to a file.
/// The one that is named fails then.
fn hooks(oci: &Oci, failing: &'static str) -> impl Fn(&mut Value) {
    let dir = oci.file("hooks").display().to_string();
    move |spec| {
        let hook = |name: &str| {
            let dir = if name == "startContainer" { "/hooks" } else { &dir };
            let status = u8::from(name == failing);
            let script = format!("echo {name} >> {dir}/order; cat > {dir}/{name}; exit {status}");
            json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"] }])
        };
        let names = BEFORE.into_iter().chain(["poststart", "poststop"]);
        spec["hooks"] =
            names.map(|name| (name.to_owned(), hook(name))).collect::<serde_json::Map<_, _>>().into();
        let mounts = spec["mounts"].as_array_mut().expect("a list");
        mounts.push(mount("/hooks", "bind", &dir, &["bind", "rw"]));
    }
}

fn order(oci: &Oci) -> Result<Vec<String>> {
    let text = fs::read_to_string(oci.file("hooks").join("order")).unwrap_or_default();
    Ok(text.lines().map(str::to_owned).collect())
}

fn in_order(oci: &Oci) -> Result<()> {
    fs::create_dir(oci.file("hooks"))?;
    let bundle =
        oci.bundle("h", &["sh", "-c", "echo program >> /hooks/order; sleep 1000"], hooks(oci, ""))?;
    let _container = oci.create("h")?;
    let mut created = order(oci)?;
    if !oci.runtime().has_vm() {
        // runc 1.1 runs this hook too early, in the creation.
        created.retain(|name| name != "poststart");
    }
    ensure!(created == BEFORE[..3], "{created:?}");
    oci.ok(&["start", "h"])?;
    let wait = "until grep -q program /hooks/order; do sleep 0.1; done";
    oci.ok(&["exec", "h", "sh", "-c", wait])?;
    // The program, and what comes before it in the container, run at the same time as the hook of the host.
    let mut all = order(oci)?;
    ensure!(all.iter().any(|name| name == "poststart"), "{all:?}");
    all.retain(|name| name != "poststart");
    ensure!(all[3..] == ["startContainer", "program"], "{all:?}");
    oci.ok(&["delete", "--force", "h"])?;
    ensure!(order(oci)?.last().is_some_and(|last| last == "poststop"), "{:?}", order(oci)?);
    let statuses = ["creating", "creating", "creating", "created", "running", "stopped"];
    for (name, status) in BEFORE.into_iter().chain(["poststart", "poststop"]).zip(statuses) {
        let state = json_of(&oci.file("hooks").join(name))?;
        let status = if name == "poststart" && !oci.runtime().has_vm() { "created" } else { status };
        ensure!(state["id"] == "h" && state["status"] == status, "{name}: {state}");
        ensure!(state["bundle"] == bundle.dir().display().to_string(), "{name}: {state}");
        ensure!(state["pid"].as_u64().is_some_and(|pid| pid > 0) == (name != "poststop"), "{name}: {state}");
    }
    Ok(())
}

/// A hook that fails before the start ends the creation, or the start, and nothing is left.
fn a_failure_of_each(oci: &Oci) -> Result<()> {
    fs::create_dir(oci.file("hooks"))?;
    let bundle = oci.bundle("h", &super::SLEEP, |_| {})?;
    let dir = oci.bundle_dir("h");
    for (number, name) in BEFORE.into_iter().enumerate() {
        oci.configure(&bundle, "h", &super::SLEEP, hooks(oci, name))?;
        if name == "startContainer" {
            let _container = oci.create("h")?;
            let pid = oci.pid("h")?;
            // runc's start does not wait for it.
            let _started = oci.output(&["start", "h"])?;
            oci.wait(pid)?;
            oci.ok(&["delete", "--force", "h"])?;
        } else {
            oci.fails(&["create", "--bundle", &dir, "h"], 1, "hook")?;
        }
        let mut all = order(oci)?;
        all.retain(|name| BEFORE.contains(&name.as_str()));
        ensure!(all == BEFORE[..=number], "{name}: {all:?}");
        super::is_gone(oci, "h")?;
        fs::remove_file(oci.file("hooks").join("order"))?;
    }
    Ok(())
}
