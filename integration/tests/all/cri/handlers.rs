//! Two handlers of one containerd, each with a configuration of machinen of its own, as two RuntimeClasses of a cluster
//! have them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use machinen_integration::{
    containerd::Containerd,
    cri::{Container, Handler, Node, OTHER_CONFIGURATION, Pod, api, eventually},
    inventory,
    paths::Version,
    setup::{Setup, Value},
    templates::Templates,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value as Json;

use super::pod_tests;
use crate::clones::origin;

pod_tests! {
    machinen_1_6(V1_6, Machinen): [with_and_without_a_pool, files_that_cannot_be_used];
    machinen_2_1(V2_1, Machinen): [with_and_without_a_pool, files_that_cannot_be_used];
    sandbox_2_1(V2_1, MachinenSandbox): [with_and_without_a_pool];
}

/// The memory of VMs that have the other configuration, MiB; less than those of the first one have.
const MEMORY_MIB: u64 = 300;

/// The handler whose configuration is [`OTHER_CONFIGURATION`].
fn other(node: &Node) -> Result<Handler> {
    match node.handler() {
        Handler::Machinen => Ok(Handler::MachinenOther),
        Handler::MachinenSandbox => Ok(Handler::MachinenSandboxOther),
        handler => bail!("{handler:?} has no other one"),
    }
}

/// Runs a pod whose VM must have this origin.
fn pod(node: &Node, handler: Handler, wanted: &str) -> Result<Pod> {
    let from = node.containerd().log().position();
    let pod = node.pod_of(handler, |_| ())?;
    let origin = origin(node.containerd(), from, pod.id())?;
    ensure!(origin == wanted, "the VM of a pod of {handler:?} is no {wanted} but a {origin}");
    Ok(pod)
}

/// The clones that wait, by the command line with the first configuration.
fn members(containerd: &Containerd) -> Result<Vec<Json>> {
    let output = containerd.machinen(&["pool", "ls", "--json"])?.run()?.ok()?;
    serde_json::from_slice(&output.stdout).with_context(|| format!("odd list: {output}"))
}

/// Waits until the clones that are ready have these configurations, in any order.
fn ready(containerd: &Containerd, wanted: &[&Path]) -> Result<()> {
    let mut wanted: Vec<_> = wanted.iter().map(|file| file.display().to_string()).collect();
    wanted.sort();
    eventually("the pools are full", || {
        let members = members(containerd)?;
        let ready = members.iter().filter(|member| member["state"] == "ready");
        let mut files: Vec<_> =
            ready.map(|member| member["config"].as_str().unwrap_or_default().to_owned()).collect();
        files.sort();
        Ok((files == wanted && members.len() == wanted.len()).then_some(()))
    })
}

/// Which file the command line names for a pod.
fn configuration(containerd: &Containerd, pod: &Pod) -> Result<PathBuf> {
    let debug = containerd.machinen(&["debug", pod.id()])?.run()?.ok()?.text();
    let file = debug.lines().find_map(|line| line.strip_prefix("configuration "));
    Ok(file.with_context(|| format!("no configuration: {debug}"))?.into())
}

/// The process with this configuration that serves a pod.
fn server(node: &Node, file: &Path) -> Result<Pid> {
    let variable = format!("MACHINEN_CONFIG={}", file.display());
    let all = inventory::descendants(node.containerd().keeper_pid())?;
    let is_server = |process: &&inventory::Process| {
        let environment = fs::read_to_string(format!("/proc/{}/environ", process.pid)).unwrap_or_default();
        process.command.contains("containerd-shim-machinen-v1 -namespace")
            && environment.split('\0').any(|it| it == variable)
    };
    let found: Vec<_> = all.iter().filter(is_server).collect();
    let [server] = found[..] else { bail!("not one server with {}: {found:?}", file.display()) };
    Ok(Pid::from_raw(server.pid.cast_signed()))
}

/// Of the VM of a container, MiB.
fn memory(container: &Container<'_>) -> Result<u64> {
    let kib = container.shell("awk '/^MemTotal/ { print $2 }' /proc/meminfo")?;
    Ok(kib.trim().parse::<u64>().with_context(|| format!("odd memory {kib:?}"))? >> 10)
}

