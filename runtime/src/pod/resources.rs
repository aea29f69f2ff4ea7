//! What new limits of a running container are to its cgroup in the guest.
//!
//! The limits come as the runtime-spec's LinuxResources, whose CPU and block I/O parts are those of cgroup v1; runc's
//! translations to v2 apply, as they did when the container was created. A limit that cgroup v2 or the guest does not
//! have is refused by name. Zero means "as it is", which is what clients send for what they do not change.

use machinen_protocol::api::CgroupFile;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use crate::error::{ErrorKind, Kind};

/// The kernel's default, microseconds; the one that applies where a quota comes without a period.
const PERIOD: u64 = 100_000;

/// Why limits are refused before the guest has seen them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResourcesError {
    #[error("linux.resources.{field} cannot be changed: {reason}")]
    Unsupported { field: &'static str, reason: &'static str },
    #[error("linux.resources.{field} has the value {value}; it takes {expected}")]
    Invalid { field: &'static str, value: String, expected: &'static str },
    #[error(
        "linux.resources.memory.limit is {mib} MiB, but the VM has {vm_mib} MiB and cannot grow: \
         create the container with that limit, or with the annotation io.machinen.memory-ceiling"
    )]
    BeyondVm { mib: u64, vm_mib: u32 },
}

impl Kind for ResourcesError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Unsupported { .. } => ErrorKind::Unimplemented,
            Self::Invalid { .. } => ErrorKind::InvalidArgument,
            Self::BeyondVm { .. } => ErrorKind::FailedPrecondition,
        }
    }
}

/// What holds before the change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Now<'a> {
    /// Content of cpu.max: quota and period.
    pub(super) cpu_max: &'a str,
    /// Content of memory.max.
    pub(super) memory_max: &'a str,
    pub(super) vm_memory_mib: u32,
}

/// The files of the cgroup to write, in this order.
///
/// # Errors
/// A limit that cannot be.
pub(super) fn writes(resources: &LinuxResources, now: Now<'_>) -> Result<Vec<CgroupFile>, ResourcesError> {
    let mut writes = Writes::default();
    // Devices are not changed, as runc does not: clients send them along with every update.
    if let Some(memory) = resources.memory() {
        writes.memory(memory, now)?;
    }
    if let Some(cpu) = resources.cpu() {
        writes.cpu(cpu, now.cpu_max)?;
    }
    if let Some(limit) = resources.pids().as_ref().map(|pids| pids.limit()).filter(|&limit| limit != 0) {
        writes.add("pids.max", limit_text(limit));
    }
    if let Some(block_io) = resources.block_io() {
        writes.block_io(block_io)?;
    }
    for hugepages in resources.hugepage_limits().iter().flatten() {
        // The guest reserves none, so that none is all there is.
        if hugepages.limit() != 0 {
            return Err(unsupported("hugepageLimits", "the guest has no huge pages reserved"));
        }
    }
    if resources.network().as_ref().is_some_and(|network| {
        network.class_id().unwrap_or(0) != 0
            || network.priorities().as_ref().is_some_and(|all| !all.is_empty())
    }) {
        return Err(unsupported("network", "cgroup v2 has no classes and priorities of network traffic"));
    }
    if resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()) {
        return Err(unsupported("rdma", "the guest has no RDMA devices"));
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (name, value) in unified {
        if name.starts_with("cgroup.") || name.contains('/') || !name.contains('.') {
            return Err(invalid("unified", name, "names of a controller's files, such as memory.high"));
        }
        writes.add(name, value.clone());
    }
    Ok(writes.0)
}

#[derive(Debug, Default)]
struct Writes(Vec<CgroupFile>);

impl Writes {
    fn add(&mut self, name: &str, content: String) {
        self.0.push(CgroupFile { name: name.to_owned(), content, ..Default::default() });
    }

