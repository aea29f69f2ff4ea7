//! Volumes and mounts in Docker's spellings.

use std::{fs, path::PathBuf};

use anyhow::{Result, ensure};
use machinen_integration::{docker::Docker, paths};

use super::with_docker;
use crate::harness::IMAGE;

with_docker!(runc, RUNC: directories_and_files, named_volumes, read_only_and_tmpfs, dockers_own_files, dockers_own_socket);
with_docker!(machinen, MACHINEN: directories_and_files, named_volumes, read_only_and_tmpfs, dockers_own_files, dockers_own_socket);

fn run(docker: &Docker<'_>, runtime: &str, flags: &[&str], script: &str) -> Result<String> {
    docker.ok(&[&["run", "--rm", "--runtime", runtime], flags, &[IMAGE, "sh", "-ec", script]].concat())
}

/// A directory of the host that is removed with the daemon's.
fn dir(docker: &Docker<'_>, name: &str) -> Result<PathBuf> {
    let dir = docker.dir().join(name);
    fs::create_dir(&dir)?;
    Ok(dir)
}

fn directories_and_files(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let data = dir(docker, "shared")?;
    fs::write(data.join("file"), "of the host\n")?;
    let both = format!("{}:/data", data.display());
    let mount = format!("type=bind,source={},target=/single,readonly", data.join("file").display());
    let script =
        "cat /data/file /single; echo of the container > /data/new; echo x > /single || echo refused";
    let output = run(docker, runtime, &["-v", &both, "--mount", &mount], script)?;
    ensure!(output == "of the host\nof the host\nrefused", "{output}");
    ensure!(fs::read_to_string(data.join("new"))? == "of the container\n");
    // dockerd makes a directory that does not exist, for -v only.
    let missing = docker.dir().join("missing");
    run(docker, runtime, &["-v", &format!("{}:/made", missing.display())], "echo made > /made/file")?;
    ensure!(fs::read_to_string(missing.join("file"))? == "made\n");
    [data, missing].iter().try_for_each(fs::remove_dir_all).map_err(Into::into)
}

/// The image's files are copied to a new volume, and it outlives its containers.
fn named_volumes(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let volume = ["-v", "kept:/etc"];
    let output = run(docker, runtime, &volume, "test -e /etc/passwd && echo copied; echo 1 > /etc/number")?;
    ensure!(output == "copied", "{output}");
    let output = run(docker, runtime, &volume, "cat /etc/number; echo 2 > /etc/number")?;
    ensure!(output == "1", "{output}");
    docker.ok(&[
        "run",
        "-d",
        "--name",
        "user",
        "--runtime",
        runtime,
        "-v",
        "kept:/data",
        IMAGE,
        "sleep",
        "1000",
    ])?;
    let output =
        run(docker, runtime, &["--volumes-from", "user"], "cat /data/number; echo 3 > /data/number")?;
    ensure!(output == "2", "{output}");
    let output = docker.ok(&["exec", "user", "cat", "/data/number"])?;
    ensure!(output == "3", "{output}");
    docker.ok(&["rm", "--force", "user"])?;
    docker.ok(&["volume", "rm", "kept"]).map(drop)
}

fn read_only_and_tmpfs(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let script = "echo x > /file 2> /dev/null || echo read-only; echo y > /scratch/file; \
                  grep -o ' /scratch tmpfs rw,nosuid,nodev,noexec' /proc/mounts; df -k /scratch | awk 'END {print $2}'; \
                  df -k /dev/shm | awk 'END {print $2}'";
    let flags = ["--read-only", "--tmpfs", "/scratch:size=1m", "--shm-size", "2m"];
    let output = run(docker, runtime, &flags, script)?;
    let wanted = "read-only\n /scratch tmpfs rw,nosuid,nodev,noexec\n1024\n2048";
    ensure!(output == wanted, "{output}");
    Ok(())
}

/// /etc/hosts, /etc/hostname and /etc/resolv.conf are files of the host that dockerd changes while the container runs.
fn dockers_own_files(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let flags = [
        "--hostname",
        "named",
        "--add-host",
        "there:10.1.2.3",
        "--dns",
        "10.0.0.53",
        "--dns-search",
        "example.org",
    ];
    let script = "cat /etc/hostname; awk '$2 == \"there\" {print $1}' /etc/hosts; grep -v '^#' /etc/resolv.conf | sort";
    let output = run(docker, runtime, &flags, script)?;
    let lines: Vec<_> = output.lines().filter(|line| !line.is_empty()).collect();
    ensure!(lines == ["named", "10.1.2.3", "nameserver 10.0.0.53", "search example.org"], "{output}");
    Ok(())
}

/// A container calls the daemon, as continuous integration and reverse proxies do.
fn dockers_own_socket(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let socket = format!("{}:/var/run/docker.sock", docker.socket().display());
    let python = format!("{}:/w:ro", paths::workspace().join("target/tools/workloads/usr").display());
    let flags = ["-v", &socket, "-v", &python, "-e", "PYTHONHOME=/w", "-e", "PYTHONDONTWRITEBYTECODE=1"];
    let program = "import socket; s = socket.socket(socket.AF_UNIX); s.connect(\"/var/run/docker.sock\"); \
                   s.sendall(b\"GET /_ping HTTP/1.0\\r\\n\\r\\n\"); print(s.makefile().read().splitlines()[-1])";
    let script = format!(
        "/w/lib64/ld-linux-x86-64.so.2 --library-path /w/lib/x86_64-linux-gnu /w/bin/python3.13 -c '{program}'"
    );
    let output = run(docker, runtime, &flags, &script)?;
    ensure!(output == "OK", "{output}");
    Ok(())
}
