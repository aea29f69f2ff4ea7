//! Networks of the CNI's own plugins: the containers of a pod have what the plugins have made for the pod.
//!
//! Each row of the table is a configuration, as an administrator writes it, with two pods of it at a time: one serves, and
//! the other one is a client.

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    cri::{Container, Handler, Node, Pod},
    paths::Version,
};
use serde_json::{Value, json};

use super::both_runtimes;

both_runtimes! {
    every: [],
    oldest_and_newest: [],
    newest: [of_the_plugins],
}

/// All interfaces of ipvlan have the hardware address of the one that they are on.
#[test]
#[ignore = "needs a kernel with ipvlan: to be run by its name on a host that has one"]
fn of_ipvlan() {
    super::run(Version::V2_1, Handler::Machinen, |node| with(node, &on_another_interface(node, "ipvlan")));
}

/// What is configured, and what is special about it.
struct Row {
    name: &'static str,
    /// The plugins of each network.
    networks: Vec<Value>,
    /// Run on the node by the shell, before the pods and after them.
    before: &'static str,
    after: &'static str,
    check: fn(&Pods<'_>) -> Result<()>,
}

/// A server with its client, in two pods.
struct Pods<'a> {
    node: &'a Node,
    pod: &'a Pod,
    server: Container<'a>,
    client: Container<'a>,
    /// The server's address, and the client's.
    addresses: [String; 2],
}

/// Port 8080 answers with a text, 8081 with the number of the bytes that it has got, and 8082 with a MiB.
const SERVER: &str = "nc -ll -p 8081 -e wc -c & nc -ll -p 8082 -e head -c 1048576 /dev/zero & \
                      exec nc -ll -p 8080 -e echo from the pod";

fn of_the_plugins(node: &mut Node) -> Result<()> {
    for row in rows(node) {
        with(node, &row).with_context(|| format!("the network {}", row.name))?;
    }
    Ok(())
}

fn rows(node: &Node) -> Vec<Row> {
    let row = |name, networks: Vec<Value>, check| Row { name, networks, before: "", after: "", check };
    let ptp = |subnet: &str| json!({ "type": "ptp", "ipam": addresses(node, &[subnet]) });
    let bridge = |name: &str, subnets: &[&str]| json!({ "type": "bridge", "bridge": name, "isGateway": true, "ipam": addresses(node, subnets) });
    let shaped = json!({
        "type": "bandwidth",
        "ingressRate": RATE, "ingressBurst": BURST, "egressRate": RATE, "egressBurst": BURST,
    });
    let tuned = json!({
        "type": "tuning", "mac": MAC, "mtu": 1400, "sysctl": { "net.core.somaxconn": "777" },
    });
    // The second network is no way to anywhere else.
    let mut second = bridge("cni2", &["10.94.0.0/16"]);
    second["ipam"]["routes"] = json!([]);
    vec![
        row("ptp", vec![json!([ptp("10.89.0.0/16")])], the_node_reaches_the_pod),
        row("policy", vec![json!([ptp("10.90.0.0/16")])], rules_of_the_node_hold),
        Row {
            before: "iptables -P FORWARD DROP",
            after: "iptables -P FORWARD ACCEPT",
            ..row(
                "firewall",
                vec![json!([ptp("10.91.0.0/16"), { "type": "firewall" }])],
                the_node_reaches_the_pod,
            )
        },
        row("tuning", vec![json!([ptp("10.92.0.0/16"), tuned])], the_interface_is_tuned),
        row("bandwidth", vec![json!([bridge("cni1", &["10.93.0.0/16"]), shaped])], bytes_take_their_time),
        row(
            "two-interfaces",
            vec![json!([ptp("10.95.0.0/16")]), json!([second])],
            both_interfaces_are_reached,
        ),
        row(
            "dual-stack",
            vec![json!([bridge("cni3", &["10.96.0.0/16", "fd96::/64"])])],
            both_kinds_of_addresses,
        ),
        on_another_interface(node, "macvlan"),
    ]
}

