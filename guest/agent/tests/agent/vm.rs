//! The same agent in a VM: how long each step takes, from QEMU's start to its end.
//!
//! Asked for by name, as it needs QEMU, a kernel and an image:
//! `cargo test -p machinen-guest --test agent -- --ignored --nocapture vm`

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::Instant,
};

use machinen_protocol::{SERIAL_PORT_NAME, api};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::{Value, json};
use tokio::net::UnixStream;

use crate::support::{Disks, Guest, Spec, within};

struct Vm {
    qemu: tokio::process::Child,
    qmp: StdUnixStream,
    dir: tempfile::TempDir,
}

/// MACHINEN_ASSETS_DIR, or the checkout's.
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
    async fn boot(extra: &str) -> (Self, Guest) {
        let dir = tempfile::tempdir().unwrap();
        let (channel, qemus_channel) = inheritable(StdUnixStream::pair().unwrap());
        let (qmp, qemus_qmp) = inheritable(StdUnixStream::pair().unwrap());
        let khz = tsc_khz();
        let lpj = khz * 4;
        let append = format!(
            "console=hvc0 quiet loglevel=1 root=/dev/vda ro rootfstype=erofs init=/sbin/machinen-agent \
             reboot=t panic=-1 rcupdate.rcu_expedited=1 random.trust_cpu=on machinen.channel=serial machinen.trace \
             tsc_early_khz={khz} lpj={lpj} tsc=reliable no_timer_check mitigations=off {extra}"
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
        let guest = Guest::over(UnixStream::from_std(channel).unwrap(), Disks::new()).await;
        let mut vm = Self { qemu, qmp, dir };
        vm.qmp_line();
        vm.command("qmp_capabilities", json!({}));
        (vm, guest)
    }

    fn qmp_line(&mut self) -> Value {
        let mut line = String::new();
        BufReader::with_capacity(1, &self.qmp).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn command(&mut self, name: &str, arguments: Value) {
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

    fn attach(&mut self, target: u32, lun: u32, image: &Path, read_only: bool) {
        let node = format!("disk-{target}-{lun}");
        let file = json!({"driver": "file", "filename": image, "locking": "off"});
        self.command(
            "blockdev-add",
            json!({"driver": "raw", "node-name": node, "read-only": read_only, "file": file}),
        );
        self.command(
            "device_add",
            json!({"driver": "scsi-hd", "drive": node, "bus": "scsi.0", "scsi-id": target, "lun": lun, "id": format!("d{node}")}),
        );
    }

    fn console(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("console")).unwrap()
    }
}

/// What all threads of a process have used: on a busy machine it says more than the wall clock.
fn cpu_ms(pid: u32) -> f64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let ns = tasks.filter_map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    ns.sum::<u64>() as f64 / 1e6
}

fn tsc_khz() -> u64 {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let mhz = info.lines().find(|line| line.starts_with("cpu MHz")).and_then(|line| line.split(": ").nth(1));
    (mhz.expect("a clock").parse::<f64>().unwrap() * 1000.0) as u64
}

fn ext4(path: &Path, from: Option<&Path>) {
    File::create(path).unwrap().set_len(2 << 30).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a disk of the test's own")]
    let mut mke2fs = std::process::Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1"]);
    if let Some(from) = from {
        mke2fs.arg("-d").arg(from);
    }
    assert!(mke2fs.arg(path).status().unwrap().success());
}

#[tokio::test]
#[ignore = "boots a VM"]
async fn vm_timeline() {
    let images = tempfile::tempdir().unwrap();
    let disks = Disks::new();
    let base = images.path().join("base");
    ext4(&base, Some(&disks.base()));

    let mut marks = Vec::new();
    let mut last = (Instant::now(), 0.0);
    let (mut vm, mut guest) = Vm::boot("").await;
    let pid = vm.qemu.id().unwrap();
    let mut mark = |name: &'static str| {
        let now = (Instant::now(), cpu_ms(pid));
        marks.push((name, (now.0 - last.0).as_secs_f64() * 1000.0, now.1 - last.1));
        last = now;
    };
    mark("qemu to control stream");
    guest.configure().await.unwrap();
    mark("configure");
    let spec = Spec::new(&["true"]);
    let mut created = Vec::new();
    for id in ["a", "b"] {
        let api::Rootfs { base: b, writable: w, .. } = guest.disks.rootfs(id);
        let (b, w) = (b.unwrap(), w.unwrap());
        let writable = images.path().join(format!("rw-{id}"));
        ext4(&writable, None);
        mark("-");
        if id == "a" {
            vm.attach(b.target, b.lun, &base, true);
        }
        vm.attach(w.target, w.lun, &writable, false);
        mark("hot-add");
        let (stdout, _out) = guest.stream().await;
        let (stderr, _err) = guest.stream().await;
        mark("streams");
        let stdio = api::Stdio { stdout, stderr, ..Default::default() };
        created.push(guest.create_with(id, &spec, stdio).await);
        mark("create");
        if created.last().unwrap().is_err() {
            break;
        }
        guest.start_container(id).await.unwrap();
        mark("start");
        assert_eq!(guest.wait(id).await.exit_status, 0);
        mark("wait");
        guest.delete(id).await.unwrap();
        mark("delete");
    }
    guest.shutdown().await;
    mark("shutdown answered");
    within(vm.qemu.wait()).await.unwrap();
    mark("qemu gone");
    println!("{}", vm.console());
    println!("      wall        cpu");
    for (name, wall, cpu) in marks {
        println!("{wall:>10.1} {cpu:>10.1} ms  {name}");
    }
    for created in created {
        let created = created.unwrap();
        let phases: Vec<String> =
            created.phases.iter().map(|p| format!("{} {:.1}", p.name, p.micros as f64 / 1000.0)).collect();
        println!("phases: {}", phases.join(", "));
    }
}
