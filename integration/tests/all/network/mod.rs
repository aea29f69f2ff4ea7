//! Containers whose specification names a network namespace by its path.

mod capture;
mod cni;
mod forked;
mod kinds;
mod life;
mod localhost;
mod moved;
mod nameservers;
mod outside;
mod routed;
mod traffic;
mod vhost;

use std::time::Duration;

use anyhow::{Result, ensure};
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    ctr::Run,
    lab::{self, Lab, OWN, OWN6, PEER, PEER6},
    process::{Invocation, Running},
    served::Served,
};
use serde_json::json;

use crate::harness::{IMAGE, on_every_containerd, on_newest_containerd};

on_every_containerd!(the_container_has_the_interface_of_its_namespace);
on_newest_containerd!(
    both_ways_by_tcp,
    packets_of_any_size,
    wired_between_create_and_start,
    changes_reach_a_running_container,
    routes_and_neighbours,
    only_loopback_without_a_path,
    the_sysfs_of_mapped_users_has_the_interface,
    several_interfaces,
    too_many_interfaces_are_refused,
    the_namespace_of_the_pid,
);

/// A container in the lab that runs a script of the shell.
fn run<'a>(containerd: &'a Containerd, lab: &Lab, script: &str) -> Run<'a> {
    containerd.run(IMAGE, &["sh", "-c", script]).flag(lab.flag())
}

/// Kills the container of a `ctr run`, and waits until that has removed the container.
fn end(containerd: &Containerd, run: &Run<'_>, running: Running) -> Result<()> {
    containerd.ctr_ok(&["tasks", "kill", "--signal", "SIGKILL", run.container()])?;
    running.wait().map(drop)
}

/// A script that waits until a command succeeds. The test's deadline ends it.
fn until(command: &str) -> String {
    format!("until {command}; do sleep 0.1; done 2> /dev/null")
}

fn the_container_has_the_interface_of_its_namespace(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let show = "cat /sys/class/net/eth0/address; ip -o addr show dev eth0; ip route; ip -6 route";
    let outside = lab.change(&["-o", "link", "show", "dev", "eth0"])?;
    let (_, mac) = outside.split_once("link/ether ").expect("the test has made it");
    let mac = mac.split_whitespace().next().unwrap_or_default();
    let ping = format!("ping -c 1 -W 10 {PEER} && ping -6 -c 1 -W 10 {PEER6}");
    let output = run(containerd, &lab, &format!("{show}; {ping}")).ok()?;
    for wanted in [
        mac,
        &format!("inet {OWN}/24"),
        &format!("inet6 {OWN6}/64"),
        "inet6 fe80::",
        &format!("default via {PEER} dev eth0"),
        "10.77.0.0/24 dev eth0 scope link",
        &format!("default via {PEER6} dev eth0"),
        "1 packets received",
    ] {
        ensure!(output.contains(wanted), "no {wanted:?} in\n{output}");
    }
    lab.nothing_is_left()
}

fn both_ways_by_tcp(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let from_peer =
        lab.start_in_peer(&["busybox", "nc", "-ll", "-p", "7001", "-e", "echo", "from the peer"])?;
    let script = format!(
        "nc -ll -p 7000 -e echo from the container & \
         for peer in {PEER} {PEER6}; do {}; done; echo ready; wait",
        until("nc $peer 7001 < /dev/null")
    );
    let container = run(containerd, &lab, &script);
    let running = container.spawn(Duration::from_secs(120))?;
    running.wait_for_stdout("from the peer\nfrom the peer\nready")?;
    for own in [OWN, OWN6] {
        let output = lab.in_peer(&["busybox", "nc", own, "7000"])?;
        ensure!(output.text() == "from the container\n", "{own}: {output}");
    }
    end(containerd, &container, running)?;
    drop(from_peer);
    Ok(())
}

fn packets_of_any_size(containerd: &mut Containerd) -> Result<()> {
    for mtu in [1450, 9000] {
        let lab = Lab::new()?;
        lab.wire(mtu)?;
        // The headers of ICMP and IP have 28 bytes.
        let (whole, fragmented) = (mtu - 28, 20_000);
        let script = format!(
            "cat /sys/class/net/eth0/mtu; for size in {whole} {fragmented}; do \
             ping -c 1 -W 10 -s $size {PEER} | grep -o '1 packets received'; done; \
             dd if=/dev/zero bs=1M count=2 2> /dev/null | nc {PEER} 7002"
        );
        // The program sends what it has counted back.
        let counter = lab.start_in_peer(&["busybox", "nc", "-ll", "-p", "7002", "-e", "wc", "-c"])?;
        let output = run(containerd, &lab, &script).spawn(Duration::from_secs(180))?.wait()?.ok()?.text();
        let wanted = format!("{mtu}\n1 packets received\n1 packets received\n{}\n", 2 << 20);
        ensure!(output == wanted, "MTU {mtu}: {output}");
        drop(counter);
    }
    Ok(())
}

