//! Networks that netavark makes: it sets the namespace up before the runtime gets the container.

use std::time::Duration;

use anyhow::{Result, ensure};
use machinen_integration::podman::{Podman, PodmanCommands as _};

use super::{inspect, remove, with_podman};
use crate::harness::IMAGE;

with_podman!(
    the_default_bridge,
    published_ports,
    names_in_a_network,
    moved_to_another_network,
    shared_with_another
);

/// A script that waits until a command succeeds. The test's deadline ends it.
pub(super) fn until(command: &str) -> String {
    format!("until {command}; do sleep 0.2; done 2> /dev/null")
}

/// What a client on the host gets from a port, once it gets something.
pub(super) fn from_port(podman: &Podman, address: &str, port: u16) -> Result<String> {
    let client = until(&format!("busybox nc {address} {port} < /dev/null | grep ."));
    let output =
        podman.host().program("sh")?.args(["-c", &client]).deadline(Duration::from_secs(60)).run()?;
    Ok(output.ok()?.text().trim_end().to_owned())
}

pub(super) fn the_default_bridge(podman: &Podman) -> Result<()> {
    let script = "own=$(ip -4 -o addr show dev eth0 | awk '{print $4}'); echo ${own#10.88.0.*/}; ip route | head -n 1 | cut -d ' ' -f 1-5; \
                  ping -c 1 -W 20 10.88.0.1 | grep -o '1 packets received'; grep -c ^${own%/16} /etc/hosts";
    let output = podman.ok(&["run", "--rm", "--cap-add", "NET_RAW", IMAGE, "sh", "-c", script])?;
    let wanted = "16\ndefault via 10.88.0.1 dev eth0\n1 packets received\n1";
    ensure!(output == wanted, "{output}");
    Ok(())
}

pub(super) fn published_ports(podman: &Podman) -> Result<()> {
    let args =
        ["run", "-d", "--name", "web", "-p", "8080:80", IMAGE, "nc", "-ll", "-p", "80", "-e", "echo", "tcp"];
    podman.ok(&args)?;
    let address = inspect(podman, "{{.NetworkSettings.IPAddress}}", "web")?;
    for (address, port) in [("127.0.0.1", 8080), ("10.88.0.1", 8080), (&address, 80)] {
        let output = from_port(podman, address, port)?;
        ensure!(output == "tcp", "{address}: {output}");
    }
    let ports = podman.ok(&["port", "web", "80/tcp"])?;
    ensure!(ports == "0.0.0.0:8080", "{ports}");
    remove(podman, "web")
}

/// aardvark-dns serves the names of a network at the address of its bridge.
fn names_in_a_network(podman: &Podman) -> Result<()> {
    podman.ok(&["network", "create", "--subnet", "10.89.77.0/24", "names"])?;
    let server = ["nc", "-ll", "-p", "80", "-e", "echo", "served"];
    let args = ["run", "-d", "--name", "server", "--network", "names", "--network-alias", "other", IMAGE];
    podman.ok(&[&args[..], &server].concat())?;
    let client = format!(
        "grep nameserver /etc/resolv.conf; {}; {}; nslookup no-such-name > /dev/null && echo found; true",
        until("nc server 80 < /dev/null | grep served"),
        until("nc other 80 < /dev/null | grep served"),
    );
    let output = podman.ok(&["run", "--rm", "--network", "names", IMAGE, "sh", "-c", &client])?;
    ensure!(output == "nameserver 10.89.77.1\nserved\nserved", "{output}");
    remove(podman, "server")?;
    podman.ok(&["network", "rm", "names"]).map(drop)
}

fn moved_to_another_network(podman: &Podman) -> Result<()> {
    for (name, subnet) in [("first", "10.89.78.0/24"), ("second", "10.89.79.0/24")] {
        podman.ok(&["network", "create", "--subnet", subnet, name])?;
    }
    podman.ok(&["run", "-d", "--name", "moved", "--network", "first", IMAGE, "sleep", "1000"])?;
    let addresses = |wanted: &str| -> Result<()> {
        let script = until(&format!(
            "ip -4 -o addr | grep -o '10[.]89[.]7[0-9]' | sort -u | xargs | grep '^{wanted}$'"
        ));
        podman.ok(&["exec", "moved", "sh", "-c", &script]).map(drop)
    };
    addresses("10.89.78")?;
    podman.ok(&["network", "connect", "second", "moved"])?;
    addresses("10.89.78 10.89.79")?;
    podman.ok(&["network", "disconnect", "first", "moved"])?;
    addresses("10.89.79")?;
    remove(podman, "moved")?;
    podman.ok(&["network", "rm", "first", "second"]).map(drop)
}

/// Two containers with one network namespace, without a pod.
fn shared_with_another(podman: &Podman) -> Result<()> {
    let server = ["nc", "-ll", "-p", "80", "-e", "echo", "tcp"];
    podman.ok(&[&["run", "-d", "--name", "web", IMAGE], &server[..]].concat())?;
    let client = until("nc 127.0.0.1 80 < /dev/null | grep tcp");
    let output = podman.ok(&["run", "--rm", "--network", "container:web", IMAGE, "sh", "-c", &client])?;
    ensure!(output == "tcp", "{output}");
    remove(podman, "web")
}
