//! What the limits of a pod's containers allow its processes on the host.
//!
//! The guest enforces the limits of each container. The host enforces their sum on the shim and the VM together, with
//! an allowance for what these need themselves, so that a guest that ignores the limits is bounded by them too.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};

use crate::spec::cpus::{self, CpuSet};

/// The period of the host's CPU quota, microseconds: the kernel's default.
pub(super) const PERIOD: u64 = 100_000;

/// CPU time of the shim and the VMM, in each period, in addition to the containers' quotas: a quarter of one CPU.
const CPU_ALLOWANCE: u64 = PERIOD / 4;

/// The kernel refuses smaller quotas (sched-bwc.rst), microseconds.
const LEAST_QUOTA: u64 = 1_000;

/// Most threads and processes of a pod on the host: up to 512 threads of the shim for blocking calls, up to 64 of each
/// of QEMU's pool and its virtual CPUs, the helpers, and the anchors. Those of the containers are in the guest.
const TASKS: i64 = 1024;

/// Weight of a container that has none (runtime-spec and kernel).
const SHARES: u64 = 1024;
/// The largest weight that the kernel takes.
const MOST_SHARES: u64 = 262_144;

/// The limits of one container that matter to the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ContainerLimits {
    /// Bytes.
    memory: Option<u64>,
    /// Memory and swap together, bytes.
    memory_and_swap: Option<u64>,
    /// Microseconds of CPU time in each period.
    quota: Option<u64>,
    /// Microseconds; the kernel's default if it is not given.
    period: Option<u64>,
    shares: Option<u64>,
    has_pids_limit: bool,
    cpus: Option<CpuSet>,
}

impl ContainerLimits {
    /// The limits of a new container.
    pub(super) fn of(resources: Option<&LinuxResources>) -> Self {
        resources.map(|resources| Self::default().updated(resources)).unwrap_or_default()
    }

    /// Bytes.
    pub(super) fn memory(&self) -> Option<u64> {
        self.memory
    }

    /// These limits after an update. Zero means "unchanged" and a negative value "no limit". Values that are not valid
    /// were refused before.
    pub(super) fn updated(&self, change: &LinuxResources) -> Self {
        let mut limits = self.clone();
        if let Some(memory) = change.memory() {
            set(&mut limits.memory, memory.limit());
            set(&mut limits.memory_and_swap, memory.swap());
        }
        if let Some(cpu) = change.cpu() {
            set(&mut limits.quota, cpu.quota());
            limits.period = cpu.period().filter(|&period| period != 0).or(limits.period);
            limits.shares = cpu.shares().filter(|&shares| shares != 0).or(limits.shares);
            limits.cpus = cpus::of(cpu).ok().flatten().or(limits.cpus);
        }
        if let Some(limit) = change.pids().as_ref().map(LinuxPids::limit).filter(|&limit| limit != 0) {
            limits.has_pids_limit = limit > 0;
        }
        for (name, content) in change.unified().iter().flatten() {
            limits.set_file(name, content.trim());
        }
        limits
    }

    /// Takes over a limit that is given as a file of cgroup v2.
    fn set_file(&mut self, name: &str, content: &str) {
        let number = |text: &str| text.parse::<u64>().ok();
        match name {
            "memory.max" => self.memory = number(content),
            "cpu.max" => {
                let (quota, period) = content.split_once(' ').unwrap_or((content, ""));
                self.quota = number(quota);
                self.period = number(period).filter(|&period| period > 0).or(self.period);
            }
            "pids.max" => self.has_pids_limit = number(content).is_some(),
            "cpuset.cpus" => self.cpus = CpuSet::parse(content),
            _ => {}
        }
    }

    /// Microseconds of CPU time in each period of the host's quota.
    fn host_quota(&self) -> Option<u64> {
        let period = self.period.unwrap_or(PERIOD);
        self.quota.map(|quota| {
            let scaled = u128::from(quota) * u128::from(PERIOD) / u128::from(period);
            u64::try_from(scaled).unwrap_or(u64::MAX)
        })
    }
}

