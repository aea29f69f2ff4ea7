//! QEMU's command line: one pure function of the [`VmSpec`].
//!
//! QEMU gets no paths. It inherits every file under the numbers in [`fd`], so it can run as a user that may
//! not open any file.

use machinen_protocol::{CHANNEL_ARG, SERIAL_PORT_NAME, TEMPLATE_ARG, WAKE_PORT_NAME};

use crate::accel::Accelerator;
use crate::cpu;
use crate::spec::{ChannelKind, VmSpec};

/// Numbers of the descriptors that QEMU inherits.
pub(crate) mod fd {
    /// A connected socket that speaks QMP.
    pub(crate) const QMP: i32 = 3;
    /// A connected socket that takes what the guest prints on hvc0.
    pub(crate) const CONSOLE: i32 = 4;
    pub(crate) const KERNEL: i32 = 5;
    pub(crate) const IMAGE: i32 = 6;
    /// Serial: a connected socket. vhost-user: a socket connected to the daemon. Kernel vsock:
    /// /dev/vhost-vsock.
    pub(crate) const CHANNEL: i32 = 7;
    /// Template and clone: the file that is the guest's memory.
    pub(crate) const MEMORY: i32 = 8;
    /// Template and clone: a connected socket on which the agent reports that it waits, and on which the host
    /// wakes it.
    pub(crate) const WAKE: i32 = 9;
    /// The first of the tap devices that are the other ends of the guest's network devices; the others follow.
    pub(crate) const FIRST_TAP: i32 = 10;
    /// /dev/vhost-net, opened for the first network device; for the others that have it, it follows.
    pub(crate) const FIRST_VHOST: i32 = FIRST_TAP + crate::MAX_NICS as i32;
    /// Clone: the first of the disks with which it starts.
    pub(crate) const FIRST_SLOT: i32 = FIRST_VHOST + crate::MAX_NICS as i32;
}

/// How the guest starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// The guest boots.
    Boot,
    /// The guest boots until its agent waits to be woken. Its memory is a file that outlives QEMU.
    Template,
    /// The guest continues from the saved state of a template. Its devices must be the template's, created in
    /// the same order.
    Clone,
}

/// Most memory in which emulation keeps the code that it has translated, MiB. Without a bound it is an eighth of the
/// host's memory, up to 1 GiB. When it is full QEMU translates anew.
pub const TRANSLATED_CODE_MIB: u32 = 128;

/// Threads that QEMU always has for requests to disks. It makes others when it needs them, and its event loop would wait for a host that
/// lets no thread be made, as while a process moves to another cgroup.
const DISK_THREADS: u32 = 2;

/// `id` of the virtio-scsi controller that disks are added to; its bus is `<id>.0`.
pub(crate) const SCSI: &str = "scsi";

/// The vsock CID of a guest whose channel does not go through the host's kernel. Each such VM has its own
/// daemon, so all can use the same CID.
pub(crate) const PRIVATE_CID: u32 = 3;

