//! A container's metrics in the messages that containerd's clients read.
//!
//! `ctr`, nerdctl, docker and CRI accept cgroup v1's or v2's message by its type, on any host. containerd's
//! own collector (its `/v1/metrics`) only accepts the one that matches the host's cgroups, which is also what
//! runc's shim sends. So `auto` follows the host. The numbers come from cgroup v2, which every guest has.

use containerd_shim_protos::{cgroups::metrics as v1, cgroups_v2::metrics as v2};
use machinen::{
    config::MetricsFormat,
    network::InterfaceCounters,
    pod::stats::{IoStats, Pressure, Stall, Stats},
};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use protobuf::{MessageField, well_known_types::any::Any};

use crate::events::any;

/// The host's cgroups: a cgroup v2 file system, or the directory of v1's hierarchies (file-hierarchy(7)).
const CGROUPS: &str = "/sys/fs/cgroup";

/// Encodes the message that the configuration or the host requires.
///
/// # Errors
/// The message cannot be encoded.
pub(crate) fn encode(stats: &Stats, format: MetricsFormat) -> protobuf::Result<Any> {
    let unified = || statfs(CGROUPS).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
    match format {
        MetricsFormat::Cgroup2 => any(&cgroup2(stats)),
        MetricsFormat::Cgroup1 => any(&cgroup1(stats)),
        MetricsFormat::Auto if unified() => any(&cgroup2(stats)),
        MetricsFormat::Auto => any(&cgroup1(stats)),
    }
}

fn cgroup2(stats: &Stats) -> v2::Metrics {
    let Stats { cpu, memory, pids, io, io_pressure, network } = stats;
    let (stat, events) = (&memory.stat, &memory.events);
    v2::Metrics {
        pids: MessageField::some(v2::PidsStat {
            current: pids.current,
            limit: pids.max.unwrap_or(u64::MAX),
            ..Default::default()
        }),
        cpu: MessageField::some(v2::CPUStat {
            usage_usec: cpu.usage_usec,
            user_usec: cpu.user_usec,
            system_usec: cpu.system_usec,
            nr_periods: cpu.nr_periods,
            nr_throttled: cpu.nr_throttled,
            throttled_usec: cpu.throttled_usec,
            psi: pressure(cpu.pressure.as_ref()),
            ..Default::default()
        }),
        memory: MessageField::some(v2::MemoryStat {
            anon: stat.get("anon"),
            file: stat.get("file"),
            kernel_stack: stat.get("kernel_stack"),
            slab: stat.get("slab"),
            sock: stat.get("sock"),
            shmem: stat.get("shmem"),
            file_mapped: stat.get("file_mapped"),
            file_dirty: stat.get("file_dirty"),
            file_writeback: stat.get("file_writeback"),
            anon_thp: stat.get("anon_thp"),
            inactive_anon: stat.get("inactive_anon"),
            active_anon: stat.get("active_anon"),
            inactive_file: stat.get("inactive_file"),
            active_file: stat.get("active_file"),
            unevictable: stat.get("unevictable"),
            slab_reclaimable: stat.get("slab_reclaimable"),
            slab_unreclaimable: stat.get("slab_unreclaimable"),
            pgfault: stat.get("pgfault"),
            pgmajfault: stat.get("pgmajfault"),
            workingset_refault: stat.sum(&["workingset_refault_anon", "workingset_refault_file"]),
            workingset_activate: stat.sum(&["workingset_activate_anon", "workingset_activate_file"]),
            workingset_nodereclaim: stat.get("workingset_nodereclaim"),
            pgrefill: stat.get("pgrefill"),
            pgscan: stat.get("pgscan"),
            pgsteal: stat.get("pgsteal"),
            pgactivate: stat.get("pgactivate"),
            pgdeactivate: stat.get("pgdeactivate"),
            pglazyfree: stat.get("pglazyfree"),
            pglazyfreed: stat.get("pglazyfreed"),
            thp_fault_alloc: stat.get("thp_fault_alloc"),
            thp_collapse_alloc: stat.get("thp_collapse_alloc"),
            usage: memory.current,
            usage_limit: memory.max,
            swap_usage: memory.swap_current,
            swap_limit: memory.swap_max,
            max_usage: memory.peak,
            psi: pressure(memory.pressure.as_ref()),
            ..Default::default()
        }),
        memory_events: MessageField::some(v2::MemoryEvents {
            low: events.get("low"),
            high: events.get("high"),
            max: events.get("max"),
            oom: events.get("oom"),
            oom_kill: events.get("oom_kill"),
            ..Default::default()
        }),
        io: MessageField::some(v2::IOStat {
            usage: io.iter().map(io_entry).collect(),
            psi: pressure(io_pressure.as_ref()),
            ..Default::default()
        }),
        network: network.iter().map(network_stat2).collect(),
        ..Default::default()
    }
}

