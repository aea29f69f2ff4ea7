//! A checkpoint's images are readable for tools that read CRIU's images: crit(1) and checkpointctl(1).

use std::{fs, path::Path};

use anyhow::{Result, ensure};
use machinen_integration::{
    bundle::Bundle, containerd::Containerd, paths, process::Invocation, served::Served,
};
use serde_json::{Value, json};

use super::checkpoint;
use crate::harness::on_newest_containerd;

on_newest_containerd!(
    crit_reads_every_image,
    checkpointctl_reads_an_archive,
    a_pre_dump_leaves_nothing_to_look_for
);

/// A program of another Debian release than the host's, with its own libraries.
pub(crate) fn tool(program: &str) -> Invocation {
    let root = paths::workspace().join("target/tools/inspect/usr");
    let lib = root.join("lib/x86_64-linux-gnu");
    Invocation::new(lib.join("ld-linux-x86-64.so.2"))
        .arg("--library-path")
        .arg(lib)
        .arg(root.join("bin").join(program))
        .env("PYTHONHOME", &root)
        .env("PYTHONPATH", root.join("lib/python3/dist-packages"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
}

fn crit(args: &[&str], path: &Path) -> Result<String> {
    let crit = paths::workspace().join("target/tools/inspect/usr/bin/crit");
    let [verb, more @ ..] = args else { unreachable!("crit has verbs") };
    Ok(tool("python3.13").arg(crit).arg(*verb).arg(path).args(more.iter().copied()).run()?.ok()?.text())
}

/// A checkpoint of a container with two processes, and its configuration.
fn taken(containerd: &Containerd, annotation: Option<&str>) -> Result<(std::path::PathBuf, Value)> {
    let bundle = Bundle::busybox(containerd)?;
    let script = "echo content > /tmp/file; exec 5</tmp/file; sleep 1000 & x=$(head -c 9m /dev/zero | tr '\\0' x); \
                  touch /tmp/ready; while :; do sleep 1; done";
    let config = bundle.config(&["sh", "-c", script], |spec| {
        if let Some(name) = annotation {
            spec["annotations"][name] = "true".into();
        }
    })?;
    let spec = serde_json::from_slice(&fs::read(&config)?)?;
    let served = Served::run(containerd, &config)?;
    let ready = "mkdir -p /tmp; until [ -e /tmp/ready ]; do usleep 50000; done";
    ensure!(served.exec_to("ready", &["sh", "-c", ready], "")? == 0, "the container does not get ready");
    let dir = containerd.root().join("images");
    checkpoint(&served, &dir)?;
    served.end()?;
    Ok((dir, spec))
}

fn crit_reads_every_image(containerd: &mut Containerd) -> Result<()> {
    let (dir, _) = taken(containerd, None)?;
    let processes = crit(&["x", "ps"], &dir)?;
    ensure!(processes.lines().filter(|line| line.contains("sleep")).count() >= 1, "crit shows {processes}");
    let files = crit(&["x", "fds"], &dir)?;
    ensure!(files.contains("/tmp/file"), "crit shows {files}");
    let mut read = 0;
    for entry in fs::read_dir(&dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Those files contain pages, or are archives of tar.
        if name.ends_with(".img") && !name.starts_with("pages-") && !name.contains(".tar") {
            let decoded = crit(&["info"], &path)?;
            let decoded: Value = serde_json::from_str(&decoded)?;
            ensure!(decoded["magic"].is_string(), "{name}: {decoded}");
            read += 1;
        }
    }
    ensure!(read > 10, "only {read} images");
    Ok(fs::remove_dir_all(&dir)?)
}

fn checkpointctl_reads_an_archive(containerd: &mut Containerd) -> Result<()> {
    let (dir, mut spec) = taken(containerd, None)?;
    // The archive that an engine makes of a runtime's checkpoint directory.
    let archive = containerd.root().join("archive");
    fs::create_dir(&archive)?;
    fs::rename(&dir, archive.join("checkpoint"))?;
    fs::copy(archive.join("checkpoint/stats-dump"), archive.join("stats-dump"))?;
    spec["annotations"] = json!({"io.container.manager": "libpod"});
    fs::write(archive.join("spec.dump"), spec.to_string())?;
    let config = json!({
        "id": "0123456789abcdef", "name": "counter", "rootfsImageName": "busybox", "runtime": "io.machinen.v1",
        "createdTime": "2026-01-01T00:00:00Z", "checkpointedTime": "2026-01-01T00:00:00Z",
    });
    fs::write(archive.join("config.dump"), config.to_string())?;
    let file = containerd.root().join("archive.tar");
    Invocation::new("tar").arg("-C").arg(&archive).arg("-cf").arg(&file).arg(".").run()?.ok()?;
    let shown = tool("checkpointctl").args(["inspect", "--all"]).arg(&file).run()?.ok()?.text();
    for word in ["counter", "io.machinen.v1", "Process tree", "sleep", "/tmp/file", "CRIU dump statistics"] {
        ensure!(shown.contains(word), "no {word:?} in\n{shown}");
    }
    fs::remove_file(&file)?;
    Ok(fs::remove_dir_all(&archive)?)
}

/// The checkpoint's lists of pages name no earlier dump.
fn a_pre_dump_leaves_nothing_to_look_for(containerd: &mut Containerd) -> Result<()> {
    let (dir, _) = taken(containerd, Some("io.machinen.pre-dump"))?;
    let mut bytes = 0;
    for entry in fs::read_dir(&dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        ensure!(name != "parent", "there is a link to another dump");
        if !name.starts_with("pagemap-") {
            continue;
        }
        let list: Value = serde_json::from_str(&crit(&["show"], &path)?)?;
        let entries = list["entries"].as_array().map_or(&[][..], Vec::as_slice);
        let (head, entries) = entries.split_first().unwrap_or((&Value::Null, &[]));
        ensure!(!list.to_string().contains("PE_PARENT"), "{name}: {list}");
        let pages: u64 = entries
            .iter()
            .filter(|entry| entry["flags"].as_str().is_some_and(|flags| flags.contains("PE_PRESENT")))
            .filter_map(|entry| entry["nr_pages"].as_u64())
            .sum();
        let file = dir.join(format!("pages-{}.img", head["pages_id"]));
        ensure!(fs::metadata(&file)?.len() == pages * 4096, "{name} has {pages} pages: {list}");
        bytes += pages * 4096;
    }
    ensure!(bytes > 9 << 20, "only {bytes} bytes of pages");
    Ok(fs::remove_dir_all(&dir)?)
}