fn set(limit: &mut Option<u64>, wanted: Option<i64>) {
    if let Some(wanted) = wanted.filter(|&wanted| wanted != 0) {
        *limit = u64::try_from(wanted).ok();
    }
}

/// What the pod's VMs take of the host's memory in addition to the containers' limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct VmNeeds {
    /// Of each VM with the shim, bytes.
    pub(super) overhead: u64,
    /// VMs at the same time.
    pub(super) vms: u64,
    /// Whether they are clones of a template. For each page that the template does not have and that a clone writes to,
    /// the kernel adds a page to the template's memory, and the first clone that does so is charged for it.
    pub(super) are_clones: bool,
}

/// The limits of a pod's cgroup on the host. None: there is no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct HostLimits {
    /// Bytes.
    pub(super) memory: Option<u64>,
    /// Memory and swap together, bytes.
    memory_and_swap: Option<u64>,
    /// Microseconds of CPU time in each 100 ms.
    quota: Option<u64>,
    shares: Option<u64>,
    has_pids_limit: bool,
    cpus: Option<CpuSet>,
}

impl HostLimits {
    /// The sum of the containers' limits, and what the VMs need. There is no limit of a kind that one of the
    /// containers does not have.
    pub(super) fn of(containers: &[&ContainerLimits], needs: VmNeeds) -> Self {
        let sum = |limit: fn(&ContainerLimits) -> Option<u64>| {
            let sum = |sum: u64, next: &&ContainerLimits| limit(next).map(|limit| sum.saturating_add(limit));
            containers.iter().try_fold(0, sum).filter(|_| !containers.is_empty())
        };
        let copies = if needs.are_clones { 2 } else { 1 };
        let of_one = |sum: u64| sum.saturating_mul(copies).saturating_add(needs.overhead);
        let memory = |limit| sum(limit).map(|sum| of_one(sum).saturating_mul(needs.vms));
        let quota = sum(ContainerLimits::host_quota);
        let any_shares = containers.iter().any(|container| container.shares.is_some());
        let shares = sum(|container| Some(container.shares.unwrap_or(SHARES)));
        let sets = containers.iter().map(|container| container.cpus.clone());
        Self {
            memory: memory(|container| container.memory),
            memory_and_swap: memory(|container| container.memory_and_swap),
            quota: quota.map(|quota| quota.saturating_add(CPU_ALLOWANCE).max(LEAST_QUOTA)),
            shares: shares.filter(|_| any_shares).map(|shares| shares.min(MOST_SHARES)),
            has_pids_limit: !containers.is_empty()
                && containers.iter().all(|container| container.has_pids_limit),
            cpus: sets.reduce(|one, other| Some(one?.union(other?))).flatten(),
        }
    }

    /// These limits, or the others' where those allow more.
    pub(super) fn or_more(&self, other: &Self) -> Self {
        let more = |one: Option<u64>, other: Option<u64>| one.zip(other).map(|(one, other)| one.max(other));
        Self {
            memory: more(self.memory, other.memory),
            memory_and_swap: more(self.memory_and_swap, other.memory_and_swap),
            quota: more(self.quota, other.quota),
            shares: self.shares.max(other.shares),
            has_pids_limit: self.has_pids_limit && other.has_pids_limit,
            cpus: self.cpus.clone().zip(other.cpus.clone()).map(|(one, other)| one.union(other)),
        }
    }

    /// These limits, with a limit of memory of at least `room` bytes.
    pub(super) fn with_room(mut self, room: u64) -> Self {
        self.memory = self.memory.map(|limit| limit.max(room));
        // The kernel refuses a sum of memory and swap that is below the limit of memory.
        self.memory_and_swap = self.memory_and_swap.map(|limit| limit.max(self.memory.unwrap_or(0)));
        self
    }

