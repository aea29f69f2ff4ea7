//! Decides what VM a pod gets, from the configuration, this host, and the limits of the pod's first
//! container.

use std::{fs::File, io, num::NonZero, path::Path, thread, time::Duration};

use machinen_base::{
    fs::{FileError, hex},
    owner,
    process::twins_are_possible,
    sys::tap,
};
use machinen_vm::{
    ChannelKind, HostSupport, TRANSLATED_CODE_MIB, VmSpec,
    accel::{self, AccelError, AccelMode, Accelerator},
    admission::HostMemory,
    assets::Assets,
    choose_channel, try_vhost,
};
use oci_spec::runtime::Spec;
use sha2::{Digest as _, Sha256};

use crate::{
    config::{Config, VmConfig},
    spec::MAX_HOSTNAME,
};

/// Bounds of the default memory ceiling, MiB. Memory that is never used still costs something: the guest's
/// kernel touches 16 MiB for each GiB when it boots, which also takes tens of milliseconds under TCG.
const LEAST_MEMORY: u32 = 512;
const MOST_MEMORY: u32 = 2048;

/// Memory for the guest's kernel and agent, in addition to a container's limit, MiB.
const GUEST_OVERHEAD: u32 = 128;

const MOST_VCPUS: u32 = 8;

/// The limits of a whole pod, which containerd's CRI plugin notes at its sandbox (pkg/cri/annotations): bytes, and
/// microseconds.
const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const POD_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// Memory on the host that an honest VM takes in addition to its containers' limits, MiB: the shim, QEMU, and the
/// guest's kernel and agent. Emulation also keeps the code that it has translated.
const HOST_OVERHEAD: u32 = 160;
const HOST_OVERHEAD_TCG: u32 = HOST_OVERHEAD + TRANSLATED_CODE_MIB;

/// The guest's kernel describes each page of its memory, which takes a sixty-fourth of it.
const PAGE_DESCRIPTIONS: u32 = 64;

/// Describes the VM of the pod `name` in containerd's namespace `namespace`, whose first container has these limits.
///
/// Blocks. The first call after a boot of the host tries KVM, which takes some time.
///
/// # Errors
/// The configured accelerator does not work here.
pub(super) fn build(
    (name, namespace): (&str, &str),
    config: &Config,
    assets: &Assets,
    limits: ContainerLimits,
    host: HostMemory,
) -> Result<VmSpec, AccelError> {
    let accel = accel::for_vm(owner::run_dir(), config.vm.accel)?;
    let host_cpus = thread::available_parallelism().map_or(1, NonZero::get);
    let grown = limits.grown(config.vm.growth_percent);
    let (kernel, kernel_digest) = match config.vm.accel {
        AccelMode::Pvm => {
            let digest = digest(&config.vm.pvm_kernel).map_err(AccelError::PvmKernel)?;
            (config.vm.pvm_kernel.clone(), digest)
        }
        AccelMode::Auto | AccelMode::Kvm | AccelMode::Tcg => (assets.kernel.clone(), String::new()),
    };
    let nics = if tap::is_usable() { config.vm.network_devices } else { 0 };
    let channel =
        choose_channel(config.vm.channel, accel, &HostSupport::detect(&config.vm.vhost_device_vsock));
    let can_have_twins = matches!(accel, Accelerator::Tcg { .. }) && channel == ChannelKind::Serial;
    Ok(VmSpec {
        id: name.to_owned(),
        qemu: config.vm.qemu.clone(),
        accel,
        cpu: config.vm.cpu.clone(),
        nested_kvm: config.vm.nested_kvm,
        pmu: config.vm.pmu,
        memory_mib: memory_mib(
            config.vm.memory_mib,
            u32::try_from(host.total).unwrap_or(u32::MAX),
            limits.memory_mib,
            grown.memory_mib,
        ),
        vcpus: vcpus(config.vm.vcpus, accel, host_cpus, grown.cpus),
        kernel,
        kernel_digest,
        image: assets.image.clone(),
        kernel_args: config.vm.all_kernel_args(),
        channel,
        nics,
        vhost_nics: vhost_nics(config.vm.vhost_net_devices, accel, nics, try_vhost),
        twins: config.template.twins && can_have_twins && twins_are_possible(),
        hostname: name.chars().filter(char::is_ascii).take(MAX_HOSTNAME).collect(),
        boot_timeout: Duration::from_secs(config.vm.boot_timeout_s),
        qemu_files: config.vm.qemu_files.clone(),
        tenant: if config.template.per_namespace { namespace.to_owned() } else { String::new() },
        keep_console: true,
    })
}