    fn memory(&mut self, memory: &LinuxMemory, now: Now<'_>) -> Result<(), ResourcesError> {
        let set = |value: Option<i64>| value.filter(|&value| value != 0);
        let limit = set(memory.limit());
        if set(memory.kernel()).is_some_and(|kernel| kernel > 0) {
            return Err(unsupported("memory.kernel", "cgroup v2 counts it with the rest"));
        }
        if set(memory.kernel_tcp()).is_some_and(|kernel| kernel > 0) {
            return Err(unsupported("memory.kernelTCP", "cgroup v2 counts it with the rest"));
        }
        if memory.swappiness().is_some_and(|swappiness| swappiness != 0) {
            return Err(unsupported("memory.swappiness", "cgroup v2 has none"));
        }
        if memory.disable_oom_killer() == Some(true) {
            return Err(unsupported("memory.disableOOMKiller", "cgroup v2 has no such switch"));
        }
        if let Some(swap) = set(memory.swap()) {
            // The spec's is the sum of both.
            let swap = match (swap, limit) {
                (..0, _) => -1,
                (_, None | Some(..0)) => {
                    return Err(invalid("memory.swap", swap, "a value only together with memory.limit"));
                }
                (swap, Some(limit)) if swap < limit => {
                    return Err(invalid(
                        "memory.swap",
                        swap,
                        "at least memory.limit, whose sum with swap it is",
                    ));
                }
                (swap, Some(limit)) => swap - limit,
            };
            self.add("memory.swap.max", limit_text(swap));
        }
        if let Some(limit) = limit {
            let bytes = u64::try_from(limit).unwrap_or(0);
            let vm = u64::from(now.vm_memory_mib) << 20;
            // Clients repeat what they do not change, and what a container was created with it may keep.
            let same = now.memory_max.trim_end().parse() == Ok(bytes);
            if bytes > vm && vm > 0 && !same {
                return Err(ResourcesError::BeyondVm { mib: bytes >> 20, vm_mib: now.vm_memory_mib });
            }
            self.add("memory.max", limit_text(limit));
        }
        if let Some(reservation) = set(memory.reservation()) {
            self.add("memory.low", limit_text(reservation));
        }
        Ok(())
    }

    fn cpu(&mut self, cpu: &LinuxCpu, now: &str) -> Result<(), ResourcesError> {
        if cpu.realtime_runtime().is_some_and(|runtime| runtime != 0)
            || cpu.realtime_period().is_some_and(|period| period != 0)
        {
            return Err(unsupported("cpu.realtimeRuntime", "cgroup v2 has no real-time share"));
        }
        if let Some(shares) = cpu.shares().filter(|&shares| shares != 0) {
            self.add("cpu.weight", weight_of_shares(shares).to_string());
        }
        let quota = cpu.quota().filter(|&quota| quota != 0);
        let period = cpu.period().filter(|&period| period != 0);
        if quota.is_some() || period.is_some() {
            let (old_quota, old_period) = now.trim_end().split_once(' ').unwrap_or(("max", ""));
            let quota = quota.map_or_else(|| old_quota.to_owned(), limit_text);
            let period = period.or_else(|| old_period.parse().ok()).unwrap_or(PERIOD);
            self.add("cpu.max", format!("{quota} {period}"));
        }
        for (name, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
                self.add(name, value.clone());
            }
        }
        Ok(())
    }

    fn block_io(&mut self, block_io: &LinuxBlockIo) -> Result<(), ResourcesError> {
        const HOST_DEVICES: &str = "the guest's disks are not the host's devices; unified can set io.max";
        let some = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|list| !list.is_empty());
        if some(block_io.throttle_read_bps_device())
            || some(block_io.throttle_write_bps_device())
            || some(block_io.throttle_read_iops_device())
            || some(block_io.throttle_write_iops_device())
        {
            return Err(unsupported("blockIO.throttle*Device", HOST_DEVICES));
        }
        if block_io.weight_device().as_ref().is_some_and(|list| !list.is_empty()) {
            return Err(unsupported("blockIO.weightDevice", HOST_DEVICES));
        }
        if block_io.leaf_weight().is_some_and(|weight| weight != 0) {
            return Err(unsupported("blockIO.leafWeight", "cgroup v2 has none"));
        }
        if let Some(weight) = block_io.weight().filter(|&weight| weight != 0) {
            if !(10..=1000).contains(&weight) {
                return Err(invalid("blockIO.weight", weight, "10 to 1000"));
            }
            // The OCI world's 10 to 1000 stand for the kernel's 1 to 10000.
            let ours = 1 + (u64::from(weight) - 10) * 9999 / 990;
            self.add("io.weight", format!("default {ours}"));
        }
        Ok(())
    }
}

fn unsupported(field: &'static str, reason: &'static str) -> ResourcesError {
    ResourcesError::Unsupported { field, reason }
}

fn invalid(field: &'static str, value: impl std::fmt::Display, expected: &'static str) -> ResourcesError {
    ResourcesError::Invalid { field, value: value.to_string(), expected }
}

/// Negative limits are none.
fn limit_text(limit: i64) -> String {
    if limit < 0 { "max".to_owned() } else { limit.to_string() }
}