    /// What to write to a cgroup that has the limits `before`, on a host that has the CPUs `online`. None: nothing.
    ///
    /// A limit that is removed is written as the largest value, because not every kernel has every file of libcgroups'
    /// own value for it.
    pub(super) fn changes(&self, before: &Self, online: &CpuSet) -> Option<LinuxResources> {
        if self == before {
            return None;
        }
        let mut resources = LinuxResources::default();
        resources.set_devices(None);
        if (self.memory, self.memory_and_swap) != (before.memory, before.memory_and_swap) {
            let mut memory = LinuxMemory::default();
            memory.set_limit(Some(self.memory.map_or(i64::MAX, bytes)));
            if self.memory_and_swap != before.memory_and_swap {
                memory.set_swap(Some(self.memory_and_swap.map_or(i64::MAX, bytes)));
            }
            resources.set_memory(Some(memory));
        }
        let mut cpu = LinuxCpu::default();
        if self.quota != before.quota {
            cpu.set_quota(Some(self.quota.map_or(-1, bytes)));
            cpu.set_period(Some(PERIOD));
        }
        if self.shares != before.shares {
            cpu.set_shares(Some(self.shares.unwrap_or(SHARES)));
        }
        if self.cpus != before.cpus {
            let usable = self.cpus.as_ref().and_then(|cpus| cpus.intersection(online));
            cpu.set_cpus(Some(usable.as_ref().unwrap_or(online).to_string()));
        }
        resources.set_cpu(Some(cpu).filter(|cpu| *cpu != LinuxCpu::default()));
        if self.has_pids_limit != before.has_pids_limit {
            let mut pids = LinuxPids::default();
            pids.set_limit(if self.has_pids_limit { TASKS } else { -1 });
            resources.set_pids(Some(pids));
        }
        Some(resources)
    }
}

