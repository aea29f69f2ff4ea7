//! The layer that most tests run: a whole user land in one static program.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::Layer;
use crate::process::Invocation;

const BUSYBOX: &str = "/bin/busybox";

/// Accounts that the tests use: root, and a user with supplementary groups.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000:Alice:/home/alice:/bin/sh\n";
const GROUP: &str = "root:x:0:\nalice:x:1000:\nstaff:x:50:alice\naudio:x:29:alice\n";

pub(super) fn layer() -> Result<Layer> {
    let applets = Invocation::new(BUSYBOX).arg("--list").run().context("busybox-static is not installed")?;
    let applets = applets.ok()?.text();
    ensure!(applets.contains("sh\n"), "{BUSYBOX} has no shell");
    let mut layer = Layer::new();
    for (dir, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("home", 0o755),
        ("proc", 0o555),
        ("root", 0o700),
        ("sys", 0o555),
        ("tmp", 0o1777),
        ("usr", 0o755),
        ("usr/bin", 0o755),
        ("var", 0o755),
    ] {
        layer = layer.dir(dir, mode);
    }
    layer = layer
        .host_file("bin/busybox", Path::new(BUSYBOX))?
        .file("etc/passwd", 0o644, PASSWD)
        .file("etc/group", 0o644, GROUP)
        .dir("home/alice", 0o750)
        .owned_by(1000, 1000)
        .file("bin/setuid", 0o4755, "")
        .file("etc/secret", 0o600, "for root only\n")
        .file("etc/labelled", 0o644, "has an attribute\n")
        .xattr("user.machinen", "kept")
        .file("bin/not-executable", 0o644, "#!/bin/sh\necho reached\n")
        .file("bin/bad-interpreter", 0o755, "#!/no/such/shell\n")
        .hard_link("etc/passwd.link", "etc/passwd");
    let applets = applets.lines().filter(|name| !["busybox", "linuxrc"].contains(name));
    Ok(applets.fold(layer, |layer, name| layer.symlink(&format!("bin/{name}"), "busybox")))
}
