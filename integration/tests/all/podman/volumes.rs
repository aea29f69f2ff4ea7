//! Volumes and mounts in Podman's spellings.

use std::{fs, path::PathBuf};

use anyhow::{Result, ensure};
use machinen_integration::podman::{Podman, PodmanCommands as _};

use super::{IMAGE, remove, script, start, with_podman};

with_podman!(directories_and_files, named_volumes, volumes_of_another, overlays, tmpfs);

/// A directory of the host that is removed with the host.
fn dir(podman: &Podman, name: &str) -> Result<PathBuf> {
    let dir = podman.dir().join(name);
    fs::create_dir(&dir)?;
    Ok(dir)
}

fn directories_and_files(podman: &Podman) -> Result<()> {
    let data = dir(podman, "shared")?;
    fs::write(data.join("file"), "of the host\n")?;
    let (both, read_only) = (format!("{}:/data", data.display()), format!("{}:/ro:ro", data.display()));
    let mount = format!("type=bind,source={},target=/single,readonly", data.join("file").display());
    let text = "cat /data/file /single; echo of the container > /data/new; echo x > /single || echo refused; \
                echo x > /ro/file || echo refused";
    let flags = ["-v", &both, "--mount", &mount, "-v", &read_only];
    let output = script(podman, &flags, &format!("({text}) 2> /dev/null"))?;
    ensure!(output == "of the host\nof the host\nrefused\nrefused", "{output}");
    ensure!(fs::read_to_string(data.join("new"))? == "of the container\n");
    // A directory that does not exist is an error.
    let missing = format!("{}:/made", podman.dir().join("missing").display());
    let refused = podman.output(&["run", "--rm", "-v", &missing, IMAGE, "true"])?;
    ensure!(refused.status == 125 && refused.error_text().contains("missing"), "{refused}");
    Ok(fs::remove_dir_all(data)?)
}

/// The image's files are copied to a new volume, and it outlives its containers.
fn named_volumes(podman: &Podman) -> Result<()> {
    let volume = ["-v", "kept:/etc"];
    let output = script(podman, &volume, "test -e /etc/passwd && echo copied; echo 1 > /etc/number")?;
    ensure!(output == "copied", "{output}");
    let output = script(
        podman,
        &["--mount", "type=volume,source=kept,target=/data"],
        "cat /data/number; echo 2 > /data/number",
    )?;
    ensure!(output == "1", "{output}");
    let place = podman.ok(&["volume", "inspect", "--format", "{{.Mountpoint}}", "kept"])?;
    ensure!(fs::read_to_string(PathBuf::from(place).join("number"))? == "2\n");
    podman.ok(&["volume", "rm", "kept"]).map(drop)
}

fn volumes_of_another(podman: &Podman) -> Result<()> {
    podman.ok(&["volume", "create", "shared"])?;
    start(
        podman,
        "user",
        &["-v", "shared:/data"],
        "echo 1 > /data/number; until [ -e /data/end ]; do sleep 0.1; done; cat /data/end",
    )?;
    let text = "until cat /data/number; do sleep 0.1; done 2> /dev/null; echo seen > /data/end";
    let output = script(podman, &["--volumes-from", "user"], text)?;
    ensure!(output == "1", "{output}");
    ensure!(podman.ok(&["wait", "user"])? == "0");
    ensure!(podman.ok(&["logs", "user"])? == "seen");
    remove(podman, "user")?;
    podman.ok(&["volume", "rm", "shared"]).map(drop)
}

/// `:O` gives the container a copy of its own; machinen refuses the mount by its type.
fn overlays(podman: &Podman) -> Result<()> {
    let data = dir(podman, "lower")?;
    fs::write(data.join("file"), "of the host\n")?;
    let overlay = format!("{}:/data:O", data.display());
    fs::create_dir_all(data.join("deep/er"))?;
    fs::write(data.join("removed"), "")?;
    let text = "echo changed > /data/file; cat /data/file; rm /data/removed; rm -r /data/deep; mkdir /data/deep; \
                mv /data/file /data/moved; ls -A /data /data/deep";
    let output = script(podman, &["-v", &overlay], text)?;
    ensure!(output == "changed\n/data:\ndeep\nmoved\n\n/data/deep:", "{output}");
    ensure!(fs::read_to_string(data.join("file"))? == "of the host\n" && data.join("deep/er").is_dir());
    ensure!(data.join("removed").is_file());
    Ok(fs::remove_dir_all(data)?)
}

/// A tmpfs hides what the image has at its place, or, as with Podman's `--tmpfs`, begins with a copy of it.
fn tmpfs(podman: &Podman) -> Result<()> {
    let flags = ["--mount", "type=tmpfs,target=/scratch,tmpfs-size=1m", "--tmpfs", "/etc"];
    let text =
        "df -k /scratch | awk 'END {print $2}'; head -n 1 /etc/passwd; grep -c ' /etc tmpfs ' /proc/mounts";
    let output = script(podman, &flags, text)?;
    ensure!(output == "1024\nroot:x:0:0:root:/root:/bin/sh\n1", "{output}");
    Ok(())
}
