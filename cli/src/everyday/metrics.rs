//! `machinen metrics`: what all containers use, in the text format of Prometheus, with cAdvisor's names.
//!
//! cAdvisor reads the host's cgroups, where the containers of a VM are not. A collector runs this verb, as for
//! node_exporter's directory of text files. What a guest counts is the guest's word; names and labels are the host's.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use clap::Args;
use containerd_shim_protos::cgroups_v2::metrics::{IOEntry, Metrics, NetworkStat};
use serde_json::Value;

use crate::{
    find::{self, FindError, FoundContainer, MemoryUse, PodClient, memory_of},
    oci::GlobalArgs,
};

/// Arguments of `machinen metrics`.
#[derive(Debug, Args)]
pub(crate) struct MetricsArgs {}

/// The label of the interface or the device, if there is one, and the value.
type Samples = Vec<(Option<(&'static str, String)>, f64)>;

/// A name, whether it only grows, what it means, and its values.
struct Family {
    name: &'static str,
    is_counter: bool,
    help: &'static str,
    samples: fn(&Measured) -> Samples,
}

/// A container, and what it uses.
struct Measured {
    labels: String,
    metrics: Metrics,
    /// Of the VM, which the containers of a pod share: only the first one has it.
    vm: Option<(MemoryUse, u32)>,
}

/// # Errors
/// The containers cannot be listed.
pub(super) async fn run(global: &GlobalArgs, _: &MetricsArgs) -> Result<(), FindError> {
    let mut measured = Vec::new();
    let mut vms = Vec::new();
    for container in find::all(global).await? {
        let metrics = match PodClient::connect(&container.socket) {
            Ok(pod) => pod.metrics(&container.id).await,
            Err(error) => Err(error),
        };
        // One that has ended or is being created has none.
        let Ok(metrics) = metrics else { continue };
        let vm = container.vm.filter(|vm| !vms.contains(&vm.pid));
        vms.extend(vm.map(|vm| vm.pid));
        let vm = vm.and_then(|vm| Some((memory_of(vm.pid)?, vm.memory_mib)));
        measured.push(Measured { labels: labels(&container), metrics, vm });
    }
    print!("{}", text(&measured));
    Ok(())
}

/// cAdvisor's labels. Those of Kubernetes are in the configuration's annotations.
fn labels(container: &FoundContainer) -> String {
    let annotations = annotations(&container.bundle.join("config.json"));
    let of_pod = |key: &str| annotations.get(&format!("io.kubernetes.cri.{key}")).cloned();
    let is_sandbox = of_pod("container-type").is_some_and(|kind| kind == "sandbox");
    let labels = [
        ("id", Some(container.id.clone())),
        ("name", container.name.clone()),
        ("image", container.image.clone()),
        ("owner", Some(container.owner.name().to_owned())),
        ("container", if is_sandbox { Some("POD".to_owned()) } else { of_pod("container-name") }),
        ("pod", of_pod("sandbox-name")),
        ("namespace", of_pod("sandbox-namespace")),
    ];
    let labels = labels.into_iter().filter_map(|(name, value)| Some(label(name, &value?)));
    labels.collect::<Vec<_>>().join(",")
}

fn annotations(config: &Path) -> BTreeMap<String, String> {
    let config: Value =
        fs::read(config).ok().and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default();
    let annotations = config["annotations"].as_object().into_iter().flatten();
    annotations.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}

/// A label with its value, in the format's quotes.
fn label(name: &str, value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("{name}=\"{value}\"")
}

fn text(measured: &[Measured]) -> String {
    let mut text = String::new();
    for Family { name, is_counter, help, samples } in &FAMILIES {
        let kind = if *is_counter { "counter" } else { "gauge" };
        let mut rows = String::new();
        for container in measured {
            for (more, value) in samples(container) {
                let more = more.map(|(name, value)| format!(",{}", label(name, &value))).unwrap_or_default();
                // Writing to a string does not fail.
                let _ = writeln!(rows, "{name}{{{}{more}}} {value}", container.labels);
            }
        }
        if !rows.is_empty() {
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{rows}");
        }
    }
    text
}

fn one(value: f64) -> Samples {
    vec![(None, value)]
}

/// Seconds of a number of microseconds.
fn seconds(micros: u64) -> Samples {
    one(micros as f64 / 1e6)
}

fn number(value: u64) -> Samples {
    one(value as f64)
}

/// `u64::MAX` stands for no limit, which has no sample.
fn limit(value: u64) -> Samples {
    if value == u64::MAX { Vec::new() } else { number(value) }
}

fn interfaces(measured: &Measured, value: fn(&NetworkStat) -> u64) -> Samples {
    let row = |stat: &NetworkStat| (Some(("interface", stat.name.clone())), value(stat) as f64);
    measured.metrics.network.iter().map(row).collect()
}

fn devices(measured: &Measured, value: fn(&IOEntry) -> u64) -> Samples {
    let row =
        |entry: &IOEntry| (Some(("device", format!("{}:{}", entry.major, entry.minor))), value(entry) as f64);
    measured.metrics.io.usage.iter().map(row).collect()
}

const fn counter(name: &'static str, help: &'static str, samples: fn(&Measured) -> Samples) -> Family {
    Family { name, is_counter: true, help, samples }
}

const fn gauge(name: &'static str, help: &'static str, samples: fn(&Measured) -> Samples) -> Family {
    Family { name, is_counter: false, help, samples }
}

const FAMILIES: [Family; 25] = [
    counter("container_cpu_usage_seconds_total", "CPU time in the guest.", |it| {
        seconds(it.metrics.cpu.usage_usec)
    }),
    counter("container_cpu_user_seconds_total", "CPU time of the programs themselves.", |it| {
        seconds(it.metrics.cpu.user_usec)
    }),
    counter("container_cpu_system_seconds_total", "CPU time of the guest's kernel.", |it| {
        seconds(it.metrics.cpu.system_usec)
    }),
    counter("container_cpu_cfs_periods_total", "Periods of the quota that have passed.", |it| {
        number(it.metrics.cpu.nr_periods)
    }),
    counter("container_cpu_cfs_throttled_periods_total", "Periods in which the quota was used up.", |it| {
        number(it.metrics.cpu.nr_throttled)
    }),
    counter("container_cpu_cfs_throttled_seconds_total", "Time for which the quota held it back.", |it| {
        seconds(it.metrics.cpu.throttled_usec)
    }),
    gauge("container_memory_usage_bytes", "Memory, with that of caches.", |it| {
        number(it.metrics.memory.usage)
    }),
    gauge("container_memory_working_set_bytes", "Memory without that of caches that are not in use.", |it| {
        number(it.metrics.memory.usage.saturating_sub(it.metrics.memory.inactive_file))
    }),
    gauge("container_memory_rss", "Anonymous memory, bytes.", |it| number(it.metrics.memory.anon)),
    gauge("container_memory_cache", "Memory of caches, bytes.", |it| number(it.metrics.memory.file)),
    gauge("container_memory_swap", "Swap that is used, bytes.", |it| number(it.metrics.memory.swap_usage)),
    gauge("container_memory_max_usage_bytes", "Most memory that was used at once.", |it| {
        number(it.metrics.memory.max_usage)
    }),
    gauge("container_spec_memory_limit_bytes", "The limit of memory.", |it| {
        limit(it.metrics.memory.usage_limit)
    }),
    counter("container_oom_events_total", "Processes that were ended for lack of memory.", |it| {
        number(it.metrics.memory_events.oom_kill)
    }),
    gauge("container_threads", "Processes and threads.", |it| number(it.metrics.pids.current)),
    counter("container_network_receive_bytes_total", "Bytes that the pod has received.", |it| {
        interfaces(it, |stat| stat.rx_bytes)
    }),
    counter("container_network_receive_packets_total", "Packets that the pod has received.", |it| {
        interfaces(it, |stat| stat.rx_packets)
    }),
    counter("container_network_transmit_bytes_total", "Bytes that the pod has sent.", |it| {
        interfaces(it, |stat| stat.tx_bytes)
    }),
    counter("container_network_transmit_packets_total", "Packets that the pod has sent.", |it| {
        interfaces(it, |stat| stat.tx_packets)
    }),
    counter("container_fs_reads_bytes_total", "Bytes that were read from disks of the VM.", |it| {
        devices(it, |entry| entry.rbytes)
    }),
    counter("container_fs_writes_bytes_total", "Bytes that were written to disks of the VM.", |it| {
        devices(it, |entry| entry.wbytes)
    }),
    counter("container_fs_reads_total", "Reads of disks of the VM.", |it| devices(it, |entry| entry.rios)),
    counter("container_fs_writes_total", "Writes to disks of the VM.", |it| devices(it, |entry| entry.wios)),
    gauge("machinen_vm_memory_bytes", "The VM's share of the host's memory (PSS of QEMU).", |it| {
        it.vm.map(|(memory, _)| (None, memory.pss as f64)).into_iter().collect()
    }),
    gauge("machinen_vm_memory_limit_bytes", "Most memory that the guest can use.", |it| {
        it.vm.map(|(_, mib)| (None, f64::from(mib) * f64::from(1 << 20))).into_iter().collect()
    }),
];

#[cfg(test)]
mod tests {
    use containerd_shim_protos::cgroups_v2::metrics::CPUStat;
    use protobuf::MessageField;

    use super::*;

    fn measured(id: &str, vm: Option<(MemoryUse, u32)>) -> Measured {
        let metrics = Metrics {
            cpu: MessageField::some(CPUStat { usage_usec: 1_500_000, ..Default::default() }),
            network: vec![NetworkStat { name: "eth0".to_owned(), rx_bytes: 7, ..Default::default() }],
            ..Default::default()
        };
        Measured { labels: labels(&find::example(id, Some("a\"b"), None)), metrics, vm }
    }

    #[test]
    fn a_family_has_its_samples_together_and_the_vm_is_counted_once() {
        let vm = MemoryUse { rss: 5, pss: 3 };
        let text = text(&[measured("c1", Some((vm, 1))), measured("c2", None)]);
        let labels = |id| format!("id=\"{id}\",name=\"a\\\"b\",owner=\"machinen\"");
        let family = format!(
            "# HELP container_cpu_usage_seconds_total CPU time in the guest.\n\
             # TYPE container_cpu_usage_seconds_total counter\n\
             container_cpu_usage_seconds_total{{{}}} 1.5\ncontainer_cpu_usage_seconds_total{{{}}} 1.5\n",
            labels("c1"),
            labels("c2")
        );
        assert!(text.starts_with(&family), "{text}");
        let interface =
            format!("container_network_receive_bytes_total{{{},interface=\"eth0\"}} 7\n", labels("c1"));
        assert!(text.contains(&interface), "{text}");
        assert!(
            text.ends_with(&format!("machinen_vm_memory_limit_bytes{{{}}} 1048576\n", labels("c1"))),
            "{text}"
        );
    }

    #[test]
    fn the_names_of_kubernetes_are_labels() {
        let bundle = tempfile::tempdir().unwrap();
        let mut container = find::example("c", None, Some("k8s.io"));
        container.bundle = bundle.path().to_owned();
        let config = serde_json::json!({"annotations": {
            "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.container-name": "web",
            "io.kubernetes.cri.sandbox-name": "pod-1", "io.kubernetes.cri.sandbox-namespace": "default",
        }});
        fs::write(bundle.path().join("config.json"), config.to_string()).unwrap();
        let wanted = "id=\"c\",owner=\"machinen\",container=\"web\",pod=\"pod-1\",namespace=\"default\"";
        assert_eq!(labels(&container), wanted);
    }
}
