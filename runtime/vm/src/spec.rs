//! The description of a VM: plain data, complete before anything is started.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::accel::Accelerator;
use crate::cpu::CpuModel;
use crate::qemu::{argv, slots};

/// Most network devices of a VM: QEMU's microvm has places for 24 devices in all.
pub const MAX_NICS: u32 = 8;

/// All parameters of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Names the QEMU process: the container's or pod's id.
    pub id: String,
    /// A path, or a name that is looked up in PATH.
    pub qemu: PathBuf,
    /// What runs the instructions of the guest.
    pub accel: Accelerator,
    /// The processor that the guest sees.
    pub cpu: CpuModel,
    /// With KVM: whether the guest gets the processor's extensions for VMs of its own.
    pub nested_kvm: bool,
    /// With KVM: whether the guest gets the processor's performance counters.
    pub pmu: bool,
    /// Ceiling of the guest's memory, MiB; the host pays only for what the guest has touched.
    pub memory_mib: u32,
    /// The number of CPUs of the guest.
    pub vcpus: u32,
    /// Uncompressed kernel with a PVH entry point, readable by everyone.
    pub kernel: PathBuf,
    /// The SHA-256 of a kernel that the user supplies, in hexadecimal digits; empty for machinen's own.
    pub kernel_digest: String,
    /// Read-only root file system with the agent, readable by everyone.
    pub image: PathBuf,
    /// Added to the kernel command line.
    pub kernel_args: String,
    /// How the host and the agent communicate.
    pub channel: ChannelKind,
    /// The number of the guest's network devices, which are connected to nothing at first. At most [`MAX_NICS`].
    pub nics: u32,
    /// The number of network devices, counted from the first one, whose packets the host's kernel moves (vhost-net). QEMU
    /// moves those of the others.
    pub vhost_nics: u32,
    /// Whether clones of a template are twins of its QEMU ([`machinen_base::process::Twin`]), which needs emulation and the
    /// serial channel.
    pub twins: bool,
    /// Hostname of the guest itself.
    pub hostname: String,
    /// From the start of QEMU until the agent has answered.
    pub boot_timeout: Duration,
    /// Files and directories that QEMU can read, besides its program, the system's libraries and its own data.
    pub qemu_files: Vec<PathBuf>,
    /// Whose VM this is: a VM is a clone only of a template that was built for the same. Empty: for all.
    pub tenant: String,
    /// Keep `console.log` even if the VM ended because its owner asked for it; else it is kept only after a
    /// failure.
    pub keep_console: bool,
}

/// How the host and the agent communicate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChannelKind {
    /// AF_VSOCK by the host kernel's /dev/vhost-vsock.
    KernelVsock,
    /// AF_VSOCK in the guest, Unix sockets on the host, by the program `daemon` (vhost-device-vsock).
    VhostUserVsock {
        /// Path or name of the program.
        daemon: PathBuf,
    },
    /// One virtio serial port that carries all streams as yamux.
    Serial,
}

impl ChannelKind {
    /// The value of `machinen.channel` on the kernel command line.
    pub fn guest_name(&self) -> &'static str {
        match self {
            Self::KernelVsock | Self::VhostUserVsock { .. } => "vsock",
            Self::Serial => "serial",
        }
    }
}

impl VmSpec {
    /// QEMU's arguments for a template of this VM, without what differs between its clones.
    pub fn template_args(&self) -> Vec<String> {
        let spec = Self { id: String::new(), ..self.clone() };
        let args = argv::argv(&spec, argv::Start::Template, argv::PRIVATE_CID);
        args.into_iter().chain(slots::args()).collect()
    }
}
