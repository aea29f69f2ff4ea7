//! Pods on the node's network.

use anyhow::{Result, ensure};
use machinen_integration::{
    cri::{Node, api},
    process::Output,
};

use super::both_runtimes;

both_runtimes! {
    every: [],
    oldest_and_newest: [a_pod_has_an_address],
    newest: [pods_reach_each_other, a_port_of_the_node, a_pod_whose_packets_are_routed],
}

/// A server that answers each client with a text.
fn server(text: &str) -> Vec<&str> {
    vec!["nc", "-ll", "-p", "8080", "-e", "echo", text]
}

/// Connects from the node until the server listens.
fn dial(node: &Node, address: &str, port: &str) -> Result<Output> {
    let script = "until busybox nc $0 $1 < /dev/null; do sleep 0.1; done 2> /dev/null";
    node.program(&["sh", "-c", script, address, port]).run()
}

fn a_pod_has_an_address(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let address = pod.address()?;
    ensure!(address.starts_with("10.88.0."), "{address}");
    let container = pod.start("main", &server("from the pod"), |_| ())?;
    let heard = dial(node, &address, "8080")?;
    ensure!(heard.text() == "from the pod\n", "{heard}");
    let ping = node.program(&["busybox", "ping", "-c", "1", "-W", "10", &address]).run()?;
    ensure!(ping.status == 0, "{ping}");
    let inside = container.shell("ip -o -4 addr show dev eth0; ip route")?;
    for wanted in [&format!("inet {address}/16"), "default via 10.88.0.1 dev eth0"] {
        ensure!(inside.contains(wanted), "no {wanted:?} in {inside}");
    }
    let names = container.shell("cat /etc/resolv.conf; hostname")?;
    let wanted =
        "search default.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\noptions ndots:5\npod-1\n";
    ensure!(names == wanted, "{names}");
    pod.remove()
}

fn pods_reach_each_other(node: &mut Node) -> Result<()> {
    let (first, second) = (node.pod(|_| ())?, node.pod(|_| ())?);
    let _server = first.start("main", &server("from the first pod"), |_| ())?;
    let client = second.idle("main")?;
    let address = first.address()?;
    let script = format!("until nc {address} 8080 < /dev/null; do sleep 0.1; done 2> /dev/null");
    let heard = client.shell(&script)?;
    ensure!(heard == "from the first pod\n", "{heard}");
    first.remove()?;
    // The pod that is gone does not answer.
    let gone = client.exec(&["nc", "-w", "2", &address, "8080"], 30)?;
    ensure!(gone.exit_code != 0, "{gone:?}");
    second.remove()
}

/// `hostPort`.
fn a_port_of_the_node(node: &mut Node) -> Result<()> {
    let pod = node.pod(|config| {
        config.port_mappings =
            vec![api::PortMapping { container_port: 8080, host_port: 18080, ..Default::default() }];
    })?;
    let _container = pod.start("main", &server("from the pod"), |_| ())?;
    let heard = dial(node, "10.88.0.1", "18080")?;
    ensure!(heard.text() == "from the pod\n", "{heard}");
    pod.remove()
}

/// With the annotation of machinen, which runc does not know.
fn a_pod_whose_packets_are_routed(node: &mut Node) -> Result<()> {
    let pod = node.pod(|config| {
        config.annotations.insert("io.machinen.network".to_owned(), "routed".to_owned());
    })?;
    let address = pod.address()?;
    let _server = pod.start("server", &server("from the pod"), |_| ())?;
    let client = pod.idle("client")?;
    let heard = dial(node, &address, "8080")?;
    ensure!(heard.text() == "from the pod\n", "{heard}");
    let pinged = client.shell("ping -c 1 -W 10 10.88.0.1; nc 127.0.0.1 8080 < /dev/null")?;
    ensure!(pinged.contains("1 packets received") && pinged.ends_with("from the pod\n"), "{pinged}");
    pod.remove()
}
