//! Networks that dockerd makes: it sets a container's namespace up in a hook, between Create and Start, and changes it
//! while the container runs.

use std::time::Duration;

use anyhow::{Result, ensure};
use machinen_integration::docker::Docker;

use super::with_docker;
use crate::harness::IMAGE;

with_docker!(
    runc, RUNC:
    the_default_bridge, published_ports, names_in_a_network, moved_to_another_network, namespaces_of_another_container,
);
with_docker!(
    machinen, MACHINEN:
    the_default_bridge, published_ports, names_in_a_network, moved_to_another_network, namespaces_of_another_container,
);

/// A script that waits until a command succeeds. The test's deadline ends it.
fn until(command: &str) -> String {
    format!("until {command}; do sleep 0.2; done 2> /dev/null")
}

/// The address of a name, as a DNS client in the container gets it.
fn address_of(name: &str) -> String {
    format!("nslookup {name} | sed -n '/^Name/,$ s/^Address.*: *\\([0-9.]*[0-9]\\).*/\\1/p'")
}

fn the_default_bridge(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let script = "ip -4 -o addr show dev eth0 | awk '{print $4}'; ip route | head -n 1; \
                  ping -c 1 -W 20 172.17.0.1 | grep -o '1 packets received'";
    let output = docker.ok(&["run", "--rm", "--runtime", runtime, IMAGE, "sh", "-c", script])?;
    let wanted = "172.17.0.2/16\ndefault via 172.17.0.1 dev eth0 \n1 packets received";
    ensure!(output == wanted, "{output}");
    Ok(())
}

fn published_ports(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let script = "exec nc -ll -p 80 -e echo tcp";
    let args = ["run", "-d", "--name", "web", "--runtime", runtime, "-p", "8080:80"];
    docker.ok(&[&args[..], &[IMAGE, "sh", "-c", script]].concat())?;
    // By way of docker-proxy, and by way of the rules for the address of the bridge.
    for address in ["127.0.0.1", "172.17.0.1"] {
        let client = until(&format!("busybox nc {address} 8080 < /dev/null | grep tcp"));
        let output = docker
            .in_daemons_network(&["sh", "-c", &client])
            .deadline(Duration::from_secs(60))
            .run()?
            .ok()?;
        ensure!(output.text() == "tcp\n", "{address}: {output}");
    }
    let ports = docker.ok(&["port", "web", "80/tcp"])?;
    ensure!(ports.starts_with("0.0.0.0:8080"), "{ports}");
    docker.ok(&["rm", "--force", "web"]).map(drop)
}

/// Docker's nameserver is at 127.0.0.11 in the container's network namespace.
fn names_in_a_network(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    docker.ok(&["network", "create", "names"])?;
    let server = "nc -ll -p 80 -e echo served";
    let args = ["run", "-d", "--name", "server", "--runtime", runtime, "--network", "names", IMAGE];
    docker.ok(&[&args[..], &["sh", "-c", server]].concat())?;
    let client = format!(
        "cat /etc/resolv.conf | grep nameserver; {}; address=$({}); {}; nc $address 80 < /dev/null; \
         nslookup no-such-name > /dev/null && echo found; nc -l -p 53 & sleep 0.2; kill $!",
        until("nslookup server > /dev/null"),
        address_of("server"),
        until("nc $address 80 < /dev/null > /dev/null"),
    );
    let args = ["run", "--rm", "--runtime", runtime, "--network", "names", IMAGE, "sh", "-c", &client];
    let output = docker.docker(&args)?.deadline(Duration::from_secs(120)).run()?.ok()?;
    ensure!(output.text() == "nameserver 127.0.0.11\nserved\n", "{output}");
    docker.ok(&["rm", "--force", "server"])?;
    docker.ok(&["network", "rm", "names"]).map(drop)
}

/// From the default bridge, whose containers use other nameservers, to a network and to none.
fn moved_to_another_network(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    docker.ok(&["network", "create", "--subnet", "10.99.0.0/16", "other"])?;
    docker.ok(&["run", "-d", "--name", "moved", "--runtime", runtime, IMAGE, "sleep", "1000"])?;
    let inside = |script: &str| {
        let exec = docker.docker(&["exec", "moved", "sh", "-c", script])?;
        exec.deadline(Duration::from_secs(60)).run()?.ok()
    };
    docker.ok(&["network", "disconnect", "bridge", "moved"])?;
    inside(&until("test ! -e /sys/class/net/eth0 -a ! -e /sys/class/net/eth1"))?;
    docker.ok(&["network", "connect", "--alias", "here", "other", "moved"])?;
    inside(&until("ip -4 addr | grep -q 10.99.0.2/16"))?;
    inside(&until("ping -c 1 -W 5 10.99.0.1 > /dev/null"))?;
    let address = inside(&format!("{}; {}", until("nslookup here > /dev/null"), address_of("here")))?;
    ensure!(address.text() == "10.99.0.2\n", "{address}");
    docker.ok(&["rm", "--force", "moved"])?;
    docker.ok(&["network", "rm", "other"]).map(drop)
}

/// `--network container:NAME` and its siblings: the path of a namespace of another container's pid.
fn namespaces_of_another_container(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let server = "exec nc -ll -p 80 -e echo served";
    let first = [
        "run",
        "-d",
        "--name",
        "first",
        "--ipc",
        "shareable",
        "--runtime",
        runtime,
        IMAGE,
        "sh",
        "-c",
        server,
    ];
    docker.ok(&first)?;
    let look = format!(
        "{}; nc 127.0.0.1 80 < /dev/null; ip -4 -o addr show dev eth0 | awk '{{print $4}}'; hostname",
        until("nc 127.0.0.1 80 < /dev/null > /dev/null")
    );
    let shared = ["--network", "container:first", "--ipc", "container:first"];
    let args = [&["run", "--rm", "--runtime", runtime][..], &shared, &[IMAGE, "sh", "-c", &look]].concat();
    let output = docker.docker(&args)?.deadline(Duration::from_secs(120)).run()?.ok()?.text();
    let hostname = docker.ok(&["exec", "first", "hostname"])?;
    ensure!(output == format!("served\n172.17.0.2/16\n{}\n", hostname.trim()), "{output}");
    let args = ["run", "--rm", "--runtime", runtime, "--pid", "container:first", IMAGE, "ps"];
    let output = docker.ok(&args)?;
    ensure!(output.contains("nc -ll -p 80"), "{output}");
    // The other one may end first.
    let args = [
        &["run", "-d", "--name", "second", "--runtime", runtime][..],
        &shared[..2],
        &[IMAGE, "sleep", "1000"],
    ];
    docker.ok(&args.concat())?;
    docker.ok(&["exec", "first", "true"])?;
    docker.ok(&["rm", "--force", "first"])?;
    let address = docker.ok(&["exec", "second", "ip", "-4", "-o", "addr", "show", "lo"])?;
    ensure!(address.contains("127.0.0.1"), "{address}");
    docker.ok(&["rm", "--force", "second"]).map(drop)
}
