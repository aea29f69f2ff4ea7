//! Translates the limits of a container to files of its cgroup in the guest.
//!
//! The limits are the runtime-spec's LinuxResources, whose CPU and block I/O parts follow cgroup v1. They are
//! translated to v2 as runc does, when a container is created and when its limits are updated. A limit that
//! cgroup v2 or the guest does not have is refused by name, and so is an invalid value. Zero means
//! "unchanged", which clients send for limits that they do not change, or "no limit" when the container is
//! created.

use machinen_base::error::{ErrorKind, HasKind};
use machinen_protocol::api::CgroupFile;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};

use super::{cpus, json};

mod current;

pub use current::CurrentLimits;

/// The kernel's default period, microseconds. It applies to a quota without a period.
const PERIOD: u64 = 100_000;

/// Why limits are refused before the guest receives them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResourcesError {
    /// The limit is not supported.
    #[error("linux.resources.{field} is not supported: {reason}")]
    Unsupported {
        /// The field.
        field: &'static str,
        /// Why the limit is not supported.
        reason: &'static str,
    },
    /// The limit's value is not valid.
    #[error("linux.resources.{field} has the value {value}; it takes {expected}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// The value.
        value: String,
        /// What values are valid.
        expected: &'static str,
    },
    /// The limit, together with those of the pod's other containers, is larger than the VM's memory.
    #[error(
        "linux.resources.memory.limit is {mib} MiB{}, but the VM has {vm_mib} MiB and cannot grow: \
         create the pod with that limit, with the annotation io.machinen.memory-ceiling, or with a larger \
         vm.growth_percent in the configuration", others_text(*.others_mib)
    )]
    BeyondVm {
        /// The limit, MiB.
        mib: u64,
        /// The sum of the limits of the pod's other containers, MiB.
        others_mib: u64,
        /// The VM's memory, MiB.
        vm_mib: u32,
    },
    /// The limit is a larger part of a CPU than the VM has.
    #[error(
        "linux.resources.cpu.quota is {quota} of {period}, but the VM has {vcpus} CPUs and gets no more: create \
         the pod with that limit, with the annotation io.machinen.vcpus, or with another vm.vcpus or \
         vm.growth_percent in the configuration"
    )]
    BeyondVcpus {
        /// Microseconds in each period.
        quota: u64,
        /// Microseconds.
        period: u64,
        /// The VM's virtual CPUs.
        vcpus: u32,
    },
    /// The container uses more memory than the new limit.
    #[error(
        "linux.resources.memory.limit is {limit} bytes, but the container uses {used}, and checkBeforeUpdate \
         refuses a lower limit"
    )]
    InUse {
        /// The new limit, bytes.
        limit: u64,
        /// Memory that the container uses, bytes.
        used: u64,
    },
    /// The container uses more memory that cannot be reclaimed than the new limit.
    #[error(
        "linux.resources.memory.limit is {limit} bytes, but the container uses {used} that cannot be reclaimed: \
         the kernel would end its processes; stop the container first, or choose a higher limit"
    )]
    Unreclaimable {
        /// The new limit, bytes.
        limit: u64,
        /// Memory that the kernel cannot take from the container, bytes.
        used: u64,
    },
}

fn others_text(mib: u64) -> String {
    if mib > 0 { format!(", with {mib} MiB of the pod's other containers") } else { String::new() }
}

impl HasKind for ResourcesError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Unsupported { .. } => ErrorKind::Unimplemented,
            Self::Invalid { .. } => ErrorKind::InvalidArgument,
            Self::BeyondVm { .. }
            | Self::BeyondVcpus { .. }
            | Self::InUse { .. }
            | Self::Unreclaimable { .. } => ErrorKind::FailedPrecondition,
        }
    }
}

/// Parses the runtime-spec's LinuxResources.
///
/// # Errors
/// The text is not a valid LinuxResources.
pub fn parse(text: &[u8]) -> Result<LinuxResources, serde_json::Error> {
    let mut value: serde_json::Value = serde_json::from_slice(text)?;
    json::resources(&mut value);
    // Null changes no limit.
    if value.is_array() {
        // A list would be taken for the members in their order.
        return Err(serde::de::Error::custom("the resources are a list, not an object"));
    }
    serde_json::from_value::<Option<LinuxResources>>(value).map(Option::unwrap_or_default)
}

/// Prepares the limits of a new container for the guest: removes values that mean "no limit".
///
/// # Errors
/// A limit is invalid or not supported.
pub fn for_creation(resources: &mut LinuxResources) -> Result<(), ResourcesError> {
    if let Some(memory) = resources.memory().filter(|memory| memory.check_before_update().is_some()) {
        let mut memory = memory;
        // A new container uses no memory yet that a limit could be compared with.
        memory.set_check_before_update(None);
        resources.set_memory(Some(memory));
    }
    ignore_kernel_memory(resources);
    let none = CurrentLimits { vcpus: 1, ..CurrentLimits::default() };
    writes(resources, none)?;
    unset_zeros(resources);
    Ok(())
}