/// The SHA-256 of a file, in hexadecimal digits.
fn digest(path: &Path) -> Result<String, FileError> {
    let mut hasher = Sha256::new();
    File::open(path)
        .and_then(|mut file| io::copy(&mut file, &mut hasher))
        .map_err(FileError::at("read", path))?;
    Ok(hex(&hasher.finalize()))
}

/// Memory of a pod on the host in addition to its containers' limits, MiB.
pub(in crate::pod) fn host_overhead_mib(config: &VmConfig, spec: &VmSpec) -> u64 {
    let fixed = match (config.memory_overhead_mib, spec.accel) {
        (0, Accelerator::Kvm) => HOST_OVERHEAD,
        (0, Accelerator::Tcg { .. }) => HOST_OVERHEAD_TCG,
        (configured, _) => configured,
    };
    u64::from(fixed) + u64::from(spec.memory_mib / PAGE_DESCRIPTIONS)
}

/// The part of a container's own limits that decides the size of its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::pod) struct ContainerLimits {
    memory_mib: Option<u32>,
    /// Rounded up to whole CPUs.
    cpus: Option<u32>,
    /// They are the limits of a whole pod, which Kubernetes may raise while it runs.
    may_grow: bool,
}

impl ContainerLimits {
    pub(in crate::pod) fn of(container: &Spec) -> Self {
        let resources = container.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let of_pod = |name: &str| container.annotations().as_ref()?.get(name)?.parse::<i64>().ok();
        let memory = of_pod(POD_MEMORY).or_else(|| resources?.memory().as_ref()?.limit());
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        let quota = of_pod(POD_CPU_QUOTA).or_else(|| cpu?.quota()).filter(|&quota| quota > 0);
        let period = of_pod(POD_CPU_PERIOD).and_then(|period| u64::try_from(period).ok());
        let period = period.or_else(|| cpu?.period()).filter(|&period| period > 0).unwrap_or(100_000);
        Self {
            memory_mib: memory
                .filter(|&bytes| bytes > 0)
                .map(|bytes| u32::try_from((bytes as u64).div_ceil(1 << 20)).unwrap_or(u32::MAX)),
            cpus: quota.map(|quota| u32::try_from((quota as u64).div_ceil(period)).unwrap_or(u32::MAX)),
            may_grow: of_pod(POD_MEMORY).is_some() || of_pod(POD_CPU_QUOTA).is_some(),
        }
    }

    /// The limits that the VM must have room for: a VM cannot be enlarged while it runs.
    fn grown(self, percent: u32) -> Self {
        let percent = if self.may_grow { u64::from(percent) } else { 0 };
        let grow = |limit: u32| {
            let grown = u64::from(limit).saturating_add((u64::from(limit) * percent).div_ceil(100));
            u32::try_from(grown).unwrap_or(u32::MAX)
        };
        Self { memory_mib: self.memory_mib.map(grow), cpus: self.cpus.map(grow), ..self }
    }
}

/// The configured ceiling, or half of the host's memory within bounds; more if the container's limit, or what it may grow
/// to, requires it.
///
/// A size that is not configured is a power of two, because every size of VM needs a template of its own. Limits often are
/// powers of two themselves, so what they may grow to includes the guest's own memory.
fn memory_mib(configured: u32, host: u32, limit: Option<u32>, grown: Option<u32>) -> u32 {
    if configured > 0 {
        return configured;
    }
    let half = (host / 2).clamp(LEAST_MEMORY, MOST_MEMORY);
    let default = 1 << half.ilog2();
    let wanted = limit.map_or(0, |limit| limit.saturating_add(GUEST_OVERHEAD)).max(grown.unwrap_or(0));
    default.max(wanted.checked_next_power_of_two().unwrap_or(u32::MAX).min(host))
}

fn vcpus(configured: u32, accel: Accelerator, host: usize, limit: Option<u32>) -> u32 {
    let wanted = match (configured, accel) {
        (0, Accelerator::Kvm) => u32::try_from(host).unwrap_or(MOST_VCPUS).clamp(1, MOST_VCPUS),
        (0, Accelerator::Tcg { .. }) => 1,
        (configured, _) => configured,
    };
    wanted.min(limit.unwrap_or(u32::MAX)).max(1)
}

