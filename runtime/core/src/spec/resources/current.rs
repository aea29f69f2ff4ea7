//! Compares wanted limits with those that hold, with what the container uses, and with what its VM has.

use super::{PERIOD, ResourcesError};

/// The state of the cgroup before an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CurrentLimits<'a> {
    /// Content of cpu.max: quota and period.
    pub cpu_max: &'a str,
    /// Content of memory.max.
    pub memory_max: &'a str,
    /// Content of memory.current.
    pub memory_current: &'a str,
    /// Content of memory.stat.
    pub memory_stat: &'a str,
    /// The sum of the limits of memory of the pod's other containers, bytes.
    pub others_memory: u64,
    /// Zero if there is no VM yet.
    pub vm_memory_mib: u32,
    /// Number of the VM's virtual CPUs.
    pub vcpus: u32,
}

impl CurrentLimits<'_> {
    /// Checks a limit of memory, bytes. `strict`: page cache and other memory that can be reclaimed counts too.
    ///
    /// Clients repeat limits that they do not change, and a container may keep the limit that it was created with.
    pub(super) fn check_memory(&self, bytes: u64, strict: bool) -> Result<(), ResourcesError> {
        let old = self.memory_max.trim_end().parse::<u64>().ok();
        let vm = u64::from(self.vm_memory_mib) << 20;
        // A container without a limit shares all of the VM's memory already.
        let others = if old.is_some() { self.others_memory } else { 0 };
        if vm > 0 && old.is_none_or(|old| bytes > old) && bytes.saturating_add(others) > vm {
            let (mib, others_mib) = (bytes >> 20, others >> 20);
            return Err(ResourcesError::BeyondVm { mib, others_mib, vm_mib: self.vm_memory_mib });
        }
        match self.memory_current.trim_end().parse() {
            Ok(used) if strict && bytes < used => return Err(ResourcesError::InUse { limit: bytes, used }),
            _ => {}
        }
        let used = unreclaimable(self.memory_stat);
        if bytes < used {
            return Err(ResourcesError::Unreclaimable { limit: bytes, used });
        }
        Ok(())
    }

    /// Checks that a quota that grows is not beyond the VM's CPUs.
    pub(super) fn check_quota(&self, quota: &str, period: u64) -> Result<(), ResourcesError> {
        let (old_quota, old_period) = self.cpu_max.trim_end().split_once(' ').unwrap_or(("max", ""));
        let (Ok(quota), Ok(old_quota)) = (quota.parse::<u64>(), old_quota.parse::<u64>()) else {
            return Ok(());
        };
        let old_period = old_period.parse::<u64>().unwrap_or(PERIOD);
        let grows = u128::from(quota) * u128::from(old_period) > u128::from(old_quota) * u128::from(period);
        if grows && quota.div_ceil(period) > u64::from(self.vcpus) {
            return Err(ResourcesError::BeyondVcpus { quota, period, vcpus: self.vcpus });
        }
        Ok(())
    }
}

/// The memory of a cgroup that the kernel cannot reclaim without swap, bytes, by its memory.stat: the VM has no swap.
fn unreclaimable(stat: &str) -> u64 {
    const KINDS: [&str; 5] = ["anon", "shmem", "kernel_stack", "pagetables", "slab_unreclaimable"];
    let lines = stat.lines().filter_map(|line| line.split_once(' '));
    lines
        .filter(|(name, _)| KINDS.contains(name))
        .filter_map(|(_, bytes)| bytes.parse::<u64>().ok())
        .fold(0, u64::saturating_add)
}
