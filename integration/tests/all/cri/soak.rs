//! Many pods, one after the other: what they leave must not add up. `make soak` runs 200 of them, and the suite 20.

use std::{env, fs};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    cri::{Node, eventually},
    inventory,
};

use super::pod_tests;

pod_tests! {
    soak_machinen_2_1(V2_1, Machinen): [pods_leave_nothing_that_adds_up];
    soak_sandbox_2_1(V2_1, MachinenSandbox): [pods_leave_nothing_that_adds_up];
}

/// How many pods; a variable of the environment.
const PODS: &str = "MACHINEN_SOAK_PODS";
/// After so many of them all caches are warm.
const WARM: u32 = 20;

/// What a node has between two pods, besides what [`Node::settle`] compares.
#[derive(Debug, Clone, Copy)]
struct Usage {
    /// Of containerd, KiB.
    resident: u64,
    descriptors: usize,
    threads: u64,
    /// Files below containerd's directory: metadata, snapshots, bundles, network namespaces.
    files: usize,
    /// Network namespaces and file systems that are mounted there.
    mounts: usize,
}

impl Usage {
    fn of(node: &Node) -> Result<Self> {
        let process = format!("/proc/{}", node.containerd().pid());
        let status = fs::read_to_string(format!("{process}/status"))?;
        let row = |name: &str| -> Result<u64> {
            let row = status.lines().find_map(|line| line.strip_prefix(name)).context("no such row")?;
            Ok(row.split_whitespace().next().context("no value")?.parse()?)
        };
        let inventory = node.containerd().inventory()?;
        Ok(Self {
            resident: row("VmRSS:")?,
            descriptors: fs::read_dir(format!("{process}/fd"))?.count(),
            threads: row("Threads:")?,
            files: inventory::files_below(node.containerd().root())?.len(),
            mounts: inventory.mounts.len(),
        })
    }

    /// Whether this is no more than `before`, with room for what Go's runtime and garbage collection do.
    fn is_flat_since(self, before: Self) -> bool {
        self.resident <= before.resident + before.resident / 4 + (16 << 10)
            && self.descriptors <= before.descriptors + 8
            && self.threads <= before.threads + 8
            && self.files <= before.files + 8
            && self.mounts <= before.mounts
    }
}

fn pods_leave_nothing_that_adds_up(node: &mut Node) -> Result<()> {
    let pods = match env::var(PODS) {
        Ok(text) => text.parse().with_context(|| format!("{PODS} is {text:?}, not a number"))?,
        Err(_) => WARM,
    };
    let mut warm = None;
    for number in 1..=pods {
        one_life(node, number).and_then(|()| node.settle()).with_context(|| format!("pod {number}"))?;
        if number == WARM.min(pods / 2) {
            warm = Some(Usage::of(node)?);
        }
    }
    let warm = warm.with_context(|| format!("{pods} pods are too few"))?;
    println!("after {} pods: {warm:?}", WARM.min(pods / 2));
    // containerd removes the directories of snapshots some time after the pods.
    let last = eventually("what the node has is flat", || {
        let now = Usage::of(node)?;
        if !now.is_flat_since(warm) {
            println!("{now:?}");
        }
        Ok(now.is_flat_since(warm).then_some(now))
    });
    println!("after {pods} pods: {last:?}");
    last.map(drop)
}

fn one_life(node: &Node, number: u32) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let script = format!("echo life-{number}; exec sleep 100000");
    let container = pod.start("main", &["sh", "-c", &script], |_| ())?;
    container.wait_for_log(&format!("life-{number}"))?;
    ensure!(container.runs()?, "{:?}", container.status());
    // kubelet removes the directory of the pod's logs.
    let logs = pod.logs();
    pod.remove()?;
    Ok(fs::remove_dir_all(logs)?)
}
