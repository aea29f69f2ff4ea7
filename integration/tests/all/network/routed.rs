//! Packets that pass the network code of the container's namespace, with the rules that others have there
//! (`io.machinen.network=routed`).

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    ctr::Run,
    process::{Invocation, Running},
    served::Served,
};
use nix::sys::signal::{Signal, kill};

use super::{
    end,
    lab::{Lab, OWN, OWN6, PEER, PEER6},
    life::{process, remove},
    moved::{Connection, ECHO, checkpoint, config, listening},
    run, until,
};
use crate::harness::{fails_saying, on_every_containerd, on_newest_containerd};

on_every_containerd!(rules_of_the_namespace_hold);
on_newest_containerd!(
    changes_of_the_namespace_are_followed,
    a_killed_shim_leaves_no_rules,
    a_connection_outlasts_a_checkpoint,
    what_cannot_be_routed_is_refused,
);

const ROUTED: &str = "--annotation=io.machinen.network=routed";

/// A container in the lab whose packets are routed.
fn routed<'a>(containerd: &'a Containerd, lab: &Lab, script: &str) -> Run<'a> {
    run(containerd, lab, script).flag(ROUTED)
}

/// A program in the container's namespace on the host.
fn beside(lab: &Lab, args: &[&str]) -> Invocation {
    let namespace = format!("--net={}", lab.path().display());
    Invocation::new("nsenter").arg(namespace).args(args.iter().copied())
}

/// A server that answers with a text.
fn serve(program: Invocation) -> Result<Running> {
    program.deadline(Duration::from_secs(300)).spawn()
}

fn rule(lab: &Lab, program: &str, rule: &str) -> Result<()> {
    let args: Vec<_> = [program].into_iter().chain(rule.split(' ')).collect();
    beside(lab, &args).run()?.ok().with_context(|| format!("{program} {rule}")).map(drop)
}

/// The rules of routing as the kernel makes them, and the settings that forwarding needs.
fn state(lab: &Lab) -> Result<String> {
    let settings = "ip rule; ip -6 rule; cd /proc/sys/net; \
                    cat ipv4/conf/eth0/forwarding ipv6/conf/all/forwarding ipv6/conf/eth0/accept_ra";
    Ok(beside(lab, &["sh", "-c", settings]).run()?.ok()?.text())
}

/// What a proxy and a policy in the namespace do, as those of service meshes: what the container connects to leads to the
/// proxy, what arrives for one of its ports too, and other packets are dropped or have no route.
fn set_rules(lab: &Lab) -> Result<()> {
    // As many distributions have it.
    beside(lab, &["sysctl", "-w", "net.ipv4.conf.all.rp_filter=1"]).run()?.ok()?;
    for program in ["iptables", "ip6tables"] {
        for text in [
            "-t nat -A PREROUTING -i machinen0 -p tcp --dport 7001 -j REDIRECT --to-ports 7101",
            "-t nat -A PREROUTING -i eth0 -p tcp --dport 7002 -j REDIRECT --to-ports 7101",
            "-A FORWARD -p tcp --dport 7004 -j DROP",
        ] {
            rule(lab, program, text)?;
        }
    }
    lab.change(&[
        "rule",
        "add",
        "pref",
        "100",
        "iif",
        "machinen0",
        "ipproto",
        "tcp",
        "dport",
        "7005",
        "unreachable",
    ])
    .map(drop)
}

fn rules_of_the_namespace_hold(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    set_rules(&lab)?;
    let before = state(&lab)?;
    let _proxy = serve(beside(&lab, &["busybox", "nc", "-ll", "-p", "7101", "-e", "echo", "the proxy"]))?;
    let answer = |port| lab.start_in_peer(&["busybox", "nc", "-ll", "-p", port, "-e", "echo", "the peer"]);
    let _peer = ["7001", "7003", "7004", "7005"].map(answer).into_iter().collect::<Result<Vec<_>>>()?;
    let ask = |port| format!("for peer in {PEER} {PEER6}; do nc -w 5 $peer {port} < /dev/null; done");
    let script = format!(
        "ip -o addr show dev eth0; ip route; ip -6 route; \
         nc -ll -p 7002 -e echo the container & nc -ll -p 7003 -e echo the container & \
         {}; echo redirected; {}; echo dropped; {} || echo no route; {}; \
         ping -c 1 -W 10 -s 20000 {PEER} | grep -o '1 packets received'; echo ready; wait",
        ask(7001),
        ask(7004),
        format_args!("nc -w 5 {PEER} 7005 < /dev/null"),
        [PEER, PEER6].map(|peer| until(&format!("nc {peer} 7003 < /dev/null"))).join("; "),
    );
    let container = routed(containerd, &lab, &script);
    let running = container.spawn(Duration::from_secs(120))?;
    running.wait_for_stdout("ready").with_context(|| running.written().concat())?;
    let [output, _] = running.written();
    for wanted in [
        &format!("inet {OWN}/32"),
        &format!("inet6 {OWN6}/128"),
        "default via 169.254.0.1 dev eth0",
        "default via fe80::1 dev eth0",
        "the proxy\nthe proxy\nredirected\ndropped\nno route\nthe peer\nthe peer\n1 packets received\n",
    ] {
        ensure!(output.contains(wanted), "no {wanted:?} in\n{output}");
    }
    for own in [OWN, OWN6] {
        let text = lab.in_peer(&["busybox", "nc", own, "7002"])?.text();
        ensure!(text == "the proxy\n", "{own}: {text}");
        let text = lab.in_peer(&["busybox", "nc", own, "7003"])?.text();
        ensure!(text == "the container\n", "{own}: {text}");
        // A proxy connects so to the container that it is for.
        let text = beside(&lab, &["busybox", "nc", own, "7002"]).run()?.text();
        ensure!(text == "the container\n", "{own} from the namespace: {text}");
    }
    end(containerd, &container, running)?;
    ensure!(state(&lab)? == before, "before:\n{before}\nafter:\n{}", state(&lab)?);
    lab.nothing_is_left()
}