/// QEMU's arguments. `guest_cid` matters to the vsock channels only.
pub(crate) fn argv(spec: &VmSpec, start: Start, guest_cid: u32) -> Vec<String> {
    let mut args = QemuArgs::default();
    let name = process_name(&spec.id);
    args.option("-name", format!("{name},process={name}"));
    let memory = memory(spec, start);
    let backend = if memory.is_some() { ",memory-backend=ram" } else { "" };
    // suppress-vmdesc: only debugging tools need the description of the saved state. dump-guest-core, mem-merge: the
    // guest's memory is in no core of QEMU, and is not merged with equal pages of other guests, which could measure that.
    args.option(
        "-machine",
        format!(
            "microvm,acpi=on,isa-serial=off,suppress-vmdesc=on,dump-guest-core=off,mem-merge=off{backend}"
        ),
    );
    match spec.accel {
        Accelerator::Kvm => args.option("-accel", "kvm"),
        Accelerator::Tcg { .. } => {
            let threads = emulation_threads(spec.vcpus);
            let accel = format!("tcg,thread={threads},tb-size={TRANSLATED_CODE_MIB}");
            args.option("-accel", accel)
        }
    };
    args.option("-cpu", cpu::option(spec));
    args.option("-smp", spec.vcpus).option("-m", format!("{}M", spec.memory_mib));
    args.flag("-nodefaults").flag("-no-user-config").flag("-no-reboot").option("-display", "none");
    // What is to have twins has to fork, and its twins are confined when they are made.
    if !(start == Start::Template && spec.twins) {
        args.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    }
    if let Some(memory) = memory {
        args.option("-object", format!("{memory},id=ram,size={}M", spec.memory_mib));
    }
    args.option("-object", format!("main-loop,id=loop,thread-pool-min={DISK_THREADS}"));
    args.option("-global", "virtio-mmio.force-legacy=false");

    args.option("-chardev", format!("socket,id=qmp,fd={}", fd::QMP));
    args.option("-mon", "chardev=qmp,mode=control");

    if start == Start::Clone {
        args.option("-incoming", "defer");
    } else {
        args.option("-kernel", format!("/proc/self/fd/{}", fd::KERNEL));
        args.option("-append", kernel_command_line(spec, start));
    }

    args.option("-add-fd", format!("fd={},set={IMAGE_FDSET}", fd::IMAGE));
    args.option("-blockdev", disk("image", IMAGE_FDSET, true));
    args.option("-device", "virtio-blk-device,drive=image");

    // The console, the channel and the wake port. The guest sets up two queues for each possible port.
    args.option("-device", "virtio-serial-device,id=serial,max_ports=3");
    args.option("-chardev", format!("socket,id=console,fd={}", fd::CONSOLE));
    args.option("-device", "virtconsole,bus=serial.0,chardev=console");
    if start != Start::Boot {
        args.option("-chardev", format!("socket,id=wake,fd={}", fd::WAKE));
        args.option("-device", format!("virtserialport,bus=serial.0,chardev=wake,name={WAKE_PORT_NAME}"));
    }

    match &spec.channel {
        ChannelKind::Serial => {
            args.option("-chardev", format!("socket,id=channel,fd={}", fd::CHANNEL));
            args.option(
                "-device",
                format!("virtserialport,bus=serial.0,chardev=channel,name={SERIAL_PORT_NAME}"),
            );
        }
        ChannelKind::VhostUserVsock { .. } => {
            args.option("-chardev", format!("socket,id=channel,fd={}", fd::CHANNEL));
            args.option("-device", "vhost-user-vsock-device,chardev=channel");
        }
        ChannelKind::KernelVsock => {
            args.option(
                "-device",
                format!("vhost-vsock-device,guest-cid={guest_cid},vhostfd={}", fd::CHANNEL),
            );
        }
    }

    if spec.nics > 0 {
        // QEMU announces a VM that it has restored with the hardware address that the device has then, which is the
        // same in all clones.
        args.option("-global", "migration.announce-rounds=0");
    }
    for nic in 0..spec.nics {
        args.option("-netdev", tap(nic, nic < spec.vhost_nics));
        // Without announcements, QEMU 7.2 to 10 frees the timer for them when it loads a VM, and crashes when the guest
        // resets a device that has such a timer.
        args.option(
            "-device",
            format!("virtio-net-device,netdev=net{nic},mac={},guest_announce=off", unused_mac(nic)),
        );
    }

    args.option("-device", format!("virtio-scsi-device,id={SCSI}"));
    args.option("-device", "virtio-balloon-device,free-page-reporting=on");
    args.option("-device", "virtio-rng-device");
    args.0
}

/// The name of a VM and of its process, as an option's value.
pub(crate) fn process_name(id: &str) -> String {
    format!("machinen-{}", escape(id))
}

/// The host's end of a network device.
fn tap(nic: u32, vhost: bool) -> String {
    let number = nic.cast_signed();
    let tap = format!("tap,id=net{nic},fd={}", fd::FIRST_TAP + number);
    if vhost { format!("{tap},vhost=on,vhostfd={}", fd::FIRST_VHOST + number) } else { tap }
}

/// The hardware address of a network device that is connected to nothing: locally administered, and in no use. The
/// agent finds the device's number by it.
fn unused_mac(nic: u32) -> String {
    format!("02:00:00:00:00:{:02x}", nic + 1)
}

