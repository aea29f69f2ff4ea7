//! Interfaces of other kinds than those of a pair (veth).

use anyhow::{Result, ensure};
use machinen_integration::containerd::Containerd;

use super::{
    lab::{Lab, OWN, OWN6, PEER, PEER6},
    run, until,
};
use crate::harness::{self, NEWEST, on_newest_containerd};

on_newest_containerd!(an_interface_of_macvlan, an_interface_that_loses_its_link);

fn an_interface_of_macvlan(containerd: &mut Containerd) -> Result<()> {
    an_interface_on_another(containerd, "macvlan mode bridge")
}

/// All interfaces of ipvlan have the hardware address of the one that they are on.
#[test]
#[ignore = "needs the kernel's ipvlan, which a host with KVM has (config/kvm-tests)"]
fn an_interface_of_ipvlan() {
    harness::run(NEWEST, |containerd| an_interface_on_another(containerd, "ipvlan mode l2"));
}

/// The neighbour has one end of a pair, and an interface of this kind on the other one is the container's.
fn an_interface_on_another(containerd: &Containerd, kind: &str) -> Result<()> {
    let lab = Lab::new()?;
    let in_peer = |args: &str| lab.in_peer(&args.split(' ').collect::<Vec<_>>())?.ok().map(drop);
    in_peer("ip link add eth0 type veth peer name parent")?;
    in_peer(&format!("ip address add {PEER}/24 dev eth0"))?;
    in_peer(&format!("ip address add {PEER6}/64 dev eth0 nodad"))?;
    in_peer("ip link set eth0 up")?;
    in_peer("ip link set parent up")?;
    in_peer(&format!("ip link add link parent name child type {kind}"))?;
    in_peer(&format!("ip link set child netns {} name eth0", lab.own()))?;
    lab.change(&["address", "add", &format!("{OWN}/24"), "dev", "eth0"])?;
    lab.change(&["address", "add", &format!("{OWN6}/64"), "dev", "eth0", "nodad"])?;
    lab.change(&["link", "set", "eth0", "up"])?;
    let server = lab.start_in_peer(&["busybox", "nc", "-ll", "-p", "7001", "-e", "wc", "-c"])?;
    let ask = format!("dd if=/dev/zero bs=1M count=1 2> /dev/null | nc {PEER} 7001");
    let script = format!(
        "{}; {ask}; ping -6 -c 1 -W 10 {PEER6}",
        until(&format!("ping -c 1 -W 5 {PEER} > /dev/null"))
    );
    let output = run(containerd, &lab, &script).ok()?;
    ensure!(output.starts_with("1048576\n") && output.contains("1 packets received"), "{output}");
    drop(server);
    lab.nothing_is_left()
}

/// The cable of an interface is pulled and plugged in again: its other end is switched off and on.
fn an_interface_that_loses_its_link(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let ping = |more: &str| format!("ping -c 1 -W 5 {PEER} > /dev/null{more}");
    let steps = [
        until(&ping("")),
        "echo linked".to_owned(),
        until(&format!("! {}", ping(""))),
        "echo lost".to_owned(),
        until(&ping("")),
        "ip -o addr show dev eth0".to_owned(),
    ];
    let running = run(containerd, &lab, &steps.join("\n")).spawn(std::time::Duration::from_secs(180))?;
    running.wait_for_stdout("linked")?;
    lab.in_peer(&["ip", "link", "set", "eth0", "down"])?.ok()?;
    running.wait_for_stdout("lost")?;
    lab.in_peer(&["ip", "link", "set", "eth0", "up"])?.ok()?;
    let output = running.wait()?.ok()?.text();
    ensure!(output.contains(OWN) && output.contains(OWN6), "{output}");
    lab.nothing_is_left()
}