fn with_and_without_a_pool(node: &mut Node) -> Result<()> {
    let (first, second) = (node.handler(), other(node)?);
    let containerd = node.containerd();
    let templates = Templates::new(containerd)?;
    let pools = containerd.root().join("pool");
    let common = || Setup::new().templates(&templates.dir, "use").set("pool", "dir", Value::path(&pools));
    let size = |size| common().set("pool", "size", Value::number(size));
    let (file, own) = (containerd.root().join(OTHER_CONFIGURATION), containerd.root().join("machinen.toml"));
    containerd.configure(&size(1))?;
    let memory_mib = Value::number(MEMORY_MIB);
    containerd.configuration(OTHER_CONFIGURATION, &size(0).set("vm", "memory_mib", memory_mib))?;
    templates.build()?;

    let of_first = pod(node, first, "clone")?;
    ready(containerd, &[&own])?;
    let waits = members(containerd)?[0]["pid"].clone();
    // The other handler's pods neither take the clone that waits nor make one.
    let of_second = pod(node, second, "boot")?;
    let main = of_second.idle("main")?;
    let (more, less) = (memory(&of_first.idle("main")?)?, memory(&main)?);
    ensure!(less < MEMORY_MIB && more > MEMORY_MIB, "VMs of {more} and {less} MiB");
    let ours = [configuration(containerd, &of_first)?, configuration(containerd, &of_second)?];
    ensure!(ours == [own.clone(), file.clone()], "{ours:?}");
    let still = members(containerd)?;
    ensure!(still.len() == 1 && still[0]["pid"] == waits && still[0]["state"] == "ready", "{still:?}");
    let of_pool = pod(node, first, "ready")?;
    ready(containerd, &[&own])?;

    // containerd cleans up after a server that was killed, and so does kubelet.
    kill(server(node, &file)?, Signal::SIGKILL)?;
    ensure!(main.wait()?.exit_code != 0, "{:?}", main.status());
    eventually("the pod is not ready any more", || {
        Ok((of_second.status()?.state() == api::PodSandboxState::SandboxNotready).then_some(()))
    })?;
    for pod in [of_first, of_second, of_pool] {
        pod.remove()?;
    }

    // With pools for both each has its own, although the VMs are alike, and the command line finds both.
    containerd.configuration(OTHER_CONFIGURATION, &size(1))?;
    pod(node, second, "clone")?.remove()?;
    ready(containerd, &[&own, &file])?;
    for handler in [first, second] {
        pod(node, handler, "ready")?.remove()?;
        ready(containerd, &[&own, &file])?;
    }
    let drained = containerd.machinen(&["pool", "drain", "--json"])?.run()?.ok()?.text();
    ensure!(drained.contains("\"ended\":2") || drained.contains("\"ended\": 2"), "{drained}");
    templates.remove_all()?;
    Ok(fs::remove_dir_all(pools)?)
}

/// The pod is refused with the file and the reason, and nothing of it is left.
fn is_refused(node: &Node, handler: Handler, texts: &[&str]) -> Result<()> {
    let Err(refusal) = node.pod_of(handler, |_| ()) else { bail!("a pod runs, without {texts:?}") };
    let refusal = format!("{refusal:#}");
    ensure!(texts.iter().all(|text| refusal.contains(text)), "{texts:?} are not in {refusal}");
    node.remove_all_pods()?;
    node.settle()
}

fn files_that_cannot_be_used(node: &mut Node) -> Result<()> {
    let handler = other(node)?;
    let (root, config) = {
        let root = node.containerd().root().to_owned();
        (root.clone(), root.join("containerd.toml"))
    };
    let file = root.join(OTHER_CONFIGURATION).display().to_string();
    is_refused(node, handler, &["cannot read the configuration file", &file, "No such file"])?;
    fs::write(&file, "[pool]\nsizes = 0\n")?;
    is_refused(node, handler, &[&file, "is not valid", "unknown field `sizes`"])?;
    // Pods with the host's configuration do not mind.
    node.pod(|_| ())?.remove()?;

    let correct = fs::read_to_string(&config)?;
    let option = format!("ConfigPath = {file:?}");
    let relative = correct.replace(&option, "ConfigPath = \"other.toml\"");
    ensure!(relative != correct, "{correct}");
    fs::write(&config, relative)?;
    node.restart()?;
    is_refused(node, handler, &["\"other.toml\" is not absolute"])?;
    fs::write(&config, correct.replace(&option, "NoPivotRoot = true"))?;
    node.restart()?;
    match node.containerd().version() {
        // It does not pass on what it does not know.
        Version::V1_6 => node.pod_of(handler, |_| ())?.remove()?,
        _ => is_refused(node, handler, &["NoPivotRoot = true", "without a ConfigPath"])?,
    }

    fs::write(&config, correct)?;
    node.containerd().configuration(OTHER_CONFIGURATION, &Setup::new())?;
    node.restart()?;
    let pod = node.pod_of(handler, |_| ())?;
    let before = pod.idle("before")?;
    // After a restart of containerd, further containers of the pod still fit its server.
    node.restart()?;
    let after = pod.idle("after")?;
    for container in [before, after] {
        ensure!(container.shell("echo served")? == "served\n", "a container does not work");
    }
    ensure!(configuration(node.containerd(), &pod)? == Path::new(&file), "another configuration");
    pod.remove()
}