/// Set of descriptors that holds the guest image; sets of hot-added disks are numbered after it.
pub(crate) const IMAGE_FDSET: u64 = 1;

/// A block device made of the one descriptor in an fd set, as `-blockdev` takes it.
fn disk(node: &str, fdset: u64, read_only: bool) -> String {
    let switch = if read_only { "on" } else { "off" };
    format!(
        "driver=raw,node-name={node},read-only={switch},file.driver=file,file.filename=/dev/fdset/{fdset},\
         file.read-only={switch},file.locking=off"
    )
}

/// Type and sharing mode of the guest's memory backend, where QEMU's default does not fit.
fn memory(spec: &VmSpec, start: Start) -> Option<String> {
    match (start, &spec.channel) {
        (Start::Template, _) => {
            Some(format!("memory-backend-file,mem-path=/proc/self/fd/{},share=on", fd::MEMORY))
        }
        // Copy on write.
        (Start::Clone, _) => {
            Some(format!("memory-backend-file,mem-path=/proc/self/fd/{},share=off", fd::MEMORY))
        }
        // The daemon maps the guest's memory, so it has to be a shared file.
        (Start::Boot, ChannelKind::VhostUserVsock { .. }) => Some("memory-backend-memfd,share=on".to_owned()),
        (Start::Boot, ChannelKind::KernelVsock | ChannelKind::Serial) => None,
    }
}

/// The size of the file that QEMU itself makes for the guest's memory, bytes; 0 if it makes none.
pub(crate) fn own_memory_file(spec: &VmSpec, start: Start) -> u64 {
    match (start, &spec.channel) {
        (Start::Boot, ChannelKind::VhostUserVsock { .. }) => u64::from(spec.memory_mib) << 20,
        _ => 0,
    }
}

/// How TCG executes virtual CPUs: each in a thread of its own, or all in one thread.
///
/// A kernel with several CPUs changes its own code while it runs: it writes a breakpoint first and removes it when all
/// CPUs have seen it. Before version 8.1, QEMU can translate the breakpoint in one thread while another thread removes
/// it, and execute that translation later; the guest kernel then panics ("Oops: int3") in one of a hundred boots.
fn emulation_threads(vcpus: u32) -> &'static str {
    if vcpus > 1 { "single" } else { "multi" }
}

fn kernel_command_line(spec: &VmSpec, start: Start) -> String {
    // loglevel=1, not 0: a panicking kernel raises the level only if it is not zero, and then prints the
    // reason on the console. scan=manual: the agent has the kernel scan the address of each attached disk,
    // instead of all 256 at boot.
    let mut line = format!(
        "console=hvc0 quiet loglevel=1 root=/dev/vda ro rootfstype=erofs init=/sbin/machinen-agent \
         reboot=t panic=-1 rcupdate.rcu_expedited=1 random.trust_cpu=on scsi_mod.scan=manual {CHANNEL_ARG}={}",
        spec.channel.guest_name()
    );
    match spec.accel {
        // Emulated timers are too slow to calibrate delays with, and emulation does not execute
        // speculatively.
        Accelerator::Tcg { tsc_khz } => {
            let lpj = u64::from(tsc_khz) * 1000 / u64::from(GUEST_HZ);
            line +=
                &format!(" tsc_early_khz={tsc_khz} lpj={lpj} tsc=reliable no_timer_check mitigations=off");
        }
        // On a processor these cost little, and under emulation they cost too much.
        Accelerator::Kvm => line += " init_on_alloc=1 randomize_kstack_offset=on",
    }
    if start == Start::Template {
        line += &format!(" {TEMPLATE_ARG}");
    }
    if !spec.kernel_args.is_empty() {
        line.push(' ');
        line += &spec.kernel_args;
    }
    line
}

/// CONFIG_HZ of the guest kernel, the unit of `lpj` (delay loops per jiffy).
const GUEST_HZ: u32 = 250;

/// A comma in an option's value is written twice.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[derive(Default)]
struct QemuArgs(Vec<String>);

