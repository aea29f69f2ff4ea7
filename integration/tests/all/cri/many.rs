//! Many pods at once: nothing is mixed up, and nothing is left of them.

use std::thread;

use anyhow::{Context, Result, ensure};
use machinen_integration::cri::Node;

use super::pod_tests;

const PODS: usize = 10;

pod_tests! {
    machinen_2_1(V2_1, Machinen): [ten_pods_of_three_containers];
}

fn ten_pods_of_three_containers(node: &mut Node) -> Result<()> {
    for _ in 0..2 {
        let node = &*node;
        thread::scope(|scope| {
            let lives: Vec<_> = (0..PODS).map(|number| scope.spawn(move || one_life(node, number))).collect();
            lives.into_iter().try_for_each(|life| life.join().expect("no panic"))
        })?;
        // The next round begins with nothing.
        node.settle()?;
    }
    Ok(())
}

fn one_life(node: &Node, number: usize) -> Result<()> {
    let hostname = format!("host-{number}");
    let pod = node.pod(|config| config.hostname.clone_from(&hostname))?;
    let containers = ["a", "b", "c"].map(|name| {
        let script = format!("echo {name}-{number}; exec sleep 1000000");
        pod.start(name, &["sh", "-c", &script], |_| ())
    });
    for (container, name) in containers.into_iter().zip(["a", "b", "c"]) {
        let container = container.with_context(|| format!("container {name} of pod {number}"))?;
        container.wait_for_log(&format!("{name}-{number}"))?;
        let seen = container.shell("hostname")?;
        ensure!(seen.trim() == hostname, "{seen} in {hostname}");
    }
    pod.remove()
}