fn bytes(limit: u64) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn limits(value: serde_json::Value) -> ContainerLimits {
        let resources = crate::spec::resources::parse(value.to_string().as_bytes()).unwrap();
        ContainerLimits::of(Some(&resources))
    }

    fn memory_of(containers: &[&ContainerLimits], vms: u64) -> Option<u64> {
        HostLimits::of(containers, needs(100 * MIB, vms)).memory
    }

    fn needs(overhead: u64, vms: u64) -> VmNeeds {
        VmNeeds { overhead, vms, are_clones: false }
    }

    #[test]
    fn memory_is_the_sum_and_the_overhead() {
        let one = limits(json!({"memory": {"limit": 64 * MIB}}));
        let two = limits(json!({"unified": {"memory.max": "1048576"}}));
        let none = limits(json!({"memory": {"limit": -1}, "unified": {"memory.max": "max"}}));
        assert_eq!(memory_of(&[&one], 1), Some(164 * MIB));
        assert_eq!(memory_of(&[&one, &two], 1), Some(165 * MIB));
        assert_eq!(memory_of(&[&one], 2), Some(328 * MIB));
        let clones = VmNeeds { are_clones: true, ..needs(100 * MIB, 1) };
        assert_eq!(HostLimits::of(&[&one, &two], clones).memory, Some(230 * MIB));
        assert_eq!(memory_of(&[&one, &none], 1), None);
        assert_eq!(memory_of(&[], 1), None);
        let most = limits(json!({"memory": {"limit": i64::MAX}}));
        assert!(memory_of(&[&most, &most, &most], 2).is_some());
    }

    #[test]
    fn without_limits_there_is_nothing_to_write() {
        let none = HostLimits::default();
        let host = HostLimits::of(&[&ContainerLimits::of(None), &limits(json!({}))], needs(MIB, 1));
        assert_eq!(host, none);
        assert_eq!(host.changes(&none, &CpuSet::parse("0-3").unwrap()), None);
        let zeros = json!({"memory": {"limit": 0, "swap": 0}, "cpu": {"shares": 0, "quota": 0}, "pids": {"limit": 0}});
        assert_eq!(limits(zeros), ContainerLimits::default());
    }

    #[test]
    fn each_limit_is_written_with_its_allowance() {
        let one = limits(json!({
            "memory": {"limit": 64 * MIB, "swap": 80 * MIB},
            "cpu": {"quota": 20_000, "period": 200_000, "shares": 512, "cpus": "1-2,9"},
            "pids": {"limit": 10},
        }));
        let online = CpuSet::parse("0-3").unwrap();
        let host = HostLimits::of(&[&one], needs(100 * MIB, 1));
        let written = host.changes(&HostLimits::default(), &online).unwrap();
        let memory = written.memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(164 << 20), Some(180 << 20)));
        let cpu = written.cpu().clone().unwrap();
        assert_eq!(
            (cpu.quota(), cpu.period(), cpu.shares()),
            (Some(10_000 + 25_000), Some(100_000), Some(512))
        );
        assert_eq!(cpu.cpus().as_deref(), Some("1-2"));
        assert_eq!(written.pids().as_ref().map(LinuxPids::limit), Some(1024));
        assert_eq!(*written.devices(), None);

        let removed = HostLimits::default().changes(&host, &online).unwrap();
        assert_eq!(removed.memory().unwrap().limit(), Some(i64::MAX));
        let cpu = removed.cpu().clone().unwrap();
        assert_eq!((cpu.quota(), cpu.shares(), cpu.cpus().as_deref()), (Some(-1), Some(1024), Some("0-3")));
        assert_eq!(removed.pids().as_ref().map(LinuxPids::limit), Some(-1));
    }

    #[test]
    fn cpus_that_the_host_does_not_have_are_left_out() {
        let far = limits(json!({"cpu": {"cpus": "77"}}));
        let host = HostLimits::of(&[&far], needs(0, 1));
        let written = host.changes(&HostLimits::default(), &CpuSet::parse("0-1").unwrap()).unwrap();
        assert_eq!(written.cpu().clone().unwrap().cpus().as_deref(), Some("0-1"));
        let near = limits(json!({"cpu": {"cpus": "1"}}));
        assert_eq!(HostLimits::of(&[&near, &far], needs(0, 1)).cpus, CpuSet::parse("1,77"));
        assert_eq!(HostLimits::of(&[&near, &limits(json!({}))], needs(0, 1)).cpus, None);
    }

    #[test]
    fn an_update_changes_only_what_it_names() {
        let before = limits(json!({"memory": {"limit": MIB}, "cpu": {"quota": 5_000, "period": 10_000}}));
        let change = |value: serde_json::Value| {
            before.updated(&crate::spec::resources::parse(value.to_string().as_bytes()).unwrap())
        };
        assert_eq!(change(json!({"memory": {"limit": 0}, "cpu": {"quota": 0}})), before);
        assert_eq!(change(json!({"memory": {"limit": -1}})).memory, None);
        assert_eq!(change(json!({"cpu": {"period": 20_000}})).host_quota(), Some(25_000));
        assert_eq!(change(json!({"unified": {"cpu.max": "max 1"}})).host_quota(), None);
        assert_eq!(change(json!({"pids": {"limit": 5}})).memory, Some(MIB));
    }

    #[test]
    fn while_limits_change_the_wider_ones_hold() {
        let host = |value| HostLimits::of(&[&limits(value)], needs(MIB, 1));
        let (low, high) = (
            host(json!({"memory": {"limit": MIB}, "cpu": {"quota": 90_000, "cpus": "0"}})),
            host(json!({"memory": {"limit": 9 * MIB}, "cpu": {"quota": 10_000, "cpus": "1"}})),
        );
        let both = low.or_more(&high);
        assert_eq!((both.memory, both.quota), (Some(10 * MIB), Some(115_000)));
        assert_eq!(both.cpus, CpuSet::parse("0-1"));
        assert_eq!(low.or_more(&HostLimits::default()), HostLimits::default());
    }
}
