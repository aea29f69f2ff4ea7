//! A process of the guest with all rights does not reach other files or devices of the host through a volume.

use std::{fs, os::unix::fs::symlink};

use anyhow::{Result, ensure};
use machinen_integration::{bundle::Bundle, containerd::Containerd};
use serde_json::json;

use super::{bind, source};
use crate::harness::on_newest_containerd;

on_newest_containerd!(from_a_privileged_process);

const CAPABILITIES: [&str; 10] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
];

fn from_a_privileged_process(containerd: &mut Containerd) -> Result<()> {
    let parent = source(containerd)?;
    let data = parent.join("data");
    fs::create_dir(&data)?;
    fs::write(parent.join("above"), "of the host\n")?;
    symlink(parent.join("above"), data.join("absolute"))?;
    symlink("../above", data.join("relative"))?;
    symlink("/etc/shadow", data.join("shadow"))?;
    let script = "cd /data; for path in absolute relative shadow ../above ../../above; do cat $path && echo READ $path; done; \
                  mknod disk b 8 0 && echo MADE; mknod memory c 1 1 && echo MADE; mkfifo fifo && echo fifo; \
                  ln -s /etc own && ls own >/dev/null && echo own; \
                  mkdir /m; mount -t tmpfs none /m && mount --bind /data /m && ls /m/.. | grep -c '^above'; \
                  ls /run/machinen-shares && echo READ shares; true";
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sh", "-c", script], |spec| {
        bind(spec, &data, "/data", &[]);
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = json!(CAPABILITIES);
        }
        spec["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
    })?;
    let output = containerd.run_spec(&config).output()?;
    ensure!(output.status == 0 && output.text() == "fifo\nown\n0\n", "{output}");
    let names: Vec<_> = fs::read_dir(&data)?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(
        !names.iter().any(|name| name == "disk" || name == "memory"),
        "a device node is on the host: {names:?}"
    );
    Ok(())
}