/// Docker sets the namespace up between the two.
fn wired_between_create_and_start(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::new()?;
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sleep", "1000"], |spec| {
        let path = lab.path();
        spec["linux"]["namespaces"] = json!([
            { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
            { "type": "network", "path": path },
        ]);
    })?;
    let mut served = Served::of(containerd, &config)?;
    served.create(|_| ())?;
    lab.wire(1500)?;
    served.begin()?;
    // No event needs to arrive: the namespace is read again before the container starts.
    let from_peer =
        lab.start_in_peer(&["busybox", "nc", "-ll", "-p", "7001", "-e", "echo", "from the peer"])?;
    let script = format!("ip -o addr show dev eth0; {}", until(&format!("nc {PEER} 7001 < /dev/null")));
    let (status, output) = served.shell(&script)?;
    for wanted in [OWN, OWN6, "from the peer"] {
        ensure!(status == 0 && output.contains(wanted), "{status}, no {wanted:?} in {output}");
    }
    drop(from_peer);
    served.end()?;
    lab.nothing_is_left()
}

fn changes_reach_a_running_container(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::new()?;
    let steps = [
        until("ip addr show dev eth0 | grep -q 10.77.0.2"),
        "echo connected".to_owned(),
        until("ip addr show dev eth0 | grep -q 10.77.0.99"),
        until("ip route | grep -q '10.99.0.0/16 via 10.77.0.1'"),
        format!("ping -c 1 -W 10 -I 10.77.0.99 {PEER} > /dev/null"),
        "echo changed".to_owned(),
        until("! ip route | grep -q 10.99.0.0/16"),
        "echo removed".to_owned(),
        until("test ! -e /sys/class/net/eth0"),
        "echo disconnected".to_owned(),
        until("ip addr show dev eth1 | grep -q 10.78.0.2"),
        "echo reconnected".to_owned(),
    ];
    let running = run(containerd, &lab, &steps.join("\n")).spawn(Duration::from_secs(120))?;
    lab.wire(1500)?;
    running.wait_for_stdout("connected")?;
    lab.change(&["address", "add", "10.77.0.99/32", "dev", "eth0"])?;
    lab.change(&["route", "add", "10.99.0.0/16", "via", PEER])?;
    running.wait_for_stdout("changed")?;
    lab.change(&["route", "delete", "10.99.0.0/16"])?;
    running.wait_for_stdout("removed")?;
    lab.change(&["link", "delete", "eth0"])?;
    running.wait_for_stdout("disconnected")?;
    lab.change(&["link", "add", "eth1", "type", "veth", "peer", "name", "other"])?;
    lab.change(&["address", "add", "10.78.0.2/24", "dev", "eth1"])?;
    lab.change(&["link", "set", "eth1", "up"])?;
    let output = running.wait()?;
    ensure!(output.text().ends_with("reconnected\n"), "{output}");
    lab.nothing_is_left()
}

/// As CNI's plugin ptp sets a namespace up, and with a gateway of the other kind of address.
fn routes_and_neighbours(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::new()?;
    lab.wire(1500)?;
    for args in [
        "route flush table main",
        "route add 10.77.0.1/32 dev eth0 scope link",
        "route add 10.77.0.0/24 via 10.77.0.1 src 10.77.0.2",
        "route add default via 169.254.1.1 dev eth0 onlink metric 7",
        "route add 10.99.0.0/16 via inet6 fd77::1 dev eth0",
        "neighbour replace 169.254.1.1 lladdr 02:00:00:00:00:77 dev eth0 nud permanent",
    ] {
        lab.change(&args.split(' ').collect::<Vec<_>>())?;
    }
    let wanted = |text: &str| {
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
    };
    let outside = wanted(&lab.change(&["route"])?);
    let output = run(containerd, &lab, "ip route; ip neigh show nud permanent").ok()?;
    let inside = wanted(&output);
    for route in outside.iter().filter(|route| !route.contains("inet6")) {
        ensure!(inside.contains(route), "no {route:?} in\n{output}");
    }
    ensure!(output.contains("169.254.1.1 dev eth0 lladdr 02:00:00:00:00:77"), "{output}");
    ensure!(inside.iter().any(|route| route.starts_with("10.99.0.0/16")), "{output}");
    Ok(())
}

