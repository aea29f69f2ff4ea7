//! A guest whose agent lies. The agent is the test's own, in a fake VM.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    fake::{Behaviour, FakeVmm, Hostility},
    served::Served,
    setup::Value,
};
use nix::{
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};

use crate::harness::on_newest_containerd;

on_newest_containerd!(
    sigkill_ends_the_container,
    the_end_of_the_anchor_ends_the_container,
    sigkill_ends_a_pod_of_two,
    a_created_container_is_deleted,
    the_words_of_an_agent_are_bounded,
    a_fifo_stops_no_other_request,
);

/// Longest from SIGKILL to the end of a container: the host's 10 s, an export of 3 s, and time for a slow
/// machine.
const LIMIT: Duration = Duration::from_secs(25);

fn fake(containerd: &mut Containerd, hostility: Hostility) -> Result<(FakeVmm, Bundle)> {
    let fake = FakeVmm::start(containerd)?;
    containerd.configure(&fake.setup().set("rootdisk", "export_timeout_s", Value::number(3)))?;
    fake.behaviour(Behaviour::Hostile(hostility));
    Ok((fake, Bundle::busybox(containerd)?))
}

fn created<'a>(containerd: &'a Containerd, rootfs: &Bundle) -> Result<Served<'a>> {
    let mut served = Served::of(containerd, &rootfs.config(&["sleep", "1000"], |_| ())?)?;
    let stdout = format!("file://{}", served.shim.bundle.join("stdout").display());
    // A whole root file system, which the container's changes are exported to.
    let mount = api::Mount {
        type_: "bind".to_owned(),
        source: rootfs.rootfs().display().to_string(),
        options: vec!["rbind".to_owned(), "rw".to_owned()],
        ..Default::default()
    };
    served.create(|request| {
        request.stdout = stdout;
        request.rootfs = vec![mount];
    })?;
    Ok(served)
}

fn running<'a>(containerd: &'a Containerd, rootfs: &Bundle) -> Result<Served<'a>> {
    let served = created(containerd, rootfs)?;
    served.begin()?;
    Ok(served)
}

fn has_ended(served: &Served<'_>, since: Instant) -> Result<()> {
    let ended = served.wait("")?;
    ensure!(ended.exit_status == 137 && since.elapsed() < LIMIT, "{ended:?} after {:?}", since.elapsed());
    Ok(())
}

/// The number of writable disks whose changes no snapshot has.
fn kept_disks(containerd: &Containerd) -> Result<usize> {
    let layers = containerd.root().join("fake/rootdisk/layers");
    Ok(fs::read_dir(&layers).with_context(|| format!("cannot read {}", layers.display()))?.count())
}

fn sigkill_ends_the_container(containerd: &mut Containerd) -> Result<()> {
    let (fake, _) = fake(containerd, Hostility::IgnoresSigkill)?;
    for hostility in [
        Hostility::IgnoresSigkill,
        Hostility::RefusesSigkill("no such process"),
        Hostility::DripsOutput,
        Hostility::DripsLayer,
    ] {
        fake.behaviour(Behaviour::Hostile(hostility));
        let rootfs = Bundle::busybox(containerd)?;
        let served = running(containerd, &rootfs)?;
        let since = Instant::now();
        // The answer is the agent's to choose.
        let _answer = served.client.call::<api::Empty>("Kill", &served.kill("", 9))?;
        has_ended(&served, since).with_context(|| format!("with {hostility:?}"))?;
        served.end_stopped()?;
        ensure!(kept_disks(containerd)? == 1, "the container's disk should be kept: {hostility:?}");
        fs::remove_dir_all(containerd.root().join("fake/rootdisk/layers"))?;
        fake.settle()?;
    }
    Ok(())
}

fn the_end_of_the_anchor_ends_the_container(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd, Hostility::IgnoresSigkill)?;
    let served = running(containerd, &rootfs)?;
    let since = Instant::now();
    kill(Pid::from_raw(served.pid.cast_signed()), Signal::SIGKILL)?;
    has_ended(&served, since)?;
    served.end_stopped()?;
    fake.settle()
}

/// The VM ends, and with it the other container.
fn sigkill_ends_a_pod_of_two(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd, Hostility::IgnoresSigkill)?;
    let first = running(containerd, &rootfs)?;
    let other = Bundle::busybox(containerd)?;
    let mut second = first.in_same_vm(containerd, &other.config(&["sleep", "1000"], |_| ())?)?;
    second.create(|_| ())?;
    second.begin()?;
    let since = Instant::now();
    first.client.ok::<api::Empty>("Kill", &first.kill("", 9))?;
    has_ended(&first, since)?;
    has_ended(&second, since)?;
    second.client.ok::<api::DeleteResponse>("Delete", &second.delete(""))?;
    fs::remove_dir_all(&second.shim.bundle)?;
    first.end_stopped()?;
    fake.settle()
}

fn a_created_container_is_deleted(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd, Hostility::RefusesSigkill("not now"))?;
    let served = created(containerd, &rootfs)?;
    let since = Instant::now();
    served.client.ok::<api::DeleteResponse>("Delete", &served.delete(""))?;
    ensure!(since.elapsed() < LIMIT, "{:?}", since.elapsed());
    served.shim.shut_down(&served.client)?;
    fake.settle()
}

fn the_words_of_an_agent_are_bounded(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd, Hostility::FailsStart("\x1b[2J\nlevel=fatal ", 200_000))?;
    let served = created(containerd, &rootfs)?;
    let (_, message) = served.client.refused("Start", &served.start(""))?;
    ensure!(
        message.len() < 2 << 10 && message.contains("\\u{1b}[2J"),
        "{} bytes: {message:.200}",
        message.len()
    );
    ensure!(!message.contains(char::is_control), "{message:?}");
    ensure!(!served.shim.log()?.contains('\x1b'), "the log has the agent's words as they are");
    served.client.ok::<api::DeleteResponse>("Delete", &served.delete(""))?;
    served.shim.shut_down(&served.client)?;
    fake.settle()
}

/// A checkpoint directory whose manifest is a fifo without a writer.
fn a_fifo_stops_no_other_request(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd, Hostility::IgnoresSigkill)?;
    let first = running(containerd, &rootfs)?;
    let checkpoint = containerd.root().join("checkpoint");
    fs::create_dir(&checkpoint)?;
    mkfifo(&checkpoint.join("machinen.json"), Mode::S_IRWXU)?;
    let other = Bundle::busybox(containerd)?;
    let second = first.in_same_vm(containerd, &other.config(&["sleep", "1000"], |_| ())?)?;
    let mut request = second.shim.create_request();
    request.checkpoint = checkpoint.display().to_string();
    let (_, message) = second.client.refused("Create", &request)?;
    ensure!(message.contains("not a regular file"), "{message}");
    first.is("", api::Status::RUNNING, first.pid)?;
    fs::remove_dir_all(&second.shim.bundle)?;
    first.end()?;
    fake.settle()
}
