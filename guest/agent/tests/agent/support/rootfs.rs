//! Root file systems for containers: busybox, and little else.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use machinen_protocol::api;

const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 38] = [
    "sh", "true", "false", "cat", "echo", "id", "ls", "env", "sleep", "kill", "touch", "mkdir", "stat",
    "grep", "head", "wc", "dd", "hostname", "mount", "ps", "readlink", "seq", "sort", "tr", "cut", "test",
    "mknod", "nproc", "yes", "chmod", "diff", "stty", "tty", "ln", "mkfifo", "chown", "syslogd", "usleep",
];

/// The agent's disks, as directories.
pub(crate) struct Disks {
    dir: tempfile::TempDir,
}

impl Disks {
    /// Creates a shared base disk at target 0.
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        make_base(&dir.path().join("0-0"));
        Self { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The directory of the tests' base disk, to change it before it is used.
    pub(crate) fn base(&self) -> std::path::PathBuf {
        self.dir.path().join("0-0")
    }

    /// The disks of a container: the base disk, and a writable one of its own, which is kept for the next
    /// container with the same id.
    pub(crate) fn rootfs(&self, id: &str) -> api::Rootfs {
        let lun = id.bytes().fold(7_u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into())) % 1000;
        fs::create_dir_all(self.dir.path().join(format!("1-{lun}"))).unwrap();
        let disk = |target, lun| api::Disk { target, lun, ..Default::default() };
        api::Rootfs {
            base: Some(disk(0, 0)).into(),
            writable: Some(disk(1, lun)).into(),
            ..Default::default()
        }
    }
}

/// Creates a minimal image.
pub(crate) fn make_base(base: &Path) {
    for dir in ["bin", "etc", "tmp", "proc", "sys", "dev", "root"] {
        fs::create_dir_all(base.join(dir)).unwrap();
    }
    fs::copy(BUSYBOX, base.join("bin/busybox")).unwrap();
    for applet in APPLETS {
        symlink("busybox", base.join("bin").join(applet)).unwrap();
    }
    fs::set_permissions(base.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::write(base.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nme:x:1000:1000::/home/me:/bin/sh\n")
        .unwrap();
    fs::write(base.join("etc/group"), "root:x:0:\n").unwrap();
}