fn only_loopback_without_a_path(containerd: &mut Containerd) -> Result<()> {
    let script = "ls /sys/class/net; ip -o link | wc -l; ping -c 1 127.0.0.1 | grep -o '1 packets received'";
    let output = containerd.run(IMAGE, &["sh", "-c", script]).ok()?;
    let (links, rest) = output.split_at(3);
    ensure!(links == "lo\n" && rest == "1\n1 packets received\n", "{output}");
    Ok(())
}

/// A container with users of its own cannot mount a sysfs, and gets one that shows its network.
fn the_sysfs_of_mapped_users_has_the_interface(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let bundle = Bundle::busybox(containerd)?;
    for (wired, expected) in [(true, "eth0\nlo\n"), (false, "lo\n")] {
        let config = bundle.config(&["ls", "/sys/class/net"], |spec| {
            let mapping = json!([{"containerID": 0, "hostID": 5000, "size": 2000}]);
            spec["linux"]["uidMappings"] = mapping.clone();
            spec["linux"]["gidMappings"] = mapping;
            let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("an array");
            namespaces.push(json!({"type": "user"}));
            if wired {
                namespaces.retain(|namespace| namespace["type"] != "network");
                namespaces.push(json!({"type": "network", "path": lab.path()}));
            }
        })?;
        let seen = containerd.run_spec(&config).ok()?;
        ensure!(seen == expected, "{seen}");
    }
    lab.nothing_is_left()
}

/// A second pair of interfaces, with a network of its own.
fn wire_second(lab: &Lab) -> Result<()> {
    lab.change(&["link", "add", "eth1", "type", "veth", "peer", "name", "eth1", "netns", &lab.peer()])?;
    lab.change(&["address", "add", "10.78.0.2/24", "dev", "eth1"])?;
    lab.change(&["link", "set", "eth1", "up"])?;
    lab.in_peer(&["ip", "address", "add", "10.78.0.1/24", "dev", "eth1"])?.ok()?;
    lab.in_peer(&["ip", "link", "set", "eth1", "up"])?.ok().map(drop)
}

fn several_interfaces(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    wire_second(&lab)?;
    let steps = [
        "ls /sys/class/net".to_owned(),
        until(&format!("ping -c 1 -W 10 {PEER} > /dev/null")),
        until("ping -c 1 -W 10 -I eth1 10.78.0.1 > /dev/null"),
        "echo both".to_owned(),
        until("test ! -e /sys/class/net/eth0"),
        until("ping -c 1 -W 10 10.78.0.1 > /dev/null"),
        "echo one".to_owned(),
    ];
    let running = run(containerd, &lab, &steps.join("\n")).spawn(Duration::from_secs(120))?;
    running.wait_for_stdout("both")?;
    lab.change(&["link", "delete", "eth0"])?;
    let output = running.wait()?;
    ensure!(output.text() == "eth0\neth1\nlo\nboth\none\n", "{output}");
    lab.nothing_is_left()
}

fn too_many_interfaces_are_refused(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    for number in 1..=4 {
        let (name, other) = (format!("eth{number}"), format!("other{number}"));
        lab.change(&["link", "add", &name, "up", "type", "veth", "peer", "name", &other])?;
    }
    let words = ["the network namespace has 5 interfaces (eth0, eth1, eth2, eth3, eth4), and the VM has 4"];
    crate::harness::fails_saying(containerd, &run(containerd, &lab, "true"), &words)?;
    lab.nothing_is_left()
}

/// A container without a path has a namespace of its own, to which an interface can be moved by the container's pid.
fn the_namespace_of_the_pid(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let bundle = Bundle::busybox(containerd)?;
    let mut served = Served::of(containerd, &bundle.config(&["sleep", "1000"], |_| ())?)?;
    served.create(|_| ())?;
    let pid = served.pid;
    lab.change(&["link", "set", "eth0", "netns", &pid.to_string()])?;
    let inside = |args: &[&str]| -> Result<()> {
        let namespace = format!("--net=/proc/{pid}/ns/net");
        Invocation::new("nsenter").args([&namespace, "ip"]).args(args.iter().copied()).run()?.ok().map(drop)
    };
    inside(&["address", "add", &format!("{OWN}/24"), "dev", "eth0"])?;
    inside(&["link", "set", "eth0", "up"])?;
    served.begin()?;
    let from_peer =
        lab.start_in_peer(&["busybox", "nc", "-ll", "-p", "7001", "-e", "echo", "from the peer"])?;
    let (status, output) = served.shell(&until(&format!("nc {PEER} 7001 < /dev/null")))?;
    ensure!(status == 0 && output == "from the peer\n", "{status}: {output}");
    drop(from_peer);
    served.end()
}