fn network_stat2((name, counters): &(String, InterfaceCounters)) -> v2::NetworkStat {
    let InterfaceCounters { received, sent } = counters;
    v2::NetworkStat {
        name: name.clone(),
        rx_bytes: received.bytes,
        rx_packets: received.packets,
        rx_errors: received.errors,
        rx_dropped: received.dropped,
        tx_bytes: sent.bytes,
        tx_packets: sent.packets,
        tx_errors: sent.errors,
        tx_dropped: sent.dropped,
        ..Default::default()
    }
}

fn network_stat1((name, counters): &(String, InterfaceCounters)) -> v1::NetworkStat {
    let InterfaceCounters { received, sent } = counters;
    v1::NetworkStat {
        name: name.clone(),
        rx_bytes: received.bytes,
        rx_packets: received.packets,
        rx_errors: received.errors,
        rx_dropped: received.dropped,
        tx_bytes: sent.bytes,
        tx_packets: sent.packets,
        tx_errors: sent.errors,
        tx_dropped: sent.dropped,
        ..Default::default()
    }
}

fn io_entry(io: &IoStats) -> v2::IOEntry {
    v2::IOEntry {
        major: io.major,
        minor: io.minor,
        rbytes: io.rbytes,
        wbytes: io.wbytes,
        rios: io.rios,
        wios: io.wios,
        ..Default::default()
    }
}

fn pressure(pressure: Option<&Pressure>) -> MessageField<v2::PSIStats> {
    let stall = |stall: &Stall| {
        MessageField::some(v2::PSIData {
            avg10: stall.avg10,
            avg60: stall.avg60,
            avg300: stall.avg300,
            total: stall.total,
            ..Default::default()
        })
    };
    let stats = pressure.map(|Pressure { some, full }| v2::PSIStats {
        some: stall(some),
        full: stall(full),
        ..Default::default()
    });
    stats.into()
}

