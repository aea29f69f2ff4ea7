//! `machinen events`: prints the metrics of a container in runc's form.

use std::time::Duration;

use clap::Args;
use containerd_shim_protos::cgroups_v2::metrics::{IOEntry, Metrics};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval};

use super::{
    client::MonitorClient,
    error::OciError,
    global::GlobalArgs,
    state::{ContainerStatus, StateDir},
};

/// Arguments of `machinen events`.
#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Time between two reports
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = humantime::parse_duration)]
    interval: Duration,
    /// Print one report and end
    #[arg(long)]
    stats: bool,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// # Errors
/// The container does not run, or its monitor does not answer.
pub(super) async fn run(global: &GlobalArgs, args: &EventsArgs) -> Result<(), OciError> {
    let state = StateDir::find(&global.root, &args.id)?;
    let monitor = MonitorClient::running(&state).await?;
    match monitor.status().await? {
        ContainerStatus::Stopped => {
            let status = ContainerStatus::Stopped;
            return Err(OciError::NotRunning { id: args.id.clone(), status });
        }
        _ if args.stats => return print(&args.id, &monitor.stats().await?),
        _ => {}
    }
    let mut ticks = interval(args.interval.max(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let ended = async { monitor.wait("").await };
    tokio::pin!(ended);
    let mut kills = None;
    loop {
        tokio::select! {
            _ = &mut ended => return Ok(()),
            _ = ticks.tick() => {
                let metrics = monitor.stats().await?;
                // The monitor counts them; what has happened before is no event of this moment.
                let now = metrics.memory_events.oom_kill;
                if kills.replace(now).is_some_and(|before| now > before) {
                    print_event(&Event { kind: "oom", id: &args.id, data: None })?;
                }
                print(&args.id, &metrics)?;
            }
        }
    }
}

fn print(id: &str, metrics: &Metrics) -> Result<(), OciError> {
    print_event(&Event { kind: "stats", id, data: Some(data(metrics)) })
}

fn print_event(event: &Event<'_>) -> Result<(), OciError> {
    println!("{}", serde_json::to_string(event).map_err(OciError::Encode)?);
    Ok(())
}

/// A line of the output, in the order of runc's, which scripts compare.
#[derive(Debug, Serialize)]
struct Event<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Value>,
}

/// The metrics in runc's form (its package `types`), which is that of cgroup v1.
fn data(metrics: &Metrics) -> Value {
    let Metrics { cpu, memory, pids, io, network, memory_events, .. } = metrics;
    let nanoseconds = |microseconds: u64| microseconds.saturating_mul(1000);
    let entries = io.usage.as_slice();
    json!({
        "cpu": {
            "usage": {
                "total": nanoseconds(cpu.usage_usec),
                "kernel": nanoseconds(cpu.system_usec),
                "user": nanoseconds(cpu.user_usec),
            },
            "throttling": {
                "periods": cpu.nr_periods,
                "throttledPeriods": cpu.nr_throttled,
                "throttledTime": nanoseconds(cpu.throttled_usec),
            },
        },
        "memory": {
            "cache": memory.file,
            "usage": {
                "limit": memory.usage_limit, "usage": memory.usage, "max": memory.max_usage,
                "failcnt": memory_events.max,
            },
            "swap": { "limit": memory.swap_limit, "usage": memory.swap_usage, "max": 0, "failcnt": 0 },
            "kernel": { "limit": 0, "failcnt": 0 },
            "kernelTCP": { "limit": 0, "failcnt": 0 },
            "raw": {
                "anon": memory.anon, "file": memory.file, "kernel_stack": memory.kernel_stack,
                "slab": memory.slab, "sock": memory.sock, "shmem": memory.shmem,
                "inactive_anon": memory.inactive_anon, "active_anon": memory.active_anon,
                "inactive_file": memory.inactive_file, "active_file": memory.active_file,
                "pgfault": memory.pgfault, "pgmajfault": memory.pgmajfault,
            },
        },
        "pids": { "current": pids.current, "limit": pids_limit(pids.limit) },
        "blkio": {
            "ioServiceBytesRecursive": io_rows(entries, |entry| [entry.rbytes, entry.wbytes]),
            "ioServicedRecursive": io_rows(entries, |entry| [entry.rios, entry.wios]),
        },
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": network.iter().map(|interface| json!({
            "Name": interface.name,
            "RxBytes": interface.rx_bytes, "RxPackets": interface.rx_packets,
            "RxErrors": interface.rx_errors, "RxDropped": interface.rx_dropped,
            "TxBytes": interface.tx_bytes, "TxPackets": interface.tx_packets,
            "TxErrors": interface.tx_errors, "TxDropped": interface.tx_dropped,
        })).collect::<Vec<_>>(),
    })
}

/// 0 is no limit, as in runc's form.
fn pids_limit(limit: u64) -> u64 {
    if limit == u64::MAX { 0 } else { limit }
}

fn io_rows(entries: &[IOEntry], counts: impl Fn(&IOEntry) -> [u64; 2]) -> Vec<Value> {
    let row = |entry: &IOEntry, operation: &str, value: u64| json!({ "major": entry.major, "minor": entry.minor, "op": operation, "value": value });
    let rows = entries.iter().flat_map(|entry| {
        let [read, written] = counts(entry);
        [row(entry, "Read", read), row(entry, "Write", written)]
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::cgroups_v2::metrics::{CPUStat, PidsStat};
    use protobuf::MessageField;

    use super::*;

    #[test]
    fn times_are_nanoseconds_and_no_limit_is_zero() {
        let metrics = Metrics {
            cpu: MessageField::some(CPUStat { usage_usec: 7, ..Default::default() }),
            pids: MessageField::some(PidsStat { current: 3, limit: u64::MAX, ..Default::default() }),
            ..Default::default()
        };
        let data = data(&metrics);
        assert_eq!(data["cpu"]["usage"]["total"], 7000);
        assert_eq!(data["pids"], json!({ "current": 3, "limit": 0 }));
    }
}
