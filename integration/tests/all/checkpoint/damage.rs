//! Checkpoints that are damaged, made for another system, or written by an attacker.

use std::{
    fs,
    os::unix::fs::{FileExt as _, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use machinen_integration::{bundle::Bundle, containerd::Containerd, served::Served};
use serde_json::{Value, json};
use ttrpc::Code;

use super::{COUNTER, checkpoint, counts_from};
use crate::harness::on_newest_containerd;

on_newest_containerd!(refused_checkpoints, memory_that_has_changed);

/// A kind of damage, the code of the refusal, and a word of the message.
type Case = (&'static str, fn(&Path) -> Result<()>, Code, &'static str);

const CASES: [Case; 14] = [
    (
        "no manifest",
        |dir| Ok(fs::remove_file(dir.join("machinen.json"))?),
        Code::NOT_FOUND,
        "not a checkpoint",
    ),
    ("half a manifest", |dir| shorten(&dir.join("machinen.json")), Code::INVALID_ARGUMENT, "is not valid"),
    ("half an image", |dir| shorten(&dir.join("pages-1.img")), Code::INVALID_ARGUMENT, "pages-1.img"),
    ("no image", |dir| Ok(fs::remove_file(dir.join("core-1.img"))?), Code::INVALID_ARGUMENT, "core-1.img"),
    ("a flipped bit", flip, Code::INVALID_ARGUMENT, "different content"),
    ("two images exchanged", exchange, Code::INVALID_ARGUMENT, "it was truncated or changed"),
    ("a link", link, Code::INVALID_ARGUMENT, "is a link"),
    (
        "a name that leads out",
        |dir| change(dir, "/files/0/name", json!("../../x")),
        Code::INVALID_ARGUMENT,
        "no file of a checkpoint",
    ),
    ("another format", |dir| change(dir, "/format", json!(99)), Code::FAILED_PRECONDITION, "format 99"),
    ("another architecture", |dir| change(dir, "/arch", json!("m68k")), Code::FAILED_PRECONDITION, "m68k"),
    ("a newer kernel", |dir| change(dir, "/kernel", json!("99.1.0")), Code::FAILED_PRECONDITION, "99.1.0"),
    (
        "a CPU of tomorrow",
        |dir| change(dir, "/cpu_flags/0", json!("warp")),
        Code::FAILED_PRECONDITION,
        "lacks: warp",
    ),
    (
        "a mount of the VM's own files",
        |dir| change(dir, "/mounts", json!([{"destination": "/etc", "source": "/run"}])),
        Code::FAILED_PRECONDITION,
        "mounts \"/run\" of the VM at \"/etc\"",
    ),
    ("an invalid limit", |dir| change(dir, "/limits", json!({"../x": "1"})), Code::INVALID_ARGUMENT, "../x"),
];

fn shorten(path: &Path) -> Result<()> {
    let file = fs::File::options().write(true).open(path)?;
    Ok(file.set_len(file.metadata()?.len() / 2)?)
}

fn flip(dir: &Path) -> Result<()> {
    let path = dir.join("pages-1.img");
    let mut content = fs::read(&path)?;
    content[77] ^= 4;
    Ok(fs::write(&path, content)?)
}

fn exchange(dir: &Path) -> Result<()> {
    let [a, b] = ["core-1.img", "mm-1.img"].map(|name| dir.join(name));
    let (first, second) = (fs::read(&a)?, fs::read(&b)?);
    fs::write(a, second)?;
    Ok(fs::write(b, first)?)
}

fn link(dir: &Path) -> Result<()> {
    let path = dir.join("mm-1.img");
    fs::remove_file(&path)?;
    Ok(symlink("/etc/shadow", path)?)
}

fn change(dir: &Path, pointer: &str, value: Value) -> Result<()> {
    let path = dir.join("machinen.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path)?)?;
    if let Some(place) = manifest.pointer_mut(pointer) {
        *place = value;
    }
    Ok(fs::write(path, manifest.to_string())?)
}

fn refused_checkpoints(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sh", "-c", COUNTER], |_| ())?;
    let source = Served::run(containerd, &config)?;
    ensure!(source.exec_to("look", &["sh", "-c", &counts_from(100)], "")? == 0, "no counter");
    let good = containerd.root().join("images");
    checkpoint(&source, &good)?;
    source.end()?;
    let before = containerd.inventory()?;
    for (what, spoil, code, word) in CASES {
        let spoiled = copy(&good, &containerd.root().join("spoiled"))?;
        spoil(&spoiled)?;
        let served = Served::of(containerd, &config)?;
        let mut request = served.shim.create_request();
        request.checkpoint = spoiled.display().to_string();
        let (found, message) = served.client.refused("Create", &request)?;
        ensure!(found == code && message.contains(word), "{what}: {found:?} instead of {code:?}: {message}");
        // The same shim creates the container from the undamaged checkpoint.
        if what == "a newer kernel" {
            request.checkpoint = good.display().to_string();
            served.client.ok::<containerd_shim_protos::api::CreateTaskResponse>("Create", &request)?;
            served.begin()?;
            ensure!(
                served.exec_to("look", &["sh", "-c", &counts_from(100)], "")? == 0,
                "a second try does not work"
            );
            served.end()?;
        } else {
            served.shim.shut_down(&served.client)?;
        }
        fs::remove_dir_all(spoiled)?;
        containerd.settle(&before)?;
    }
    // Incremental checkpoints are refused.
    let served = Served::of(containerd, &config)?;
    let mut request = served.shim.create_request();
    request.checkpoint = good.display().to_string();
    request.parent_checkpoint = request.checkpoint.clone();
    let (code, message) = served.client.refused("Create", &request)?;
    ensure!(code == Code::UNIMPLEMENTED && message.contains("parent"), "{code:?}: {message}");
    served.shim.shut_down(&served.client)?;
    Ok(fs::remove_dir_all(good)?)
}

/// Memory is compared with its digests when it is read: before the start, or while the container runs.
fn memory_that_has_changed(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let holds_memory = "(head -c 16m /dev/zero; touch /ready; exec sleep 100000) | tail -c 16m";
    let config = |lazy: bool| {
        bundle.config(&["sh", "-c", holds_memory], |spec| {
            spec["annotations"]["io.machinen.lazy"] = lazy.to_string().into();
        })
    };
    let source = Served::run(containerd, &config(false)?)?;
    let ready = "until [ -e /ready ]; do usleep 50000; done";
    ensure!(source.exec_to("ready", &["sh", "-c", ready], "")? == 0, "the memory is not there");
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir)?;
    source.end()?;
    let before = containerd.inventory()?;

    let (file, size) = largest(&dir)?;
    let place = size / 2 + 5;
    let mut byte = [0];
    file.read_exact_at(&mut byte, place)?;
    file.write_all_at(&[byte[0] ^ 0x10], place)?;
    let mut served = Served::of(containerd, &config(false)?)?;
    let mut request = served.shim.create_request();
    request.checkpoint = dir.display().to_string();
    let (code, message) = served.client.refused("Create", &request)?;
    ensure!(
        code == Code::INVALID_ARGUMENT && message.contains("has different content"),
        "{code:?}: {message}"
    );
    // With the original bit, the same shim restores the checkpoint.
    file.write_all_at(&byte, place)?;
    served.create_from(&dir)?;
    served.begin()?;
    served.end()?;
    containerd.settle(&before)?;

    let mut served = Served::of(containerd, &config(true)?)?;
    served.create_from(&dir)?;
    file.write_all_at(&[byte[0] ^ 0x10], place)?;
    served.begin()?;
    let status = served.wait("")?.exit_status;
    ensure!(status == 137, "the container ended with {status}");
    let log = served.shim.log()?;
    let logged = log
        .lines()
        .any(|line| line.contains("its memory could not be read") && line.contains("has different content"));
    ensure!(logged, "the log lacks the reason: {log}");
    served.end_stopped()?;
    containerd.settle(&before)?;
    Ok(fs::remove_dir_all(dir)?)
}

/// The file with most of the memory.
fn largest(dir: &Path) -> Result<(fs::File, u64)> {
    let mut largest = None;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        largest = largest.max(Some((entry.metadata()?.len(), entry.path())));
    }
    let (size, path) = largest.context("no files")?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    ensure!(name.starts_with("pages-") && size > 8 << 20, "{name} has {size} bytes");
    Ok((fs::File::options().read(true).write(true).open(path)?, size))
}

fn copy(from: &Path, to: &Path) -> Result<PathBuf> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(to.to_owned())
}
