//! A directory for VMs, and the check that nothing of a VM is left.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use machinen_base::space::DiskReserve;
use machinen_vm::{ChannelKind, DiskBacking, DiskSpec, VmSpec, accel};

const DISK_BYTES: u64 = 4 << 20;

pub(crate) struct Host {
    root: tempfile::TempDir,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self { root: tempfile::Builder::new().prefix("machinen-vm-").tempdir().unwrap() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.root.path()
    }

    /// The VM's directory, which does not exist before and after.
    pub(crate) fn dir(&self) -> PathBuf {
        self.path().join("vm")
    }

    pub(crate) fn spec(&self, channel: ChannelKind) -> VmSpec {
        let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest");
        let asset = |name: &str| {
            let path = guest.join(name);
            assert!(path.exists(), "{} is missing; run `make guest-image`", path.display());
            path
        };
        let accel = accel::verdict(self.path()).unwrap().choose(accel::AccelMode::Auto).unwrap();
        VmSpec {
            id: "test".into(),
            qemu: "qemu-system-x86_64".into(),
            accel,
            cpu: machinen_vm::CpuModel::default(),
            kernel_digest: String::new(),
            nested_kvm: false,
            pmu: false,
            memory_mib: 512,
            vcpus: 1,
            kernel: asset("vmlinux"),
            image: asset("guest.img"),
            kernel_args: String::new(),
            twins: matches!(accel, accel::Accelerator::Tcg { .. }) && channel == ChannelKind::Serial,
            channel,
            nics: 1,
            vhost_nics: 0,
            hostname: "test".into(),
            boot_timeout: Duration::from_secs(60),
            qemu_files: Vec::new(),
            tenant: String::new(),
            keep_console: false,
        }
    }

    pub(crate) fn vhost_user_vsock(&self) -> ChannelKind {
        let name = "target/tools/bin/vhost-device-vsock";
        let daemon = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(name);
        assert!(daemon.exists(), "{name} is missing; run `make setup`");
        ChannelKind::VhostUserVsock { daemon }
    }

    pub(crate) fn disk(&self, serial: &str, read_only: bool) -> DiskSpec {
        let path = self.path().join(serial);
        let file = File::create(&path).unwrap();
        file.set_len(DISK_BYTES).unwrap();
        file.write_all_at(serial.as_bytes(), 0).unwrap();
        (&file).flush().unwrap();
        let file = File::options().read(true).write(!read_only).open(&path).unwrap();
        let (source, reserve) = (DiskBacking::File(file.into()), DiskReserve::default());
        DiskSpec { source, read_only, volatile: false, serial: serial.into(), reserve }
    }

    /// The log of a VM that has ended, if it was kept.
    pub(crate) fn console(&self) -> String {
        fs::read_to_string(self.dir().join("console.log")).unwrap_or_default()
    }

    pub(crate) fn nothing_is_left(&self, pid: u32) {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is left");
        // The daemon of the channel sees a directory below this test's own.
        let here = self.path().file_name().unwrap().to_string_lossy().into_owned();
        for entry in fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
            let file = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
            let left = file("mountinfo").contains(&here);
            assert!(!left, "left: {}", file("cmdline").replace('\0', " "));
        }
        self.no_files_are_left();
    }

    pub(crate) fn no_files_are_left(&self) {
        assert!(!self.dir().exists(), "left: {:?}", fs::read_dir(self.dir()).unwrap().collect::<Vec<_>>());
    }
}

pub(crate) fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid.try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    machinen_base::error::chain(error)
}
