//! Volumes whose files kubelet replaces all at once, by the link `..data`: programs that watch them are notified.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{bundle::Bundle, containerd::Containerd, served::Served};
use serde_json::json;

use super::{bind, shell, source};
use crate::{checkpoint::checkpoint, harness::on_newest_containerd};

on_newest_containerd!(
    watchers_get_the_kernels_events,
    events_continue_after_a_restore,
    a_large_volume_is_replaced,
);

/// Writes a version of a volume as kubelet does (Kubernetes, pkg/volume/util/atomic_writer.go): a new directory, the links to
/// it, one rename, and the removal of the former directory.
fn publish(volume: &Path, version: &str, files: &[(&str, &str)]) -> Result<()> {
    let former = fs::read_link(volume.join("..data")).ok();
    let dir = format!("..2026_11_29_{version}");
    for (name, content) in files {
        let path = volume.join(&dir).join(name);
        fs::create_dir_all(path.parent().context("a name")?)?;
        fs::write(path, content)?;
    }
    symlink(&dir, volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    for (name, _) in files {
        let first = name.split('/').next().unwrap_or(name);
        let link = volume.join(first);
        if link.symlink_metadata().is_err() {
            symlink(Path::new("..data").join(first), link)?;
        }
    }
    match former {
        Some(former) => Ok(fs::remove_dir_all(volume.join(former))?),
        None => Ok(()),
    }
}

/// A volume with a first version.
fn published(containerd: &Containerd) -> Result<PathBuf> {
    let volume = source(containerd)?;
    publish(&volume, "1", &[("key", "one\n"), ("dir/key", "one\n")])?;
    Ok(volume)
}

/// Waits in the container until a file there has a line.
fn await_line(served: &Served<'_>, file: &str, line: &str) -> Result<()> {
    let script = format!(
        "for n in $(seq 400); do grep -qxF '{line}' {file} 2>/dev/null && exit 0; usleep 50000; done; cat {file}; exit 1"
    );
    shell(served, &script).map(drop).with_context(|| format!("waiting for {line:?}"))
}

/// Watches the directory, as fsnotify, viper and reloaders do, and a file through its links, as certwatcher does. Writes down
/// each event, and what the file has then.
const WATCHER: &str = r#"
import ctypes, os, struct, time
libc = ctypes.CDLL(None)
fd = libc.inotify_init1(os.O_NONBLOCK)
IN = {0x2: "MODIFY", 0x4: "ATTRIB", 0x40: "MOVED_FROM", 0x80: "MOVED_TO", 0x100: "CREATE", 0x200: "DELETE", 0x400: "DELETE_SELF", 0x8000: "IGNORED"}
def watch(path): return libc.inotify_add_watch(fd, path.encode(), 0x7c6)
names = {watch("/config"): "dir", watch("/config/key"): "file", watch("/config/dir/key"): "deep"}
open("/dev/shm/ready", "w").close()
log = open("/dev/shm/seen", "a")
while True:
    try: data = os.read(fd, 4096)
    except BlockingIOError: time.sleep(0.02); continue
    while data:
        wd, mask, _, length = struct.unpack_from("iIII", data)
        name = data[16:16 + length].rstrip(b"\0").decode()
        data = data[16 + length:]
        where = names[wd]
        log.write(f"{where} {IN[mask & ~0x40000000]} {name}".rstrip() + " " + open("/config/key").read()); log.flush()
        if mask == 0x8000 and where != "dir": names[watch("/config/key" if where == "file" else "/config/dir/key")] = where
"#;
const READY: &str = "until [ -e /dev/shm/ready ]; do usleep 50000; done";

fn watcher(containerd: &Containerd, volume: &Path) -> Result<PathBuf> {
    Bundle::with_workloads(containerd)?.config(&["python3.13", "-c", WATCHER], |spec| {
        bind(spec, volume, "/config", &["ro"]);
        spec["process"]["env"] = json!(["PATH=/usr/bin:/bin", "LC_ALL=C", "PYTHONDONTWRITEBYTECODE=1"]);
    })
}

fn sees(served: &Served<'_>, content: &str) -> Result<()> {
    for event in ["dir MOVED_TO ..data", "file DELETE_SELF", "deep DELETE_SELF"] {
        await_line(served, "/dev/shm/seen", &format!("{event} {content}"))?;
    }
    Ok(())
}

fn watchers_get_the_kernels_events(containerd: &mut Containerd) -> Result<()> {
    let volume = published(containerd)?;
    let served = Served::run(containerd, &watcher(containerd, &volume)?)?;
    shell(&served, READY)?;
    for (version, content) in [("2", "two"), ("3", "three"), ("4", "four")] {
        let text = format!("{content}\n");
        // The names of files that are watched, and not open, are not needed by the kernel.
        shell(&served, "echo 2 >/proc/sys/vm/drop_caches")?;
        publish(&volume, version, &[("key", &text), ("dir/key", &text), ("new", &text)])?;
        sees(&served, content)?;
        ensure!(shell(&served, "cat /config/new /config/..data/key")? == text.repeat(2));
    }
    // The agent's own file is seen neither in the container nor on the host.
    let refused = shell(&served, "! cat /config/..data_machinen; ls -a /config")?;
    ensure!(refused.contains("No such file") && !refused.contains("\n..data_machinen"), "{refused}");
    let mut names: Vec<_> = fs::read_dir(&volume)?.flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    ensure!(names == ["..2026_11_29_4", "..data", "dir", "key", "new"], "{names:?}");
    served.end()
}

fn events_continue_after_a_restore(containerd: &mut Containerd) -> Result<()> {
    let volume = published(containerd)?;
    let config = watcher(containerd, &volume)?;
    let served = Served::run(containerd, &config)?;
    shell(&served, READY)?;
    publish(&volume, "2", &[("key", "two\n"), ("dir/key", "two\n")])?;
    sees(&served, "two")?;
    let dir = containerd.root().join("images");
    checkpoint(&served, &dir)?;
    served.end()?;
    let restored = Served::restored(containerd, &config, &dir)?;
    publish(&volume, "3", &[("key", "three\n"), ("dir/key", "three\n")])?;
    sees(&restored, "three")?;
    restored.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

/// More and larger files than a ConfigMap may have; and versions that follow each other faster than the guest is told.
fn a_large_volume_is_replaced(containerd: &mut Containerd) -> Result<()> {
    let volume = source(containerd)?;
    let names: Vec<String> = (0..5000).map(|number| format!("file-{number}")).collect();
    let big = "x".repeat(3 << 20);
    let version = |number: u32| -> Result<()> {
        let content = format!("{number}\n");
        let small = names.iter().map(|name| (name.as_str(), "small"));
        let files: Vec<_> =
            small.chain([("key", content.as_str()), ("dir/key", &content), ("big", &big)]).collect();
        publish(&volume, &number.to_string(), &files)
    };
    version(1)?;
    let served = Served::run(containerd, &watcher(containerd, &volume)?)?;
    shell(&served, READY)?;
    thread::scope(|scope| scope.spawn(|| (2..6).try_for_each(version)).join()).expect("no panic")?;
    await_line(&served, "/dev/shm/seen", "dir MOVED_TO ..data 5")?;
    ensure!(shell(&served, "cat /config/key; wc -c </config/big")? == "5\n3145728\n");
    served.end()
}