/// A network whose interfaces are on one of the node, which is connected with another one.
fn on_another_interface(node: &Node, kind: &'static str) -> Row {
    let mode = if kind == "macvlan" { "bridge" } else { "l2" };
    let plugin = json!({
        "type": kind, "master": "parent", "mode": mode, "ipam": addresses(node, &["10.97.0.0/16"]),
    });
    Row {
        name: kind,
        networks: vec![json!([plugin])],
        before: "ip link add outside type veth peer name parent; ip address add 10.97.0.1/16 dev outside; \
                 ip link set parent up; ip link set outside up",
        after: "ip link delete outside",
        check: the_node_reaches_the_pod,
    }
}

/// Addresses of host-local, whose first one in each subnet is the gateway's.
fn addresses(node: &Node, subnets: &[&str]) -> Value {
    let ranges: Vec<_> = subnets.iter().map(|subnet| json!([{ "subnet": subnet }])).collect();
    let all = |subnet: &&str| if subnet.contains(':') { "::/0" } else { "0.0.0.0/0" };
    let routes: Vec<_> = subnets.iter().map(|subnet| json!({ "dst": all(subnet) })).collect();
    json!({ "type": "host-local", "dataDir": node.network_state(), "ranges": ranges, "routes": routes })
}

/// Two pods of the network reach each other, and when they are gone, so are their interfaces and addresses.
fn with(node: &Node, row: &Row) -> Result<()> {
    let name = |place: usize| format!("{}-{place}", row.name);
    let networks: Vec<_> =
        row.networks.iter().enumerate().map(|(place, plugins)| (name(place), plugins.clone())).collect();
    on(node, row.before)?;
    node.set_networks(&networks)?;
    let (first, second) = (node.pod(|_| ())?, node.pod(|_| ())?);
    let pods = Pods {
        node,
        pod: &first,
        server: first.start("server", &["sh", "-c", SERVER], |_| ())?,
        client: second.idle("client")?,
        addresses: [first.address()?, second.address()?],
    };
    pods.client.shell(&until(&dial(&pods.addresses[0], 8080)))?;
    (row.check)(&pods)?;
    first.remove()?;
    second.remove()?;
    on(node, row.after)?;
    for kind in ["veth", "ifb", "macvlan"] {
        let left = on(node, &format!("ip -o link show type {kind}"))?;
        ensure!(left.is_empty(), "left on the node: {left}");
    }
    let rules = on(node, "iptables -S; iptables -t nat -S")?;
    let left = pods.addresses.iter().find(|address| rules.contains(&format!("{address}/32")));
    ensure!(left.is_none(), "rules for {left:?} are left: {rules}");
    Ok(())
}

/// What a script of the shell prints in the node's network.
fn on(node: &Node, script: &str) -> Result<String> {
    Ok(node.program(&["sh", "-ec", script]).run()?.ok()?.text())
}

fn dial(address: &str, port: u16) -> String {
    format!("nc -w 3 {address} {port} < /dev/null")
}

fn until(command: &str) -> String {
    format!("until {command}; do sleep 0.1; done 2> /dev/null")
}

/// An address of the server, from the node.
fn is_reached(pods: &Pods<'_>, address: &str) -> Result<()> {
    let heard = on(pods.node, &until(&format!("busybox {}", dial(address, 8080))))?;
    ensure!(heard == "from the pod\n", "{heard}");
    Ok(())
}

fn the_node_reaches_the_pod(pods: &Pods<'_>) -> Result<()> {
    is_reached(pods, &pods.addresses[0])
}

