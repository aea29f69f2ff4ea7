//! VMs without machinen: the same QEMU and processor, and a disk with the files of a bundle. One has machinen's kernel
//! and a tap device that is a port of the lab's bridge, the other a kernel of the caller's and a virtio-9p share.

use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    bundle::Bundle,
    lab::{Lab, OTHER},
    paths,
    process::{Invocation, Output},
};

/// What the VM runs is in this file, since the kernel's command line has no room for spaces.
const INIT: &str = "init";
const TAP: &str = "bare0";
/// Bytes of the disk.
const DISK: u64 = 1 << 30;

#[derive(Debug)]
pub(crate) struct BareVm {
    rootfs: PathBuf,
    disk: PathBuf,
    /// What the guest's kernel is told of its timers.
    timers: String,
}

impl BareVm {
    /// A VM of the bundle's files. `qemu` has the arguments of the QEMU of a container whose VM boots.
    pub(crate) fn new(bundle: &Bundle, qemu: &[String]) -> Result<Self> {
        let line = qemu.iter().skip_while(|arg| *arg != "-append").nth(1).context("no command line")?;
        let timers = ["tsc", "lpj", "no_timer_check", "mitigations"];
        let is_of_timers = |word: &&str| timers.iter().any(|name| word.starts_with(name));
        let timers: Vec<_> = line.split_whitespace().filter(is_of_timers).collect();
        Ok(Self { rootfs: bundle.rootfs(), disk: bundle.dir().join("bare.ext4"), timers: timers.join(" ") })
    }

    /// Boots a VM with a tap device, which runs a command of the shell. Returns what that prints.
    pub(crate) fn run(&self, lab: &Lab, command: &str) -> Result<String> {
        let network = format!(
            "/bin/busybox ip address add {OTHER}/24 dev eth0\n/bin/busybox ip link set eth0 up\n{command}"
        );
        self.prepare(&network)?;
        let ip = |args: &[&str]| lab.in_peer(&[&["ip"], args].concat())?.ok();
        ip(&["tuntap", "add", "name", TAP, "mode", "tap", "vnet_hdr"])?;
        ip(&["link", "set", TAP, "master", "eth0", "up"])?;
        let mut args = self.args(&paths::assets().join("vmlinux"));
        let netdev = format!("tap,id=net,ifname={TAP},script=no,downscript=no");
        args.extend(["-netdev", &netdev, "-device", "virtio-net-device,netdev=net"].map(str::to_owned));
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let output = lab.in_peer(&args);
        ip(&["link", "delete", TAP])?;
        printed(output?)
    }

    /// Boots a VM of another kernel that has a directory of the host at `at` by virtio-9p, and runs a command of the shell.
    /// Returns what that prints, within `time`.
    pub(crate) fn run_with_9p(
        &self,
        kernel: &Path,
        share: &Path,
        at: &str,
        command: &str,
        time: Duration,
    ) -> Result<String> {
        // QEMU's manual asks for a large msize. cache=none is the only kind that is coherent with the host.
        let options = "trans=virtio,version=9p2000.L,msize=524288,cache=none";
        self.prepare(&format!(
            "/bin/busybox mkdir -p {at}\n/bin/busybox mount -t 9p -o {options} share {at}\n{command}"
        ))?;
        let mut args = self.args(kernel);
        let fsdev = format!("local,id=share,path={},security_model=passthrough", share.display());
        let device = "virtio-9p-device,fsdev=share,mount_tag=share";
        args.extend(["-fsdev", &fsdev, "-device", device].map(str::to_owned));
        let (program, args) = args.split_first().context("no program")?;
        printed(Invocation::new(program).args(args).deadline(time).run()?)
    }

    /// Makes the disk, whose init runs the script and powers the VM off.
    fn prepare(&self, script: &str) -> Result<()> {
        let init = self.rootfs.join(INIT);
        let mount = "/bin/busybox mount -t proc proc /proc";
        std::fs::write(&init, format!("#!/bin/sh\n{mount}\n{script}\n/bin/busybox poweroff -f\n"))?;
        Invocation::new("chmod").arg("755").arg(&init).run()?.ok()?;
        File::create(&self.disk)?.set_len(DISK)?;
        let mke2fs = Invocation::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-d"]);
        mke2fs.arg(&self.rootfs).arg(&self.disk).run()?.ok()?;
        Ok(())
    }

    /// QEMU with the devices that both VMs have.
    fn args(&self, kernel: &Path) -> Vec<String> {
        // The machine and the processor are those of machinen's VMs under emulation; see runtime/vm/src/qemu/argv.rs.
        let text = format!(
            "qemu-system-x86_64 -machine microvm,acpi=on,isa-serial=off -accel tcg,thread=multi,tb-size=128 \
             -cpu max,-erms,-fsrm -smp 1 -m 512M -nodefaults -no-user-config -no-reboot -display none \
             -global virtio-mmio.force-legacy=false -kernel {} \
             -blockdev driver=raw,node-name=root,file.driver=file,file.filename={} \
             -device virtio-blk-device,drive=root -device virtio-serial-device -chardev stdio,id=console \
             -device virtconsole,chardev=console -append",
            kernel.display(),
            self.disk.display(),
        );
        let append = format!(
            "console=hvc0 quiet loglevel=1 root=/dev/vda rw rootfstype=ext4 init=/{INIT} reboot=t panic=-1 {}",
            self.timers
        );
        text.split_whitespace().map(str::to_owned).chain([append]).collect()
    }
}

fn printed(output: Output) -> Result<String> {
    ensure!(output.status == 0, "the bare VM: {output}");
    Ok(output.text())
}
