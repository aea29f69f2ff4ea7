//! A pod has one VM, whatever number of containers it has.

use anyhow::{Result, ensure};
use machinen_integration::{cri::Node, inventory};

use super::pod_tests;

pod_tests! {
    machinen_2_1(V2_1, Machinen): [one_vm_for_a_pod];
    sandbox_2_1(V2_1, MachinenSandbox): [one_vm_for_a_pod];
}

/// The processes of the node whose command line begins with a program of this name and has these words.
fn count(node: &Node, program: &str, words: &str) -> Result<usize> {
    let all = inventory::descendants(node.containerd().keeper_pid())?;
    let named = |command: &str| {
        command.split(' ').next().is_some_and(|path| path.rsplit('/').next() == Some(program))
    };
    Ok(all.iter().filter(|process| named(&process.command) && process.command.contains(words)).count())
}

fn one_vm_for_a_pod(node: &mut Node) -> Result<()> {
    let pods = [node.pod(|_| ())?, node.pod(|_| ())?];
    let kernels: Vec<_> = pods
        .iter()
        .map(|pod| -> Result<_> {
            let mut kernels = Vec::new();
            for name in ["first", "second", "third"] {
                kernels.push(pod.idle(name)?.shell("cat /proc/sys/kernel/random/boot_id; uname -r")?);
            }
            Ok(kernels)
        })
        .collect::<Result<_>>()?;
    ensure!(count(node, "qemu-system-x86_64", "")? == 2, "not one VM a pod");
    // Its other processes have other arguments.
    let shims = count(node, "containerd-shim-machinen-v1", "-namespace")?;
    ensure!(shims == 2, "{shims} shims");
    for kernels in &kernels {
        ensure!(kernels.iter().all(|kernel| *kernel == kernels[0]), "{kernels:?}");
    }
    pods[0].remove()?;
    ensure!(count(node, "qemu-system-x86_64", "")? == 1, "the VM of a removed pod runs");
    pods[1].remove()
}