/// As NetworkPolicies are made of them: what is dropped does not arrive, and everything else does.
fn rules_of_the_node_hold(pods: &Pods<'_>) -> Result<()> {
    let [server, client] = &pods.addresses;
    let rules = [
        format!("FORWARD -s {client} -d {server} -p tcp --dport 8080 -j DROP"),
        format!("INPUT -s {client} -p icmp -j DROP"),
    ];
    let refused =
        [dial(server, 8080), "ping -c 1 -W 2 $(ip route | awk '/^default/ { print $3 }')".to_owned()];
    let allowed = format!("echo four | nc -w 10 {server} 8081");
    for (rule, refused) in rules.iter().zip(&refused) {
        on(pods.node, &format!("iptables -I {rule}"))?;
        pods.client.shell(&format!("! {refused}")).with_context(|| rule.clone())?;
        let bytes = pods.client.shell(&allowed)?;
        ensure!(bytes == "5\n", "{bytes}");
        on(pods.node, &format!("iptables -D {rule}"))?;
        pods.client.shell(refused).with_context(|| format!("after {rule}"))?;
    }
    Ok(())
}

const MAC: &str = "02:00:00:00:77:01";

fn the_interface_is_tuned(pods: &Pods<'_>) -> Result<()> {
    let seen = pods.server.shell("cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu")?;
    ensure!(seen == format!("{MAC}\n1400\n"), "{seen}");
    for container in [&pods.server, &pods.client] {
        let seen = container.shell("cat /proc/sys/net/core/somaxconn")?;
        ensure!(seen == "777\n", "{seen}");
    }
    is_reached(pods, &pods.addresses[0])
}

/// Bits in a second, and those that pass at once after a pause.
const RATE: u32 = 2_000_000;
const BURST: u32 = 800_000;

/// A busy host makes it slower; only a limit that does not hold makes it faster.
fn bytes_take_their_time(pods: &Pods<'_>) -> Result<()> {
    let address = &pods.addresses[0];
    let least = f64::from((8 << 20) - BURST) / f64::from(RATE);
    let inwards = format!("head -c 1048576 /dev/zero | busybox nc {address} 8081");
    let outwards = format!("busybox nc {address} 8082 < /dev/null | wc -c");
    for script in [inwards, outwards] {
        let output = pods.node.program(&["sh", "-ec", &script]).run()?;
        ensure!(output.text() == "1048576\n", "{script}: {output}");
        let seconds = output.duration.as_secs_f64();
        ensure!(seconds >= least, "{script}: {seconds} s, and {least} s is the least");
    }
    Ok(())
}

fn both_interfaces_are_reached(pods: &Pods<'_>) -> Result<()> {
    let inside = pods.server.shell("ip -o -4 address show; ip route")?;
    for wanted in ["eth0    inet 10.95.", "eth1    inet 10.94.", "default via 10.95.0.1 dev eth0"] {
        ensure!(inside.contains(wanted), "no {wanted:?} in {inside}");
    }
    let second = inside.split_whitespace().find(|word| word.starts_with("10.94."));
    let second = second.and_then(|word| word.split('/').next()).context("no address")?;
    is_reached(pods, &pods.addresses[0])?;
    is_reached(pods, second)?;
    let heard = pods.client.shell(&dial(second, 8080))?;
    ensure!(heard == "from the pod\n", "{heard}");
    Ok(())
}

fn both_kinds_of_addresses(pods: &Pods<'_>) -> Result<()> {
    let more = pods.pod.status()?.network.context("no network")?.additional_ips;
    let [other] = &more[..] else { anyhow::bail!("{more:?}") };
    ensure!(pods.addresses[0].starts_with("10.96.") && other.ip.starts_with("fd96::"), "{other:?}");
    for address in [&pods.addresses[0], &other.ip] {
        is_reached(pods, address)?;
        let heard = pods.client.shell(&until(&dial(address, 8080)))?;
        ensure!(heard == "from the pod\n", "{heard}");
    }
    let routes = pods.server.shell("ip -6 route; ip -6 -o address show dev eth0 scope global")?;
    ensure!(
        routes.contains("default via fd96::1") && routes.contains(&format!("{}/64", other.ip)),
        "{routes}"
    );
    Ok(())
}