/// cgroup v2's weight (1 to 10000, default 100) for v1's shares (2 to 262144, default 1024), so that the least, the
/// default and the most of both are the same (the rule of the field since runc 1.3.2; crun and youki have it too).
fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        ..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            10_f64.powf(exponent).ceil() as u64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Now<'_> = Now { cpu_max: "max 100000\n", memory_max: "max\n", vm_memory_mib: 512 };

    fn update(json: &str) -> Result<Vec<(String, String)>, ResourcesError> {
        let writes = writes(&serde_json::from_str(json).unwrap(), NOW)?;
        Ok(writes.into_iter().map(|file| (file.name, file.content)).collect())
    }

    #[test]
    fn each_limit_has_its_file() {
        for (json, name, content) in [
            (r#"{"memory":{"limit":67108864}}"#, "memory.max", "67108864"),
            (r#"{"memory":{"limit":-1}}"#, "memory.max", "max"),
            (r#"{"memory":{"reservation":4096}}"#, "memory.low", "4096"),
            (r#"{"memory":{"swap":-1}}"#, "memory.swap.max", "max"),
            (r#"{"cpu":{"shares":1024}}"#, "cpu.weight", "100"),
            (r#"{"cpu":{"shares":2}}"#, "cpu.weight", "1"),
            (r#"{"cpu":{"shares":262144}}"#, "cpu.weight", "10000"),
            (r#"{"cpu":{"quota":50000}}"#, "cpu.max", "50000 100000"),
            (r#"{"cpu":{"period":50000}}"#, "cpu.max", "max 50000"),
            (r#"{"cpu":{"quota":-1,"period":7000}}"#, "cpu.max", "max 7000"),
            (r#"{"cpu":{"cpus":"0-1"}}"#, "cpuset.cpus", "0-1"),
            (r#"{"pids":{"limit":7}}"#, "pids.max", "7"),
            (r#"{"pids":{"limit":-1}}"#, "pids.max", "max"),
            (r#"{"blockIO":{"weight":100}}"#, "io.weight", "default 910"),
            (r#"{"unified":{"memory.high":"1048576"}}"#, "memory.high", "1048576"),
        ] {
            assert_eq!(update(json).unwrap(), [(name.to_owned(), content.to_owned())], "{json}");
        }
        let both = update(r#"{"memory":{"limit":1048576,"swap":3145728}}"#).unwrap();
        assert_eq!(both[0], ("memory.swap.max".to_owned(), "2097152".to_owned()));
    }

    #[test]
    fn what_is_not_set_is_left_alone() {
        for json in [
            "{}",
            r#"{"memory":{"limit":0,"swap":0},"cpu":{"shares":0,"quota":0,"period":0,"cpus":""},"pids":{"limit":0}}"#,
            r#"{"devices":[{"allow":false,"access":"rwm"}],"blockIO":{"weight":0},"network":{"classID":0}}"#,
            r#"{"hugepageLimits":[{"pageSize":"2MB","limit":0}]}"#,
        ] {
            assert_eq!(update(json).unwrap(), [], "{json}");
        }
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (json, words) in [
            (r#"{"memory":{"swappiness":60}}"#, "memory.swappiness"),
            (r#"{"memory":{"swap":4096}}"#, "together with memory.limit"),
            (r#"{"memory":{"limit":8192,"swap":4096}}"#, "at least memory.limit"),
            (r#"{"memory":{"limit":1073741824}}"#, "1024 MiB, but the VM has 512 MiB"),
            (r#"{"cpu":{"realtimeRuntime":95000}}"#, "real-time"),
            (r#"{"blockIO":{"weight":5}}"#, "10 to 1000"),
            (r#"{"blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1}]}}"#, "io.max"),
            (r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]}"#, "huge pages"),
            (r#"{"unified":{"cgroup.freeze":"1"}}"#, "cgroup.freeze"),
            (r#"{"unified":{"../memory.max":"1"}}"#, "../memory.max"),
        ] {
            let error = update(json).unwrap_err().to_string();
            assert!(error.contains(words), "{json}: {error}");
        }
    }

    #[test]
    fn a_limit_beyond_the_vm_may_stay() {
        let resources = serde_json::from_str(r#"{"memory":{"limit":1073741824}}"#).unwrap();
        let now = Now { memory_max: "1073741824\n", ..NOW };
        assert_eq!(writes(&resources, now).unwrap().len(), 1);
    }
}