impl QemuArgs {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.to_owned());
        self
    }

    fn option(&mut self, name: &str, value: impl ToString) -> &mut Self {
        self.0.push(name.to_owned());
        self.0.push(value.to_string());
        self
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn spec(accel: Accelerator, channel: ChannelKind) -> VmSpec {
        VmSpec {
            id: "c1".into(),
            qemu: "qemu-system-x86_64".into(),
            accel,
            cpu: cpu::CpuModel::default(),
            kernel_digest: String::new(),
            nested_kvm: false,
            pmu: false,
            memory_mib: 2048,
            vcpus: 2,
            kernel: "/a/vmlinux".into(),
            image: "/a/guest.img".into(),
            kernel_args: String::new(),
            channel,
            nics: 2,
            vhost_nics: 0,
            twins: false,
            hostname: "c1".into(),
            boot_timeout: std::time::Duration::from_secs(60),
            qemu_files: Vec::new(),
            tenant: String::new(),
            keep_console: false,
        }
    }

    /// One option a line.
    fn lines(spec: &VmSpec, start: Start, guest_cid: u32) -> String {
        let mut text = String::new();
        for arg in argv(spec, start, guest_cid) {
            text.push(if arg.starts_with('-') { '\n' } else { ' ' });
            text += &arg;
        }
        text
    }

    #[test]
    fn serial_on_tcg() {
        let spec = spec(Accelerator::Tcg { tsc_khz: 2_500_000 }, ChannelKind::Serial);
        insta::assert_snapshot!(lines(&spec, Start::Boot, 0));
    }

    #[test]
    fn template_on_tcg() {
        let spec = spec(Accelerator::Tcg { tsc_khz: 2_500_000 }, ChannelKind::Serial);
        insta::assert_snapshot!(lines(&spec, Start::Template, 0));
    }

    #[test]
    fn what_has_twins_may_fork() {
        let spec = spec(Accelerator::Tcg { tsc_khz: 2_500_000 }, ChannelKind::Serial);
        let sandbox = |twins, start| lines(&VmSpec { twins, ..spec.clone() }, start, 0).contains("-sandbox");
        assert!(!sandbox(true, Start::Template));
        assert!(sandbox(true, Start::Clone) && sandbox(true, Start::Boot) && sandbox(false, Start::Template));
    }

    #[test]
    fn clone_on_kvm() {
        let spec = VmSpec { vhost_nics: 1, ..spec(Accelerator::Kvm, ChannelKind::KernelVsock) };
        insta::assert_snapshot!(lines(&spec, Start::Clone, 78));
    }

    #[test]
    fn a_clone_has_its_templates_devices() {
        for channel in [ChannelKind::Serial, ChannelKind::KernelVsock] {
            let spec = VmSpec { vhost_nics: 1, ..spec(Accelerator::Kvm, channel) };
            let devices = |start| {
                let args = argv(&spec, start, 3);
                let pairs: Vec<_> = args.windows(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect();
                pairs
                    .into_iter()
                    .filter(|(name, _)| {
                        ["-device", "-netdev", "-chardev", "-blockdev", "-machine", "-cpu", "-smp", "-m"]
                            .contains(&&**name)
                    })
                    .collect::<Vec<_>>()
            };
            assert_eq!(devices(Start::Template), devices(Start::Clone));
        }
    }

    #[test]
    fn vhost_user_vsock_on_tcg() {
        let channel = ChannelKind::VhostUserVsock { daemon: "vhost-device-vsock".into() };
        let spec = spec(Accelerator::Tcg { tsc_khz: 2_500_000 }, channel);
        insta::assert_snapshot!(lines(&spec, Start::Boot, PRIVATE_CID));
    }

    #[test]
    fn kernel_vsock_on_kvm() {
        let spec =
            VmSpec { kernel_args: "debug x=1".into(), ..spec(Accelerator::Kvm, ChannelKind::KernelVsock) };
        insta::assert_snapshot!(lines(&spec, Start::Boot, 77));
    }

    #[test]
    fn an_id_cannot_add_options() {
        let spec = VmSpec { id: "a,process=x".into(), ..spec(Accelerator::Kvm, ChannelKind::Serial) };
        assert_eq!(argv(&spec, Start::Boot, 0)[1], "machinen-a,,process=x,process=machinen-a,,process=x");
    }
}
