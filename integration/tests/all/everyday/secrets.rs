//! Secrets of a running container, and where they are not.

use std::path::Path;

use anyhow::{Result, ensure};
use machinen_integration::{oci::Oci, process::Invocation};

use super::{background, on_a_host};

on_a_host!(handed_over, in_no_checkpoint);

fn handed_over(oci: &Oci) -> Result<()> {
    background(oci, "s", &["--user", "7:8"], ":")?;
    oci.ok(&["secret", "s", "DB_PASSWORD=a b=c", "EMPTY="])?;
    let read = |name: &str| oci.ok(&["exec", "s", "cat", &format!("/run/secrets/{name}")]);
    ensure!(read("DB_PASSWORD")? == "a b=c" && read("EMPTY")?.is_empty());
    let shown = oci.ok(&["exec", "s", "stat", "-c", "%a %u", "/run/secrets/DB_PASSWORD", "/run/secrets"])?;
    ensure!(shown == "400 7\n755 0\n", "{shown}");
    let mounted = oci.ok(&["exec", "s", "grep", " /run/secrets ", "/proc/mounts"])?;
    ensure!(mounted.starts_with("secrets /run/secrets tmpfs rw,nosuid,nodev,noexec"), "{mounted}");
    // Neither of these can be seen by ps.
    let script = "printf '# comment\\nFROM_STDIN=1\\nDB_PASSWORD=new\\n' | FROM_ENV=2 \"$@\"";
    oci.scripted(script, &["secret", "--env-file", "-", "s", "FROM_ENV"])?.run()?.ok()?;
    ensure!(read("FROM_STDIN")? == "1" && read("FROM_ENV")? == "2" && read("DB_PASSWORD")? == "new");
    oci.ok(&["secret", "--rm", "FROM_ENV", "--rm", "NO_SUCH", "s"])?;
    let listed = oci.ok(&["exec", "s", "ls", "-A", "/run/secrets"])?;
    ensure!(listed == "DB_PASSWORD\nEMPTY\nFROM_STDIN\n", "{listed}");
    refused(oci)?;
    oci.ok(&["delete", "--force", "s"]).map(drop)
}

fn refused(oci: &Oci) -> Result<()> {
    for name in ["a-b", "9a", "../x", ""] {
        oci.fails(&["secret", "s", &format!("{name}=hush")], 1, "is an identifier of the shell")?;
        oci.fails(&["secret", "--rm", name, "s"], 1, "is an identifier of the shell")?;
    }
    oci.fails(&["secret", "s", "A=two\nlines"], 1, "more than one line")?;
    oci.fails(&["secret", "s", "NOT_SET_ANYWHERE"], 1, "NOT_SET_ANYWHERE is not set")?;
    oci.fails(&["secret", "s"], 1, "no secret is given")?;
    oci.fails(&["secret", "none", "A=1"], 1, "there is no container \"none\"")?;
    // One that does not fit, or is not valid, keeps the others from being written.
    oci.fails(&["secret", "s", "GOOD=1", "b-d=2"], 1, "is an identifier")?;
    oci.fails(&["exec", "s", "test", "-e", "/run/secrets/GOOD"], 1, "")?;
    oci.ok(&["pause", "s"])?;
    oci.fails(&["secret", "s", "A=1"], 1, "is paused")?;
    oci.ok(&["resume", "s"])?;
    // What is there must not disappear below the mount.
    background(oci, "o", &[], "mkdir -p /run/secrets; echo x > /run/secrets/own")?;
    oci.fails(&["secret", "o", "A=1"], 1, "/run/secrets of the container is not empty")?;
    ensure!(oci.ok(&["exec", "o", "cat", "/run/secrets/own"])? == "x\n");
    oci.ok(&["delete", "--force", "o"]).map(drop)
}

/// The files below these directories that contain a text.
fn containing(text: &str, dirs: &[&Path]) -> Result<String> {
    let found = Invocation::new("grep").args(["-rlaF", text]).args(dirs).run()?;
    // Files that disappear meanwhile make it 2.
    ensure!(found.status < 2 || found.error_text().contains("No such file"), "{found}");
    Ok(found.text())
}

fn in_no_checkpoint(oci: &Oci) -> Result<()> {
    const VALUE: &str = "hush-5d0c2b7e91";
    const OTHER: &str = "shown-77a1f0c3e2";
    oci.bundle("c", &["sh", "-c", "while :; do sleep 0.1; done"], |_| {})?;
    drop(oci.launch("c")?);
    let script = format!("V={VALUE} \"$@\"");
    oci.scripted(&script, &["secret", "c", "V"])?.run()?.ok()?;
    oci.ok(&["exec", "c", "sh", "-c", &format!("echo {OTHER} > /dev/shm/f")])?;
    let image = oci.file("image");
    let path = image.display().to_string();
    oci.ok(&["checkpoint", "--image-path", &path, "--leave-running", "c"])?;
    ensure!(oci.ok(&["exec", "c", "cat", "/run/secrets/V"])? == VALUE, "the source has lost it");
    let bundle = oci.bundle_dir("c");
    let found = containing(VALUE, &[&image, Path::new(&bundle), oci.host().root()])?;
    ensure!(found.is_empty(), "it is in {found}");
    // The search does find what is in another tmpfs, as soon as CRIU's archive is unpacked.
    let archives = format!("cat {path}/tmpfs-dev-* | gzip -dc 2> /dev/null | grep -c -a {OTHER}");
    let shm = Invocation::new("sh").args(["-c", &archives]).run()?;
    ensure!(shm.status == 0, "the other tmpfs is not in the checkpoint: {shm}");
    let secret = format!("cat {path}/tmpfs-dev-* | gzip -dc 2> /dev/null | grep -c -a {VALUE}");
    let secret = Invocation::new("sh").args(["-c", &secret]).run()?;
    ensure!(secret.status == 1, "it is in an archive of the checkpoint: {secret}");
    oci.ok(&["delete", "--force", "c"])?;
    let restore = ["restore", "--image-path", &path, "--bundle", &bundle, "--detach", "c"];
    let mut restore = oci.command(&restore)?.spawn()?;
    ensure!(restore.wait_for_exit()? == 0, "{:?}", restore.written());
    let listed = oci.ok(&["exec", "c", "ls", "-A", "/run/secrets"])?;
    ensure!(listed.is_empty(), "{listed}");
    oci.ok(&["secret", "c", "AGAIN=1"])?;
    ensure!(oci.ok(&["exec", "c", "cat", "/run/secrets/AGAIN"])? == "1");
    oci.ok(&["delete", "--force", "c"])?;
    held_open(oci)
}

/// A restore could not open the file again.
fn held_open(oci: &Oci) -> Result<()> {
    let wait =
        "until [ -e /run/secrets/V ]; do sleep 0.1; done; exec 3< /run/secrets/V; echo open; sleep 1000";
    oci.bundle("h", &["sh", "-c", wait], |_| {})?;
    let container = oci.launch("h")?;
    oci.ok(&["secret", "h", "V=1"])?;
    container.wait_for_stdout("open\n")?;
    let path = oci.file("held").display().to_string();
    oci.fails(&["checkpoint", "--image-path", &path, "h"], 1, "has /run/secrets/V open, a secret")?;
    oci.has_status("h", "running")?;
    oci.ok(&["delete", "--force", "h"]).map(drop)
}
