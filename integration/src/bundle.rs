//! Containers with a specification of the test's own: a rootfs directory and a config.json.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{containerd::Containerd, image::Image, paths, process::Invocation};

/// A rootfs in a directory, from which any number of specifications can be made.
#[derive(Debug)]
pub struct Bundle {
    dir: PathBuf,
}

impl Bundle {
    /// Unpacks busybox below the containerd's own directory, which also removes it.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn busybox(containerd: &Containerd) -> Result<Self> {
        Self::busybox_in(containerd.root().join(format!("bundle-{}", containerd.new_id())))
    }

    /// Unpacks busybox into a new directory.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn busybox_in(dir: PathBuf) -> Result<Self> {
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Image::busybox()?.unpack(&dir.join("rootfs"))?;
        Ok(Self { dir })
    }

    /// Like [`Bundle::busybox`], with Python and Redis in addition.
    ///
    /// # Errors
    /// The files cannot be written, or `make setup` has not unpacked them.
    pub fn with_workloads(containerd: &Containerd) -> Result<Self> {
        let bundle = Self::busybox(containerd)?;
        bundle.add_workloads()?;
        Ok(bundle)
    }

    /// Adds Python and Redis.
    ///
    /// # Errors
    /// The files cannot be written, or `make setup` has not unpacked them.
    pub fn add_workloads(&self) -> Result<()> {
        let rootfs = self.rootfs();
        let usr = paths::workspace().join("target/tools/workloads/usr/.");
        Invocation::new("cp").arg("-a").arg(usr).arg(rootfs.join("usr")).run()?.ok()?;
        for name in ["lib", "lib64"] {
            symlink(format!("usr/{name}"), rootfs.join(name))?;
        }
        Ok(())
    }

    /// The directory of the bundle.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Writes a specification that runs the command, changed by the caller, and returns its path.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn config(&self, command: &[&str], change: impl FnOnce(&mut Value)) -> Result<PathBuf> {
        let mut spec = self.spec(command);
        change(&mut spec);
        self.config_text(&spec.to_string())
    }

    /// Writes any text in the place of a specification.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn config_text(&self, text: &str) -> Result<PathBuf> {
        let path = self.dir.join("config.json");
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// The specification of most containers: the usual mounts, namespaces of their own, few capabilities.
    fn spec(&self, command: &[&str]) -> Value {
        let capabilities =
            ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID"];
        let namespaces = ["pid", "ipc", "uts", "mount", "network"].map(|kind| json!({ "type": kind }));
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "args": command,
                "env": ["PATH=/usr/bin:/bin"],
                "cwd": "/",
                "user": { "uid": 0, "gid": 0 },
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                },
                "noNewPrivileges": true,
            },
            "root": { "path": self.rootfs() },
            "mounts": [
                mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
                mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
                mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666"]),
                mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=8192k"]),
                mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
                mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            ],
            "linux": { "namespaces": namespaces },
        })
    }
}

/// One element of a specification's `mounts`.
pub fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": source, "options": options })
}
