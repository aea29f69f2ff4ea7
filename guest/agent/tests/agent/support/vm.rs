//! A VM of the test's own: emulated by QEMU, with the serial channel, and disks that are attached when a
//! container needs them.

use std::{
    cell::RefCell,
    collections::HashSet,
    fs::File,
    io::{BufRead, BufReader, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
};

use machinen_protocol::{SERIAL_PORT_NAME, api};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::{Value, json};
use tokio::net::UnixStream;

use super::{Disks, Guest, within};

pub(crate) struct Vm {
    qemu: tokio::process::Child,
    qmp: StdUnixStream,
    dir: tempfile::TempDir,
    attached: RefCell<HashSet<(u32, u32)>>,
}

/// A file of MACHINEN_ASSETS_DIR, or of the checkout's assets.
fn asset(name: &str) -> PathBuf {
    let dir = std::env::var_os("MACHINEN_ASSETS_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest"), PathBuf::from);
    dir.join(name)
}

fn inheritable(ours_and_theirs: (StdUnixStream, StdUnixStream)) -> (StdUnixStream, OwnedFd) {
    let (ours, theirs) = ours_and_theirs;
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    (ours, theirs.into())
}

impl Vm {
    pub(crate) async fn boot(disks: Disks) -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let (channel, qemus_channel) = inheritable(StdUnixStream::pair().unwrap());
        let (qmp, qemus_qmp) = inheritable(StdUnixStream::pair().unwrap());
        let khz = tsc_khz();
        let lpj = khz * 4;
        let append = format!(
            "console=hvc0 quiet loglevel=1 root=/dev/vda ro rootfstype=erofs init=/sbin/machinen-agent \
             reboot=t panic=-1 rcupdate.rcu_expedited=1 random.trust_cpu=on machinen.channel=serial machinen.trace \
             tsc_early_khz={khz} lpj={lpj} tsc=reliable no_timer_check mitigations=off"
        );
        let console = File::create(dir.path().join("console")).unwrap();
        #[expect(clippy::disallowed_methods, reason = "a VM of the test's own")]
        let qemu = tokio::process::Command::new("qemu-system-x86_64")
            .args(["-machine", "microvm,acpi=on,isa-serial=off", "-accel", "tcg,thread=multi", "-cpu", "max"])
            .args([
                "-smp",
                "1",
                "-m",
                "1024M",
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
            ])
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .args(["-chardev", &format!("socket,id=qmp,fd={}", qemus_qmp.as_raw_fd())])
            .args(["-mon", "chardev=qmp,mode=control", "-kernel"])
            .arg(asset("vmlinux"))
            .args(["-append", &append, "-blockdev"])
            .arg(format!(
                "driver=raw,node-name=image,read-only=on,file.driver=file,file.locking=off,file.filename={}",
                asset("guest.img").display()
            ))
            .args(["-device", "virtio-blk-device,drive=image", "-device", "virtio-serial-device,id=serial"])
            .args([
                "-chardev",
                "stdio,id=console,signal=off",
                "-device",
                "virtconsole,bus=serial.0,chardev=console",
            ])
            .args(["-chardev", &format!("socket,id=channel,fd={}", qemus_channel.as_raw_fd())])
            .args([
                "-device",
                &format!("virtserialport,bus=serial.0,chardev=channel,name={SERIAL_PORT_NAME}"),
            ])
            .args(["-device", "virtio-scsi-device,id=scsi", "-device", "virtio-rng-device"])
            .args(["-device", "virtio-balloon-device,free-page-reporting=on"])
            .stdin(Stdio::null())
            .stdout(console)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        drop((qemus_channel, qemus_qmp));
        channel.set_nonblocking(true).unwrap();
        let mut guest = Guest::over(UnixStream::from_std(channel).unwrap(), disks).await;
        let vm = Self { qemu, qmp, dir, attached: RefCell::default() };
        vm.qmp_line();
        vm.command("qmp_capabilities", &json!({}));
        guest.vm = Some(vm);
        guest
    }

    /// Pid of QEMU.
    pub(crate) fn pid(&self) -> u32 {
        self.qemu.id().expect("it runs")
    }

    pub(crate) async fn ended(mut self) -> ExitStatus {
        within(self.qemu.wait()).await.unwrap()
    }

    fn qmp_line(&self) -> Value {
        let mut line = String::new();
        BufReader::with_capacity(1, &self.qmp).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn command(&self, name: &str, arguments: &Value) {
        let text = json!({"execute": name, "arguments": arguments}).to_string();
        (&self.qmp).write_all(text.as_bytes()).unwrap();
        loop {
            let answer = self.qmp_line();
            assert!(answer.get("error").is_none(), "{answer}");
            if answer.get("return").is_some() {
                return;
            }
        }
    }

    /// Attaches disks that are not attached yet, with the present content of their directories.
    pub(crate) fn attach(&self, disks: &Disks, rootfs: &api::Rootfs) {
        for (disk, read_only) in [(&rootfs.base, true), (&rootfs.writable, false)] {
            if self.attached.borrow_mut().insert((disk.target, disk.lun)) {
                let from = disks.path().join(format!("{}-{}", disk.target, disk.lun));
                let image = self.dir.path().join(format!("{}-{}", disk.target, disk.lun));
                if from.is_dir() {
                    ext4(&image, &from);
                } else {
                    std::fs::copy(&from, &image).unwrap();
                }
                self.attach_image(disk, &image, read_only);
            }
        }
    }

    fn attach_image(&self, disk: &api::Disk, image: &Path, read_only: bool) {
        let node = format!("disk-{}-{}", disk.target, disk.lun);
        let file = json!({"driver": "file", "filename": image, "locking": "off"});
        let blockdev = json!({"driver": "raw", "node-name": node, "read-only": read_only, "file": file});
        self.command("blockdev-add", &blockdev);
        let device = json!({
            "driver": "scsi-hd", "drive": node, "bus": "scsi.0", "id": format!("d{node}"),
            "scsi-id": disk.target, "lun": disk.lun
        });
        self.command("device_add", &device);
    }

    pub(crate) fn console(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("console")).unwrap()
    }
}

fn tsc_khz() -> u64 {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let mhz = info.lines().find(|line| line.starts_with("cpu MHz")).and_then(|line| line.split(": ").nth(1));
    (mhz.expect("a clock").parse::<f64>().unwrap() * 1000.0) as u64
}

fn ext4(path: &Path, from: &Path) {
    File::create(path).unwrap().set_len(2 << 30).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a disk of the test's own")]
    let mut mke2fs = std::process::Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1", "-d"]).arg(from).arg(path);
    assert!(mke2fs.status().unwrap().success());
}