/// In v1 times are nanoseconds, and swap includes memory.
fn cgroup1(stats: &Stats) -> v1::Metrics {
    let Stats { cpu, memory, pids, io, network, .. } = stats;
    let (stat, events) = (&memory.stat, &memory.events);
    let nanoseconds = |micros: u64| micros.saturating_mul(1000);
    let entry = |usage, limit, max, failcnt| {
        MessageField::some(v1::MemoryEntry { usage, limit, max, failcnt, ..Default::default() })
    };
    let both = |memory: u64, swap: u64| memory.saturating_add(swap);
    let blkio = |read: fn(&IoStats) -> u64, write: fn(&IoStats) -> u64| {
        let entries =
            io.iter().flat_map(move |io| [("Read", read(io)), ("Write", write(io))].map(|op| (io, op)));
        entries
            .map(|(io, (op, value))| v1::BlkIOEntry {
                op: op.to_owned(),
                major: io.major,
                minor: io.minor,
                value,
                ..Default::default()
            })
            .collect()
    };
    v1::Metrics {
        pids: MessageField::some(v1::PidsStat {
            current: pids.current,
            // In v1 zero means no limit.
            limit: pids.max.unwrap_or(0),
            ..Default::default()
        }),
        cpu: MessageField::some(v1::CPUStat {
            usage: MessageField::some(v1::CPUUsage {
                total: nanoseconds(cpu.usage_usec),
                kernel: nanoseconds(cpu.system_usec),
                user: nanoseconds(cpu.user_usec),
                ..Default::default()
            }),
            throttling: MessageField::some(v1::Throttle {
                periods: cpu.nr_periods,
                throttled_periods: cpu.nr_throttled,
                throttled_time: nanoseconds(cpu.throttled_usec),
                ..Default::default()
            }),
            ..Default::default()
        }),
        memory: MessageField::some(v1::MemoryStat {
            usage: entry(memory.current, memory.max, memory.peak, events.get("max")),
            swap: entry(both(memory.current, memory.swap_current), both(memory.max, memory.swap_max), 0, 0),
            kernel: entry(stat.get("kernel"), u64::MAX, 0, 0),
            kernel_tcp: entry(stat.get("sock"), u64::MAX, 0, 0),
            hierarchical_memory_limit: memory.max,
            hierarchical_swap_limit: both(memory.max, memory.swap_max),
            ..memory_stat(stats)
        }),
        blkio: MessageField::some(v1::BlkIOStat {
            io_service_bytes_recursive: blkio(|io| io.rbytes, |io| io.wbytes),
            io_serviced_recursive: blkio(|io| io.rios, |io| io.wios),
            ..Default::default()
        }),
        network: network.iter().map(network_stat1).collect(),
        memory_oom_control: MessageField::some(v1::MemoryOomControl {
            oom_kill: events.get("oom_kill"),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The counterpart of v1's memory.stat. In v2 a cgroup's numbers include its descendants, so each number
/// equals its total.
fn memory_stat(stats: &Stats) -> v1::MemoryStat {
    let stat = &stats.memory.stat;
    v1::MemoryStat {
        cache: stat.get("file"),
        rss: stat.get("anon"),
        rss_huge: stat.get("anon_thp"),
        mapped_file: stat.get("file_mapped"),
        dirty: stat.get("file_dirty"),
        writeback: stat.get("file_writeback"),
        pg_fault: stat.get("pgfault"),
        pg_maj_fault: stat.get("pgmajfault"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        total_cache: stat.get("file"),
        total_rss: stat.get("anon"),
        total_rss_huge: stat.get("anon_thp"),
        total_mapped_file: stat.get("file_mapped"),
        total_dirty: stat.get("file_dirty"),
        total_writeback: stat.get("file_writeback"),
        total_pg_fault: stat.get("pgfault"),
        total_pg_maj_fault: stat.get("pgmajfault"),
        total_inactive_anon: stat.get("inactive_anon"),
        total_active_anon: stat.get("active_anon"),
        total_inactive_file: stat.get("inactive_file"),
        total_active_file: stat.get("active_file"),
        total_unevictable: stat.get("unevictable"),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use machinen::{
        network::Traffic,
        pod::stats::{CpuStats, MemoryStats, PidsStats},
    };
    use protobuf::Message;

    use super::*;

    fn stats() -> Stats {
        Stats {
            cpu: CpuStats { usage_usec: 5, ..CpuStats::default() },
            memory: MemoryStats { current: 4096, max: u64::MAX, swap_max: 7, ..MemoryStats::default() },
            pids: PidsStats { current: 2, max: None },
            io: vec![IoStats { major: 8, minor: 16, rbytes: 512, rios: 1, ..IoStats::default() }],
            network: vec![(
                "eth0".to_owned(),
                InterfaceCounters {
                    received: Traffic { bytes: 11, packets: 1, errors: 2, dropped: 3 },
                    sent: Traffic { bytes: 22, packets: 4, errors: 5, dropped: 6 },
                },
            )],
            ..Stats::default()
        }
    }

    #[test]
    fn both_messages_have_the_fields_that_clients_dereference() {
        let any = encode(&stats(), MetricsFormat::Cgroup2).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.memory.usage, metrics.cpu.usage_usec, metrics.pids.current), (4096, 5, 2));
        assert_eq!((metrics.memory.usage_limit, metrics.io.usage[0].rbytes), (u64::MAX, 512));
        let network = &metrics.network[0];
        assert_eq!((network.name.as_str(), network.rx_bytes, network.tx_bytes), ("eth0", 11, 22));
        assert_eq!((network.rx_errors, network.rx_dropped), (2, 3));
        assert_eq!((network.tx_errors, network.tx_dropped), (5, 6));

        let any = encode(&stats(), MetricsFormat::Cgroup1).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = v1::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.memory.usage.usage, metrics.cpu.usage.total), (4096, 5000));
        assert_eq!((metrics.memory.swap.limit, metrics.pids.limit), (u64::MAX, 0));
        let network = &metrics.network[0];
        assert_eq!((network.rx_packets, network.tx_packets), (1, 4));
        let blkio = &metrics.blkio.io_service_bytes_recursive;
        assert_eq!((blkio[0].op.as_str(), blkio[0].value, blkio[1].value), ("Read", 512, 0));
    }
}
