//! Pods of Kubernetes by containerd's CRI plugin: what their start, their containers and their probes take.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    cri::{Handler, IMAGE, Node, Pod},
    inventory,
    paths::{self, Version},
    samples::Samples,
    setup::Setup,
    templates::Templates,
};

use crate::{cpu, footprint::field, report::Report};

/// An exec probe of each second, for as many seconds.
const PROBES: u32 = 20;

/// What pods of one runtime take.
#[derive(Default)]
struct Figures {
    /// From RunPodSandbox until the first container runs.
    pod: Samples,
    /// The pod's second container, from CreateContainer until it runs.
    second: Samples,
    /// A container of `ctr run -d`, with the same containerd.
    single: Samples,
    /// All processes of a pod with one container, and with three, KiB.
    pss: [u64; 2],
    /// Processor time of all processes of a pod, of one CPU, while an exec probe runs each second.
    probing: f64,
}

pub(crate) fn measure(rounds: usize, report: &mut Report) -> Result<()> {
    for handler in [Handler::Runc, Handler::Machinen, Handler::MachinenSandbox] {
        let figures = of(handler, rounds).with_context(|| format!("pods of {}", handler.name()))?;
        let (name, key) = (handler.name(), handler.name().replace('-', "_"));
        report.time(
            format!("pod of {name}: to its first running container"),
            format!("pod_{key}_ms"),
            &figures.pod,
        );
        report.time(
            format!("  its second container, {name}"),
            format!("pod_second_{key}_ms"),
            &figures.second,
        );
        report.time(
            format!("  one container by ctr run -d, {name}"),
            format!("pod_single_{key}_ms"),
            &figures.single,
        );
        report.size(
            format!("PSS of a pod of one container, {name}"),
            format!("pod_pss_{key}_kib"),
            figures.pss[0],
        );
        report.size(
            format!("PSS of a pod of three, {name}"),
            format!("pod_pss_three_{key}_kib"),
            figures.pss[1],
        );
        report.share(
            &format!("an exec probe each second takes of a CPU, {name}"),
            &format!("pod_probe_{key}"),
            figures.probing,
        );
        if handler == Handler::Machinen {
            let (pod, second) = (figures.pod.median(), figures.second.median());
            report.target("second container: at most 0.4 x the pod's start", second / pod, 0.4, "x");
            let single = figures.single.median();
            report.target("pod: at most 1.2 x a container by ctr", pod / single, 1.2, "x");
        }
    }
    Ok(())
}

fn of(handler: Handler, rounds: usize) -> Result<Figures> {
    let node = Node::start(Version::V2_1, handler, &Setup::of_user())?;
    let templates = node.containerd().root().join(Templates::DIR);
    node.containerd().configure(&Setup::of_user().templates(&templates, "use"))?;
    if handler != Handler::Runc {
        Templates::new(node.containerd())?.build()?;
    }
    let mut figures = Figures::default();
    // The first is not counted: it fills the caches.
    for round in 0..=rounds {
        let (pod, second, single) = starts(&node, handler)?;
        if round > 0 {
            figures.pod.push(pod);
            figures.second.push(second);
            figures.single.push(single);
        }
        eprintln!("pods of {}: round {round} of {rounds}", handler.name());
    }
    let before = inventory::descendants(node.containerd().keeper_pid())?;
    let pod = node.pod(|_| ())?;
    pod.idle("first")?;
    figures.pss[0] = pss(&node, &before)?;
    figures.probing = probing(&node, &pod, &before)?;
    pod.idle("second")?;
    pod.idle("third")?;
    figures.pss[1] = pss(&node, &before)?;
    pod.remove()?;
    Ok(figures)
}

fn starts(node: &Node, handler: Handler) -> Result<(Duration, Duration, Duration)> {
    let began = Instant::now();
    let pod = node.pod(|_| ())?;
    pod.idle("first")?;
    let first = began.elapsed();
    let began = Instant::now();
    pod.idle("second")?;
    let second = began.elapsed();
    pod.remove()?;
    let containerd = node.containerd();
    let runtime = if handler == Handler::Runc { paths::RUNC.to_owned() } else { paths::runtime() };
    let run = containerd.run(IMAGE, &["sleep", "100000"]);
    let run = run.runtime(&runtime).detached().flag("--null-io");
    let id = run.container().to_owned();
    let output = run.output()?;
    ensure!(output.status == 0, "{output}");
    containerd.end(&id)?;
    Ok((first, second, output.duration))
}

/// KiB of the processes that were not there before.
fn pss(node: &Node, before: &[inventory::Process]) -> Result<u64> {
    own(node, before)?.iter().map(|process| field(process, "smaps_rollup", "Pss:")).sum()
}

fn own(node: &Node, before: &[inventory::Process]) -> Result<Vec<inventory::Process>> {
    let all = inventory::descendants(node.containerd().keeper_pid())?;
    let known = |process: &inventory::Process| before.iter().any(|other| other.pid == process.pid);
    Ok(all.into_iter().filter(|process| !known(process) && !process.command.contains("template-")).collect())
}

/// The part of a CPU that the pod's processes take while an exec probe runs each second.
#[expect(clippy::disallowed_methods, reason = "the pace of the probes is what is measured")]
fn probing(node: &Node, pod: &Pod, before: &[inventory::Process]) -> Result<f64> {
    let container = pod.idle("probed")?;
    container.exec(&["true"], 10)?;
    let processes = own(node, before)?;
    let used = || processes.iter().map(|process| cpu::own(process.pid)).sum::<Result<Duration>>();
    let (start, before) = (Instant::now(), used()?);
    for number in 1..=PROBES {
        container.exec(&["true"], 10)?;
        thread::sleep((start + Duration::from_secs(number.into())).saturating_duration_since(Instant::now()));
    }
    let taken = used()?.saturating_sub(before).as_secs_f64() / start.elapsed().as_secs_f64();
    container.stop(0)?;
    container.remove()?;
    Ok(taken)
}
