//! How VMs are made, by `[vm]` of the configuration.

use std::path::PathBuf;

use machinen_vm::{ChannelMode, CpuModel, accel::AccelMode};
use serde::{Deserialize, Serialize};

/// How VMs are made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmConfig {
    /// QEMU, a path or a name that is looked up in PATH.
    pub qemu: PathBuf,
    /// Files and directories that QEMU can read, besides its program, the system's libraries and its own data: the
    /// libraries of a QEMU that is not installed in a directory `bin` next to its `lib` and `share`.
    pub qemu_files: Vec<PathBuf>,
    /// The vhost-user vsock daemon, a path or a name that is looked up in PATH. Used where the host has no
    /// `/dev/vhost-vsock`.
    pub vhost_device_vsock: PathBuf,
    /// KVM, emulation, whichever works, or PVM.
    pub accel: AccelMode,
    /// The processor that guests see. Empty: the host's with KVM, all that can be emulated with emulation.
    pub cpu: CpuModel,
    /// The kernel of guests with [`AccelMode::Pvm`].
    pub pvm_kernel: PathBuf,
    /// Whether guests get the processor's extensions for VMs of their own, with KVM.
    pub nested_kvm: bool,
    /// Whether guests get the processor's performance counters, with KVM.
    pub pmu: bool,
    /// Ceiling of a VM's memory, MiB. 0: half of the host's memory within bounds, or more if the container's
    /// limit requires it.
    pub memory_mib: u32,
    /// Memory of a pod on the host in addition to its containers' limits, MiB. 0: by the accelerator.
    pub memory_overhead_mib: u32,
    /// Number of virtual CPUs; 0 is the host's number with KVM, at most 8, and 1 with emulation. A
    /// container's CPU limit lowers it.
    pub vcpus: u32,
    /// How far the limits of a Kubernetes pod can grow while it runs, percent of those that it starts with.
    pub growth_percent: u32,
    /// Number of a VM's network devices, at most 8: a container can have as many network interfaces.
    pub network_devices: u32,
    /// Number of network devices, counted from the first one, whose packets the host's kernel moves (vhost-net), where it
    /// can and KVM runs the guest. QEMU moves those of the others.
    pub vhost_net_devices: u32,
    /// How the host and the agent communicate.
    pub channel: ChannelMode,
    /// Added to the guest kernel's command line.
    pub kernel_args: String,
    /// Whether processes in the guest may use io_uring.
    pub io_uring: bool,
    /// From the start of QEMU until the agent must have answered, seconds.
    pub boot_timeout_s: u64,
    /// The share of the host's memory that starts leave available, percent.
    pub memory_reserve_percent: u64,
}

/// Turns io_uring off for all processes (kernel.io_uring_disabled in the kernel's sysctl documentation).
pub(super) const NO_IO_URING: &str = "sysctl.kernel.io_uring_disabled=2";

impl VmConfig {
    /// What the configuration adds to the kernel's command line. The user's own text comes last, so that it
    /// takes precedence.
    pub(crate) fn all_kernel_args(&self) -> String {
        match (self.io_uring, self.kernel_args.as_str()) {
            (true, args) => args.to_owned(),
            (false, "") => NO_IO_URING.to_owned(),
            (false, args) => format!("{NO_IO_URING} {args}"),
        }
    }
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            qemu: "qemu-system-x86_64".into(),
            qemu_files: Vec::new(),
            vhost_device_vsock: "vhost-device-vsock".into(),
            accel: AccelMode::Auto,
            cpu: CpuModel::default(),
            pvm_kernel: PathBuf::new(),
            nested_kvm: false,
            pmu: false,
            memory_mib: 0,
            memory_overhead_mib: 0,
            vcpus: 0,
            growth_percent: 100,
            network_devices: 4,
            vhost_net_devices: 0,
            channel: ChannelMode::Auto,
            kernel_args: String::new(),
            io_uring: true,
            boot_timeout_s: 60,
            memory_reserve_percent: 1,
        }
    }
}