/// Removes limits of kernel memory with a warning, as runc does, because the kernel no longer has them.
fn ignore_kernel_memory(resources: &mut LinuxResources) {
    let Some(mut memory) = *resources.memory() else { return };
    if memory.kernel().is_some_and(|limit| limit > 0) || memory.kernel_tcp().is_some_and(|limit| limit > 0) {
        tracing::warn!("limits of kernel memory are ignored: cgroup v2 counts it as part of memory.limit");
    }
    memory.set_kernel(None);
    memory.set_kernel_tcp(None);
    resources.set_memory(Some(memory));
}

/// Removes zeros, which the guest's engine would read as limits.
fn unset_zeros(resources: &mut LinuxResources) {
    if let Some(mut memory) = *resources.memory() {
        memory.set_limit(memory.limit().filter(|&limit| limit != 0));
        memory.set_reservation(memory.reservation().filter(|&reservation| reservation != 0));
        memory.set_swap(memory.swap().filter(|&swap| swap != 0));
        resources.set_memory(Some(memory));
    }
    if let Some(mut cpu) = resources.cpu().clone() {
        cpu.set_shares(cpu.shares().filter(|&shares| shares != 0));
        cpu.set_quota(cpu.quota().filter(|&quota| quota != 0));
        cpu.set_period(cpu.period().filter(|&period| period != 0));
        cpu.set_burst(cpu.burst().filter(|&burst| burst != 0));
        cpu.set_idle(cpu.idle().filter(|&idle| idle != 0));
        cpu.set_realtime_runtime(None);
        cpu.set_realtime_period(None);
        resources.set_cpu(Some(cpu));
    }
    if resources.pids().as_ref().is_some_and(|pids| pids.limit() == 0) {
        resources.set_pids(None);
    }
    if let Some(mut all) = resources.hugepage_limits().clone() {
        all.retain(|hugepages| hugepages.limit() != 0);
        resources.set_hugepage_limits(Some(all));
    }
}

/// Returns the cgroup files to write, in this order.
///
/// # Errors
/// A limit is invalid or not supported.
pub fn writes(resources: &LinuxResources, now: CurrentLimits<'_>) -> Result<Vec<CgroupFile>, ResourcesError> {
    let mut writes = Writes::default();
    // Rules of devices are ignored, as runc does, because clients send them with every update.
    if let Some(memory) = resources.memory() {
        writes.memory(memory, now)?;
    }
    if let Some(cpu) = resources.cpu() {
        writes.cpu(cpu, now)?;
    }
    if let Some(limit) = resources.pids().as_ref().map(|pids| pids.limit()).filter(|&limit| limit != 0) {
        writes.add("pids.max", limit_text(limit));
    }
    if let Some(block_io) = resources.block_io() {
        writes.block_io(block_io)?;
    }
    for hugepages in resources.hugepage_limits().iter().flatten() {
        writes.hugepages(hugepages)?;
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
        let counts = ["cgroup.max.depth", "cgroup.max.descendants"].contains(&name.as_str());
        if (name.starts_with("cgroup.") && !counts) || name.contains('/') || !name.contains('.') {
            return Err(invalid("unified", name, "names of a controller's files, such as memory.high"));
        }
        let is_set = cpus::CPU_FILES.contains(&name.as_str()) || name == cpus::NODE_FILE;
        let content = match cpus::set("unified", Some(value).filter(|_| is_set).map(String::as_str))? {
            Some(_) => cpus::file_in_guest(name, value, now.vcpus).unwrap_or_default(),
            // The kernel ignores a write of zero bytes.
            None if is_set => "\n".to_owned(),
            None => value.clone(),
        };
        writes.add(name, content);
    }
    Ok(writes.0)
}

#[derive(Debug, Default)]
struct Writes(Vec<CgroupFile>);

impl Writes {
    fn add(&mut self, name: &str, content: String) {
        self.0.push(CgroupFile { name: name.to_owned(), content, ..Default::default() });
    }

    fn memory(&mut self, memory: &LinuxMemory, now: CurrentLimits<'_>) -> Result<(), ResourcesError> {
        let set = |value: Option<i64>| value.filter(|&value| value != 0);
        let limit = set(memory.limit());
        if set(memory.kernel()).is_some_and(|kernel| kernel > 0) {
            return Err(unsupported("memory.kernel", "cgroup v2 counts it as part of memory.limit"));
        }
        if set(memory.kernel_tcp()).is_some_and(|kernel| kernel > 0) {
            return Err(unsupported("memory.kernelTCP", "cgroup v2 counts it as part of memory.limit"));
        }
        if memory.swappiness().is_some_and(|swappiness| swappiness != 0) {
            return Err(unsupported("memory.swappiness", "cgroup v2 has no such limit"));
        }
        if memory.disable_oom_killer() == Some(true) {
            return Err(unsupported("memory.disableOOMKiller", "cgroup v2 has no such switch"));
        }
        if let Some(swap) = set(memory.swap()) {
            // The runtime-spec's value is the sum of memory and swap.
            let swap = match (swap, limit) {
                (..0, _) => -1,
                (_, None | Some(..0)) => {
                    return Err(invalid("memory.swap", swap, "a value only together with memory.limit"));
                }
                (swap, Some(limit)) if swap < limit => {
                    return Err(invalid(
                        "memory.swap",
                        swap,
                        "at least memory.limit, because it is the sum of memory and swap",
                    ));
                }
                (swap, Some(limit)) => swap - limit,
            };
            self.add("memory.swap.max", limit_text(swap));
        }
        if let Some(limit) = limit {
            if let Ok(bytes) = u64::try_from(limit) {
                now.check_memory(bytes, memory.check_before_update() == Some(true))?;
            }
            self.add("memory.max", limit_text(limit));
        }
        if let Some(reservation) = set(memory.reservation()) {
            self.add("memory.low", limit_text(reservation));
        }
        Ok(())
    }

