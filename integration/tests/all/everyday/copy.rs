//! Files between a container and the host.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
};

use anyhow::{Result, ensure};
use machinen_integration::oci::Oci;

use super::{background, on_a_host};

on_a_host!(both_ways, through_links, hostile);

/// A shell command in the container `c`.
fn sh(oci: &Oci, script: &str) -> Result<String> {
    oci.ok(&["exec", "c", "sh", "-c", script])
}

fn both_ways(oci: &Oci) -> Result<()> {
    background(oci, "c", &[], "mkdir -p /d/e; echo from > /d/e/f; chmod 4755 /d/e/f; echo log > /d/x.log")?;
    let out = oci.file("out").display().to_string();
    oci.ok(&["cp", "--exclude", "*.log", "c:/d", &out])?;
    let file = oci.file("out/e/f");
    ensure!(fs::read_to_string(&file)? == "from\n");
    ensure!(fs::metadata(&file)?.permissions().mode() & 0o7777 == 0o755, "setuid came to the host");
    ensure!(!oci.file("out/x.log").exists());
    fs::write(oci.file("out/new"), "a".repeat(3 << 20))?;
    symlink("new", oci.file("out/link"))?;
    oci.ok(&["cp", &format!("{out}/."), "c:/tmp"])?;
    ensure!(sh(oci, "wc -c < /tmp/new; readlink /tmp/link; cat /tmp/e/f")? == "3145728\nnew\nfrom\n");
    oci.ok(&["cp", &format!("{out}/new"), "c:/tmp/named"])?;
    ensure!(sh(oci, "cmp /tmp/new /tmp/named && echo same")? == "same\n");
    let limited =
        oci.output(&["cp", "--max-size", "1M", "c:/tmp/new", &oci.file("big").display().to_string()])?;
    ensure!(limited.status == 1 && limited.error_text().contains("--max-size"), "{limited}");
    for (args, text) in [
        (["cp", "c:/none", &out], "/none does not exist"),
        (["cp", "/no-such", "c:/tmp"], "/no-such does not exist"),
        (["cp", &out, "c:/tmp/named"], "is not a directory"),
    ] {
        oci.fails(&args, 1, text)?;
    }
    oci.ok(&["kill", "c", "KILL"])?;
    let ended = "until \"$@\" | grep -q '\"stopped\"'; do sleep 0.1; done";
    oci.scripted(ended, &["state", "c"])?.run()?.ok()?;
    oci.fails(&["cp", "c:/d", &out], 1, "does not run")?;
    oci.ok(&["delete", "c"]).map(drop)
}

/// As in the container, whose links lead to the container's files.
fn through_links(oci: &Oci) -> Result<()> {
    background(
        oci,
        "c",
        &[],
        "mkdir /real; echo guest > /real/f; ln -s /real /link; ln -s /etc/hostname /name",
    )?;
    let out = oci.file("f").display().to_string();
    oci.ok(&["cp", "c:/link/f", &out])?;
    ensure!(fs::read_to_string(&out)? == "guest\n");
    oci.ok(&["cp", &out, "c:/link/g"])?;
    ensure!(sh(oci, "cat /real/g")? == "guest\n");
    // A link itself is copied as one.
    oci.ok(&["cp", "c:/name", &oci.file("name").display().to_string()])?;
    ensure!(fs::read_link(oci.file("name"))?.ends_with("etc/hostname"));
    oci.ok(&["delete", "--force", "c"]).map(drop)
}

/// Nothing that a container has leads to a file of the host.
fn hostile(oci: &Oci) -> Result<()> {
    let victim = oci.file("victim");
    fs::create_dir(&victim)?;
    fs::write(victim.join("f"), "host")?;
    let target = victim.display().to_string();
    let script = format!(
        "mkdir -p /a /b/out; ln -s {target} /a/out; ln -s {target}/f /direct; echo evil > /b/out/f; mkfifo /b/fifo; \
         ln -s ../../../../../../../../{target} /up"
    );
    background(oci, "c", &[], &script)?;
    let (out, sub) = (oci.file("out").display().to_string(), oci.file("o2").display().to_string());
    oci.fails(&["cp", "c:/a/out/f", &sub], 1, "")?;
    oci.fails(&["cp", "c:/up/f", &sub], 1, "")?;
    oci.fails(&["cp", &image_of(oci), "c:/a/out/f/x"], 1, "")?;
    // A second copy does not go through what the first one has made.
    oci.ok(&["cp", "c:/a/.", &out])?;
    let second = oci.output(&["cp", "c:/b/.", &out])?;
    ensure!(second.status == 1 && second.error_text().contains("is in the way"), "{second}");
    let left_out = oci.output(&["cp", "c:/b", &sub])?.ok()?;
    ensure!(left_out.error_text().contains("fifo"), "{left_out}");
    ensure!(fs::read_to_string(victim.join("f"))? == "host" && fs::read_dir(&victim)?.count() == 1);
    oci.ok(&["delete", "--force", "c"]).map(drop)
}

fn image_of(oci: &Oci) -> String {
    super::image(oci)
}
