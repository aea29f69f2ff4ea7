//! The counts of a container's network, and how large its packets are.

use anyhow::{Result, bail, ensure};
use containerd_shim_protos::{
    api::{StatsRequest, StatsResponse},
    cgroups::metrics as v1,
    cgroups_v2::metrics as v2,
    protobuf::Message as _,
};
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    process::DEADLINE,
    served::Served,
    setup::{Setup, Value},
};

use super::{
    capture::Capture,
    lab::{Lab, PEER},
    moved::config,
    run, until,
};
use crate::harness::on_newest_containerd;

on_newest_containerd!(metrics_have_the_interface, packets_larger_than_the_mtu_reach_the_tap_both_ways);

const MIB: u64 = 1 << 20;

/// Name, bytes and packets of each interface: received, sent.
type Counts = Vec<(String, [u64; 4])>;

fn counts(served: &Served<'_>) -> Result<Counts> {
    let request = StatsRequest { id: served.shim.id.clone(), ..Default::default() };
    let stats = served.client.ok::<StatsResponse>("Stats", &request)?.stats;
    match stats.type_url.as_str() {
        "io.containerd.cgroups.v1.Metrics" => {
            let metrics = v1::Metrics::parse_from_bytes(&stats.value)?;
            let of =
                |it: v1::NetworkStat| (it.name, [it.rx_bytes, it.rx_packets, it.tx_bytes, it.tx_packets]);
            Ok(metrics.network.into_iter().map(of).collect())
        }
        "io.containerd.cgroups.v2.Metrics" => {
            let metrics = v2::Metrics::parse_from_bytes(&stats.value)?;
            let of =
                |it: v2::NetworkStat| (it.name, [it.rx_bytes, it.rx_packets, it.tx_bytes, it.tx_packets]);
            Ok(metrics.network.into_iter().map(of).collect())
        }
        other => bail!("odd metrics: {other}"),
    }
}

fn metrics_have_the_interface(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let sink = lab.start_in_peer(&["busybox", "nc", "-ll", "-p", "7002", "-e", "wc", "-c"])?;
    let source = lab.start_in_peer(&[
        "busybox",
        "nc",
        "-ll",
        "-p",
        "7003",
        "-e",
        "dd",
        "if=/dev/zero",
        "bs=1M",
        "count=1",
    ])?;
    let bundle = Bundle::busybox(containerd)?;
    let config = config(&bundle, &lab.path(), "exec sleep 1000", &[])?;
    for format in ["cgroup1", "cgroup2"] {
        containerd.configure(&Setup::new().set("task", "metrics", Value::text(format)))?;
        let served = Served::run(containerd, &config)?;
        let script = format!(
            "{}; dd if=/dev/zero bs=1M count=4 2> /dev/null | nc {PEER} 7002; nc {PEER} 7003 < /dev/null | wc -c",
            until(&format!("nc {PEER} 7002 < /dev/null > /dev/null"))
        );
        let (status, output) = served.shell(&script)?;
        ensure!(status == 0 && output == format!("{}\n{MIB}\n", 4 * MIB), "{status}: {output}");
        let all = counts(&served)?;
        let [(name, [received, packets_in, sent, packets_out])] = all.as_slice() else {
            bail!("{format}: {all:?}")
        };
        ensure!(name == "eth0", "{all:?}");
        ensure!((MIB..2 * MIB).contains(received) && (4 * MIB..5 * MIB).contains(sent), "{all:?}");
        ensure!((10..8000).contains(packets_in) && (10..8000).contains(packets_out), "{all:?}");
        served.end()?;
    }
    drop((sink, source));
    lab.nothing_is_left()?;
    let idle = Served::idle(containerd)?;
    let all = counts(&idle)?;
    ensure!(all.is_empty(), "a container without a network has {all:?}");
    idle.end()
}

/// Only with the offloads of segmentation and of checksums does a packet exist that is larger than the MTU.
fn packets_larger_than_the_mtu_reach_the_tap_both_ways(containerd: &mut Containerd) -> Result<()> {
    const MTU: usize = 1500;
    const ETHERNET: usize = 14;
    let lab = Lab::wired()?;
    let capture = Capture::of(&lab.path())?;
    let own = Lab::mac_in(&lab.path())?;
    let peer = Lab::mac_in(&lab.peer_path())?;
    let sink = lab.start_in_peer(&["busybox", "nc", "-ll", "-p", "7002", "-e", "wc", "-c"])?;
    let source = lab.start_in_peer(&[
        "busybox",
        "nc",
        "-ll",
        "-p",
        "7003",
        "-e",
        "dd",
        "if=/dev/zero",
        "bs=1M",
        "count=8",
    ])?;
    for (sender, transfer) in [
        (own, format!("dd if=/dev/zero bs=1M count=8 2> /dev/null | nc {PEER} 7002")),
        (peer, format!("nc {PEER} 7003 < /dev/null | wc -c")),
    ] {
        capture.frames()?;
        let script = until(&format!("nc {PEER} 7002 < /dev/null > /dev/null"));
        let running = run(containerd, &lab, &format!("{script}; {transfer}")).spawn(DEADLINE)?;
        // The packets are read while they pass: the socket of the capture has no room for all of them.
        capture.wait_for("packet that is larger than the MTU", |frame| {
            frame.sender() == Some(sender) && frame.length > MTU + ETHERNET
        })?;
        let output = running.wait()?.ok()?.text();
        ensure!(output == format!("{}\n", 8 * MIB), "{output}");
    }
    drop((sink, source));
    Ok(())
}