fn changes_of_the_namespace_are_followed(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::new()?;
    let steps = [
        until("ip addr show dev eth0 | grep -q 10.77.0.2/32"),
        until(&format!("ping -c 1 -W 5 {PEER} > /dev/null")),
        "echo connected".to_owned(),
        until(&format!("ping -c 1 -W 5 -I 10.77.0.99 {PEER} > /dev/null")),
        "echo changed".to_owned(),
        until("test ! -e /sys/class/net/eth0"),
    ];
    let running = routed(containerd, &lab, &steps.join("\n")).spawn(Duration::from_secs(180))?;
    lab.wire(1400)?;
    running.wait_for_stdout("connected")?;
    lab.change(&["address", "add", "10.77.0.99/24", "dev", "eth0"])?;
    running.wait_for_stdout("changed")?;
    let ping = lab.in_peer(&["busybox", "ping", "-c", "1", "-W", "10", "10.77.0.99"])?;
    ensure!(ping.status == 0, "{ping}");
    lab.change(&["link", "delete", "eth0"])?;
    let output = running.wait()?;
    ensure!(output.text() == "connected\nchanged\n", "{output}");
    lab.nothing_is_left()
}

fn a_killed_shim_leaves_no_rules(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let rules = || Ok::<_, anyhow::Error>([lab.change(&["rule"])?, lab.change(&["-6", "rule"])?]);
    let before = rules()?;
    let inventory = containerd.inventory()?;
    let container = routed(containerd, &lab, "sleep 1000").detached().flag("--null-io");
    container.ok()?;
    let routed = rules()?;
    ensure!(routed != before, "nothing is routed: {routed:?}");
    let from = containerd.log().position();
    let shim = process(containerd, container.container(), ["containerd-shim-machinen-v1", "-id"])?;
    kill(shim, Signal::SIGKILL)?;
    containerd
        .log()
        .wait_for(from, |line| line.contains("/tasks/exit") || line.contains("cleaning up dead shim"))?;
    remove(containerd, container.container())?;
    containerd.settle(&inventory)?;
    let after = rules()?;
    ensure!(after == before, "before: {before:?}, after: {after:?}");
    lab.nothing_is_left()
}

fn a_connection_outlasts_a_checkpoint(containerd: &mut Containerd) -> Result<()> {
    let (lab, bundle) = (Lab::wired()?, Bundle::busybox(containerd)?);
    let config = config(&bundle, &lab.path(), ECHO, &[("network", "routed")])?;
    let source = listening(containerd, &config)?;
    let mut connection = Connection::open(&lab, OWN)?;
    connection.exchange("before")?;
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir, true)?;
    source.wait("")?;
    source.end_stopped()?;
    connection.send("meanwhile")?;
    let restored = Served::restored(containerd, &config, &dir)?;
    connection.returned()?;
    connection.exchange("after")?;
    restored.end()?;
    std::fs::remove_dir_all(&dir)?;
    lab.nothing_is_left()
}

fn what_cannot_be_routed_is_refused(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    lab.change(&["link", "add", "eth1", "up", "type", "veth", "peer", "name", "other1"])?;
    let words = ["the network namespace has 2 interfaces (eth0, eth1)", "io.machinen.network=routed"];
    fails_saying(containerd, &routed(containerd, &lab, "true"), &words)?;
    lab.nothing_is_left()?;
    let words = ["io.machinen.network=routed is for a container with a network namespace of its own"];
    let plain = || containerd.run(crate::harness::IMAGE, &["true"]).flag(ROUTED);
    fails_saying(containerd, &plain().flag("--annotation=io.machinen.ports=18099:80"), &words)?;
    fails_saying(containerd, &plain().flag("--net-host"), &words)
}