    fn cpu(&mut self, cpu: &LinuxCpu, now: CurrentLimits<'_>) -> Result<(), ResourcesError> {
        if cpu.realtime_runtime().is_some_and(|runtime| runtime != 0)
            || cpu.realtime_period().is_some_and(|period| period != 0)
        {
            return Err(unsupported("cpu.realtimeRuntime", "cgroup v2 has no real-time share"));
        }
        let idle = match cpu.idle() {
            None | Some(0 | 1) => cpu.idle(),
            Some(idle) => return Err(invalid("cpu.idle", idle, "0 or 1")),
        };
        if idle == Some(0) {
            // The weight of an idle cgroup cannot be set.
            self.add("cpu.idle", "0".to_owned());
        }
        if let Some(shares) = cpu.shares().filter(|&shares| shares != 0) {
            self.add("cpu.weight", weight_of_shares(shares).to_string());
        }
        if idle == Some(1) {
            self.add("cpu.idle", "1".to_owned());
        }
        self.bandwidth(cpu, now)?;
        if let Some(set) = cpus::of(cpu)? {
            self.add(cpus::CPU_FILES[0], set.in_guest(now.vcpus).to_string());
        }
        if cpus::set("cpu.mems", cpu.mems().as_deref())?.is_some() {
            // The guest has one node.
            self.add(cpus::NODE_FILE, "0".to_owned());
        }
        Ok(())
    }

    fn bandwidth(&mut self, cpu: &LinuxCpu, now: CurrentLimits<'_>) -> Result<(), ResourcesError> {
        let quota = cpu.quota().filter(|&quota| quota != 0);
        let period = cpu.period().filter(|&period| period != 0);
        // The kernel refuses a burst above the quota, in whichever order they are written, so it is reset
        // first.
        let changes = quota.is_some() || period.is_some();
        if cpu.burst().is_some_and(|burst| burst == 0 || changes) {
            self.add("cpu.max.burst", "0".to_owned());
        }
        if changes {
            let (old_quota, old_period) = now.cpu_max.trim_end().split_once(' ').unwrap_or(("max", ""));
            let quota = quota.map_or_else(|| old_quota.to_owned(), limit_text);
            let period = period.or_else(|| old_period.parse().ok()).unwrap_or(PERIOD);
            now.check_quota(&quota, period)?;
            self.add("cpu.max", format!("{quota} {period}"));
        }
        if let Some(burst) = cpu.burst().filter(|&burst| burst != 0) {
            self.add("cpu.max.burst", burst.to_string());
        }
        Ok(())
    }

    /// Whether the guest has pages of this size is found when the files are written.
    fn hugepages(&mut self, hugepages: &LinuxHugepageLimit) -> Result<(), ResourcesError> {
        let size = hugepages.page_size();
        let digits = size.strip_suffix("KB").or(size.strip_suffix("MB")).or(size.strip_suffix("GB"));
        if !digits
            .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()))
        {
            return Err(invalid("hugepageLimits.pageSize", size, "a size such as 2MB or 1GB"));
        }
        if hugepages.limit() != 0 {
            for file in ["max", "rsvd.max"] {
                self.add(&format!("hugetlb.{size}.{file}"), limit_text(hugepages.limit()));
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
            return Err(unsupported("blockIO.leafWeight", "cgroup v2 has no such limit"));
        }
        if let Some(weight) = block_io.weight().filter(|&weight| weight != 0) {
            if !(10..=1000).contains(&weight) {
                return Err(invalid("blockIO.weight", weight, "10 to 1000"));
            }
            // OCI's weights of 10 to 1000 correspond to the kernel's 1 to 10000.
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

/// A negative limit means no limit.
fn limit_text(limit: i64) -> String {
    if limit < 0 { "max".to_owned() } else { limit.to_string() }
}

/// cgroup v2's weight (1 to 10000, default 100) for v1's shares (2 to 262144, default 1024). The minimum,
/// default and maximum correspond (the rule that runc uses since 1.3.2; crun and youki have it too).
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
mod tests;
