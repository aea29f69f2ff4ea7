//! Trouble in the guest: it panics, hangs, uses another protocol version, or is out of memory. The guest is
//! hostile.

use std::{fs, path::PathBuf};

use anyhow::{Result, ensure};
use machinen_integration::{
    containerd::Containerd,
    paths,
    process::Invocation,
    setup::{Setup, Value},
};

use crate::harness::{IMAGE, fails_saying, on_every_containerd, on_newest_containerd, works};

on_every_containerd!(kernel_panics);
on_newest_containerd!(agent_never_answers, agent_of_another_version, out_of_memory, either_channel);

fn kernel_panics(containerd: &mut Containerd) -> Result<()> {
    let run = containerd.run(IMAGE, &["true"]);
    let run = run.flags(&["--annotation", "io.machinen.kernel-args=root=/dev/no-such-disk"]);
    fails_saying(containerd, &run, &["before its agent answered", "panic"])?;
    works(containerd)
}

/// A guest image whose init is a shell script.
fn image_with_init(containerd: &Containerd, script: &str) -> Result<PathBuf> {
    let (tree, assets) = (containerd.root().join("tree"), containerd.root().join("assets"));
    for dir in [&assets, &tree, &tree.join("sbin"), &tree.join("dev"), &tree.join("bin")] {
        fs::create_dir_all(dir)?;
    }
    fs::copy("/bin/busybox", tree.join("bin/sh"))?;
    fs::write(tree.join("init.sh"), script)?;
    fs::copy(paths::assets().join("vmlinux"), assets.join("vmlinux"))?;
    let image = assets.join("guest.img");
    Invocation::new("mkfs.erofs").arg("--quiet").arg(&image).arg(&tree).run()?.ok()?;
    Ok(assets)
}

fn with_init(containerd: &Containerd, script: &str, timeout: u64) -> Result<Setup> {
    let assets = image_with_init(containerd, script)?;
    Ok(Setup::new()
        .set("assets", "dir", Value::path(&assets))
        .set("vm", "kernel_args", Value::text("init=/bin/sh -- /init.sh"))
        .set("vm", "channel", Value::text("serial"))
        .set("vm", "boot_timeout_s", Value::number(timeout)))
}

fn agent_never_answers(containerd: &mut Containerd) -> Result<()> {
    let script = "echo this is the console\nread forever < /dev/hvc0\nread forever < /dev/hvc0\n";
    containerd.configure(&with_init(containerd, script, 8)?)?;
    let run = containerd.run(IMAGE, &["true"]);
    fails_saying(containerd, &run, &["did not answer within 8s", "this is the console"])?;
    containerd.configure(&Setup::new())?;
    works(containerd)
}

fn agent_of_another_version(containerd: &mut Containerd) -> Result<()> {
    // One yamux frame that opens stream 2 with 24 bytes, and in it a preamble of version 99.
    let frame = r"\000\000\000\001\000\000\000\002\000\000\000\030";
    let preamble = r"machinen\143\000\001\000\000\000\000\000\000\000\000\000\000\000\000\000";
    let script = format!(
        "for port in /dev/vport*p1 /dev/vport*p2; do [ -e $port ] && printf '{frame}{preamble}' > $port; done\n\
         read forever < /dev/hvc0\n"
    );
    containerd.configure(&with_init(containerd, &script, 20)?)?;
    let run = containerd.run(IMAGE, &["true"]);
    fails_saying(containerd, &run, &["version 99"])?;
    containerd.configure(&Setup::new())?;
    works(containerd)
}

fn out_of_memory(containerd: &mut Containerd) -> Result<()> {
    // The container has no limit of its own: the whole guest is out of memory.
    let run = containerd.run(IMAGE, &["tail", "/dev/zero"]);
    let output = run.flags(&["--annotation", "io.machinen.memory-ceiling=192"]).output()?;
    ensure!(output.status == 137, "{output}");
    works(containerd)
}

fn either_channel(containerd: &mut Containerd) -> Result<()> {
    for channel in ["vsock", "serial"] {
        let annotation = format!("io.machinen.channel={channel}");
        let run = containerd.run(IMAGE, &["sh", "-c", "seq 1 200000; echo $(cat | wc -c) >&2; exit 9"]);
        let output = run.flags(&["--annotation", &annotation]).output_of_stdin(&[b'x'; 100_000])?;
        ensure!(output.status == 9 && output.error_text() == "100000\n", "over {channel}: {output}");
        ensure!(output.text().lines().count() == 200_000, "over {channel}: {output}");
    }
    Ok(())
}