/// How many of a VM's network devices the host's kernel serves. An emulated guest is much slower than QEMU.
fn vhost_nics(
    configured: u32,
    accel: Accelerator,
    nics: u32,
    try_vhost: impl FnOnce() -> io::Result<()>,
) -> u32 {
    let wanted = configured.min(nics);
    if wanted == 0 || accel != Accelerator::Kvm {
        return 0;
    }
    match try_vhost() {
        Ok(()) => wanted,
        Err(error) => {
            tracing::info!(
                "QEMU moves the packets of networks, because /dev/vhost-net cannot be opened: {error}"
            );
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxCpuBuilder, LinuxMemoryBuilder, LinuxResourcesBuilder};

    use super::*;

    #[test]
    fn memory_is_half_of_the_host_within_bounds() {
        assert_eq!(memory_mib(0, 600, None, None), 512);
        assert_eq!(memory_mib(0, 2400, None, None), 1024);
        assert_eq!(memory_mib(0, 1 << 20, None, None), 2048);
        assert_eq!(memory_mib(900, 24000, Some(5000), Some(5000)), 900);
        assert_eq!(memory_mib(0, 24000, Some(3000), Some(3000)), 4096);
        assert_eq!(memory_mib(0, 24000, Some(20000), Some(20000)), 24000);
        assert_eq!(memory_mib(0, 24000, Some(900_000), Some(900_000)), 24000);
    }

    #[test]
    fn cpus_follow_the_accelerator_and_the_limit() {
        let tcg = Accelerator::Tcg { tsc_khz: 1 };
        assert_eq!(vcpus(0, Accelerator::Kvm, 64, None), 8);
        assert_eq!(vcpus(0, Accelerator::Kvm, 4, Some(2)), 2);
        assert_eq!(vcpus(0, tcg, 4, None), 1);
        assert_eq!(vcpus(3, tcg, 2, None), 3);
    }

    #[test]
    fn the_kernel_serves_network_devices_where_it_can() {
        let absent = || Err(io::ErrorKind::NotFound.into());
        assert_eq!(vhost_nics(1, Accelerator::Kvm, 4, || Ok(())), 1);
        assert_eq!(vhost_nics(8, Accelerator::Kvm, 4, || Ok(())), 4);
        assert_eq!(vhost_nics(1, Accelerator::Kvm, 4, absent), 0);
        let untried = || unreachable!("the device is not needed");
        assert_eq!(vhost_nics(1, Accelerator::Kvm, 0, untried), 0);
        assert_eq!(vhost_nics(0, Accelerator::Kvm, 4, untried), 0);
        assert_eq!(vhost_nics(1, Accelerator::Tcg { tsc_khz: 1 }, 4, untried), 0);
    }

    #[test]
    fn limits_are_read_from_the_configuration() {
        let mut spec = Spec::default();
        let resources = LinuxResourcesBuilder::default()
            .memory(LinuxMemoryBuilder::default().limit(100 << 20).build().unwrap())
            .cpu(LinuxCpuBuilder::default().quota(150_000).period(100_000_u64).build().unwrap())
            .build()
            .unwrap();
        spec.linux_mut().as_mut().unwrap().set_resources(Some(resources));
        let limits = ContainerLimits { memory_mib: Some(100), cpus: Some(2), may_grow: false };
        assert_eq!(ContainerLimits::of(&spec), limits);
        assert_eq!(limits.grown(50), limits, "nobody raises the limits of a container without a pod");
        assert_eq!(ContainerLimits::of(&Spec::default()), ContainerLimits::default());
    }

    #[test]
    fn the_vm_of_a_pod_has_room_for_larger_limits() {
        let annotations = [(POD_MEMORY, "1992294400"), (POD_CPU_QUOTA, "150000"), (POD_CPU_PERIOD, "100000")];
        let mut spec = Spec::default();
        spec.set_annotations(Some(annotations.map(|(name, value)| (name.into(), value.into())).into()));
        let limits = ContainerLimits::of(&spec);
        assert_eq!(limits, ContainerLimits { memory_mib: Some(1900), cpus: Some(2), may_grow: true });
        let grown = limits.grown(100);
        assert_eq!((grown.memory_mib, grown.cpus), (Some(3800), Some(4)));
        assert_eq!(memory_mib(0, 24000, limits.memory_mib, grown.memory_mib), 4096);
        assert_eq!(memory_mib(0, 24000, Some(4096), Some(8192)), 8192, "twice as much, and not four times");
        assert_eq!(memory_mib(0, 24000, limits.memory_mib, limits.grown(0).memory_mib), 2048);
        let most = ContainerLimits { memory_mib: Some(u32::MAX), ..limits };
        assert_eq!(most.grown(u32::MAX).memory_mib, Some(u32::MAX));
    }
}
