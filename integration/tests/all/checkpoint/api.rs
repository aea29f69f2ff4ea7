//! The behaviour that the task API guarantees for a checkpoint and for a container that is created from one.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{
    api::{CloseIORequest, DeleteResponse, Empty, PauseRequest, ResumeRequest, Status},
    shim::oci::CheckpointOptions,
};
use machinen_integration::{
    bundle::{self, Bundle},
    containerd::Containerd,
    image::hex,
    paths,
    process::{DEADLINE, Invocation},
    served::Served,
};
use nix::{sys::stat::Mode, unistd::mkfifo};
use sha2::{Digest as _, Sha256};
use ttrpc::Code;

use super::{COUNTER, checkpoint, counts_from, refused, request};
use crate::harness::on_newest_containerd;

on_newest_containerd!(
    a_checkpoint_and_its_source,
    nothing_runs_before_start,
    output_continues,
    deleted_with_images_in_the_guest,
    in_the_vm_of_others_only_by_its_digest
);

fn a_checkpoint_and_its_source(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sh", "-c", COUNTER], |_| ())?;
    let served = Served::run(containerd, &config)?;
    let dir = |name: &str| containerd.root().join(name);
    let continues = |from: u32| {
        let status = served.exec_to("look", &["sh", "-c", &counts_from(from)], "")?;
        ensure!(status == 0, "the counter does not continue: {status}");
        Ok(())
    };
    continues(100)?;
    // The container runs; the request has the default options.
    checkpoint(&served, &dir("first"))?;
    served.is("", Status::RUNNING, served.pid)?;
    continues(102)?;
    complete(&dir("first"))?;
    small_trees_are_archived_by_the_agent(&dir("first"))?;
    // The client pauses the container, and resumes it after the checkpoint.
    let id = || served.shim.id.clone();
    served.client.ok::<Empty>("Pause", &PauseRequest { id: id(), ..Default::default() })?;
    checkpoint(&served, &dir("second"))?;
    served.is("", Status::PAUSED, served.pid)?;
    served.client.ok::<Empty>("Resume", &ResumeRequest { id: id(), ..Default::default() })?;
    continues(104)?;
    // A directory with other files, and one with an earlier checkpoint.
    let (code, message) = refused(&served.client, &request(&served, containerd.root(), None)?)?;
    ensure!(code == Code::ALREADY_EXISTS && message.contains("is not empty"), "{code:?}: {message}");
    checkpoint(&served, &dir("second"))?;
    complete(&dir("second"))?;
    continues(104)?;
    // The last checkpoint: in two directories, with its reports in a third.
    let path = |name: &str| dir(name).display().to_string();
    let options = CheckpointOptions {
        exit: true,
        image_path: path("also"),
        work_path: path("work"),
        ..Default::default()
    };
    served.client.ok::<Empty>("Checkpoint", &request(&served, &dir("third"), Some(&options))?)?;
    let exit = served.wait("")?.exit_status;
    ensure!(exit == 137, "the container ended with {exit}");
    ensure!(complete(&dir("third"))? == complete(&dir("also"))?, "the two places differ");
    for name in ["dump.log", "stats-dump"] {
        ensure!(dir("work").join(name).is_file(), "{name} is missing");
    }
    served.end_stopped()?;
    command_line(containerd, &served.shim.id)?;
    ["second", "third", "also", "work"].iter().try_for_each(|name| Ok(fs::remove_dir_all(dir(name))?))
}

/// The output of `machinen snapshot` for these checkpoints.
fn command_line(containerd: &Containerd, id: &str) -> Result<()> {
    let program = paths::release_dir()?.join("machinen");
    let snapshot = |args: &[&str]| {
        Invocation::new(&program).arg("snapshot").args(args).current_dir(containerd.root()).run()
    };
    let listed = snapshot(&["ls", "."])?.ok()?.text();
    for word in ["first", "second", "third", id] {
        ensure!(listed.contains(word), "{word} is not in {listed}");
    }
    let inspected = snapshot(&["inspect", "first"])?.ok()?.text();
    for word in ["kernel 6.", "criu       4.", "pids.max", id] {
        ensure!(inspected.contains(word), "{word} is not in {inspected}");
    }
    let verified = snapshot(&["verify", "first", "third"])?.ok()?.text();
    ensure!(verified == "first ok\nthird ok\n", "{verified}");
    let image = containerd.root().join("first/core-1.img");
    let mut content = fs::read(&image)?;
    content[20] ^= 1;
    fs::write(&image, content)?;
    let verified = snapshot(&["verify", "first", "third"])?;
    ensure!(verified.status == 1 && verified.text().contains("core-1.img"), "{verified}");
    snapshot(&["rm", "first"])?.ok()?;
    ensure!(!containerd.root().join("first").exists(), "the checkpoint is still there");
    let nothing = snapshot(&["inspect", "first"])?;
    ensure!(nothing.status == 1 && nothing.error_text().contains("is not a checkpoint"), "{nothing}");
    Ok(())
}

/// Every file of the manifest exists, without subdirectories and with the recorded size and digest, and is of
/// a kind that CRIU's tools recognize.
pub(super) fn complete(dir: &Path) -> Result<BTreeMap<String, String>> {
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(dir.join("machinen.json"))?)?;
    ensure!(manifest["format"] == 1 && manifest["arch"] == "x86_64", "{manifest}");
    for field in ["kernel", "criu", "container", "config"] {
        ensure!(manifest[field].as_str().is_some_and(|text| !text.is_empty()), "no {field}: {manifest}");
    }
    let mut files = BTreeMap::new();
    for file in manifest["files"].as_array().context("no files")? {
        let name = file["name"].as_str().context("no name")?;
        let content = fs::read(dir.join(name))?;
        let digest = hex(&Sha256::digest(&content));
        ensure!(file["size"] == content.len() && file["sha256"] == digest.as_str(), "{name} differs");
        // crit(1) and checkpointctl(1) examine the first words: CRIU's images have a common magic number and
        // one of their own, except the inventory, which is older than this rule.
        if name.ends_with(".img") && !name.contains("tmpfs") && !name.starts_with("pages-") {
            ensure!(content.len() >= 8, "{name} is empty");
            let magic = u32::from_le_bytes(content[..4].try_into()?);
            ensure!(
                [0x5456_4319, 0x5510_5940, 0x5831_3116].contains(&magic),
                "{name} begins with {magic:#x}"
            );
        }
        files.insert(name.to_owned(), digest);
    }
    for name in ["inventory.img", "pstree.img", "core-1.img", "pages-1.img", "stats-dump"] {
        ensure!(files.contains_key(name), "{name} is missing");
    }
    let entries = fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    for entry in &entries {
        ensure!(entry.file_type()?.is_file(), "{:?} is no file", entry.path());
    }
    ensure!(entries.len() == files.len() + 1, "there are more files than the manifest names");
    Ok(files)
}

fn nothing_runs_before_start(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    // The root file system of the two is not the same, so the pipe has no name when it is checkpointed.
    let script = format!("mkfifo /p 2>/dev/null; exec 3<>/p; rm /p; {COUNTER}");
    let config = bundle.config(&["sh", "-c", &script], |_| ())?;
    let source = Served::run(containerd, &config)?;
    let status = source.exec_to("look", &["sh", "-c", &counts_from(100)], "")?;
    ensure!(status == 0, "no counter: {status}");
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir)?;
    source.end()?;
    let mut restored = Served::of(containerd, &config)?;
    restored.create_from(&dir)?;
    restored.is("", Status::CREATED, restored.pid)?;
    // The restored container does not need the checkpoint's files any more.
    fs::remove_dir_all(&dir)?;
    // A file that the restored processes would change within a twentieth of a second.
    let still = "cd /dev/shm; a=$(cat count); usleep 500000; [ $a = $(cat count) ]";
    let status = restored.exec_to("still", &["sh", "-c", still], "")?;
    ensure!(status == 0, "the container runs before its start");
    restored.begin()?;
    restored.is("", Status::RUNNING, restored.pid)?;
    let status = restored.exec_to("look", &["sh", "-c", &counts_from(102)], "")?;
    ensure!(status == 0, "the counter does not continue: {status}");
    // Another checkpoint, of the restored container; the container that is created from it is never started.
    checkpoint(&restored, &dir)?;
    let mut unused = Served::of(containerd, &config)?;
    unused.create_from(&dir)?;
    unused.end_stopped()?;
    restored.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

fn deleted_with_images_in_the_guest(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let script = "(head -c 100m /dev/zero; touch /tmp/ready; sleep 1000) | tail -c 100m";
    let config = bundle.config(&["sh", "-c", script], |spec| {
        spec["annotations"] = serde_json::json!({"io.machinen.lazy": "true"});
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(bundle::mount("/tmp", "tmpfs", "tmpfs", &["mode=1777"]));
    })?;
    let source = Served::run(containerd, &config)?;
    let ready = "until [ -e /tmp/ready ]; do usleep 50000; done";
    ensure!(source.exec_to("ready", &["sh", "-c", ready], "")? == 0, "the container does not get ready");
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir)?;
    source.end()?;
    let pod = Served::idle(containerd)?;
    for starts in [false, true] {
        let mut restored = pod.in_same_vm(containerd, &config)?;
        restored.create_from(&dir)?;
        if starts {
            restored.begin()?;
            restored.client.ok::<Empty>("Kill", &restored.kill("", 9))?;
            restored.wait("")?;
        }
        restored.client.ok::<DeleteResponse>("Delete", &restored.delete(""))?;
        fs::remove_dir_all(&restored.shim.bundle)?;
        let created = pod.shim.log()?.matches("container created").count();
        ensure!(created == 2 + usize::from(starts), "{created} containers were created");
        no_trouble(&pod).with_context(|| format!("started: {starts}"))?;
    }
    // A container whose checkpoint was not written, while the guest still had messages about it.
    let mut source = pod.in_same_vm(containerd, &config)?;
    source.create(|_| ())?;
    source.begin()?;
    ensure!(source.exec_to("ready", &["sh", "-c", ready], "")? == 0, "the container does not get ready");
    let (code, message) = refused(&source.client, &request(&source, &dir.join("no/place"), None)?)?;
    ensure!(message.contains("images/no/place"), "{code:?}: {message}");
    source.client.ok::<Empty>("Kill", &source.kill("", 9))?;
    source.wait("")?;
    source.client.ok::<DeleteResponse>("Delete", &source.delete(""))?;
    fs::remove_dir_all(&source.shim.bundle)?;
    no_trouble(&pod)?;
    pod.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

/// A checkpoint may have been written by anybody, and its processes could be root in the VM of others.
fn in_the_vm_of_others_only_by_its_digest(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sh", "-c", COUNTER], |_| ())?;
    let source = Served::run(containerd, &config)?;
    ensure!(source.exec_to("look", &["sh", "-c", &counts_from(100)], "")? == 0, "no counter");
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir)?;
    source.end()?;
    let printed = containerd.machinen(&["snapshot", "inspect", "--json"])?.arg(&dir).run()?.ok()?.text();
    let printed: serde_json::Value = serde_json::from_str(&printed)?;
    let digest = printed["digest"].as_str().context("no digest")?;
    let other = format!("sha256:{}", "0".repeat(64));
    // Another digest is refused in any VM.
    let alone = Served::of(containerd, &config)?;
    alone.pin(&other)?;
    let pod = Served::idle(containerd)?;
    let joining = pod.in_same_vm(containerd, &config)?;
    for (served, word) in [(&alone, &*other), (&joining, "io.machinen.checkpoint-digest")] {
        let mut request = served.shim.create_request();
        request.checkpoint = dir.display().to_string();
        let (code, message) = served.client.refused("Create", &request)?;
        ensure!(code == Code::FAILED_PRECONDITION && message.contains(word), "{code:?}: {message}");
    }
    alone.pin(digest)?;
    joining.pin(digest)?;
    for served in [&alone, &joining] {
        let mut request = served.shim.create_request();
        request.checkpoint = dir.display().to_string();
        served.client.ok::<containerd_shim_protos::api::CreateTaskResponse>("Create", &request)?;
        served.begin()?;
        ensure!(served.exec_to("look", &["sh", "-c", &counts_from(102)], "")? == 0, "it does not continue");
        served.client.ok::<Empty>("Kill", &served.kill("", 9))?;
        served.wait("")?;
        served.client.ok::<DeleteResponse>("Delete", &served.delete(""))?;
    }
    alone.shim.shut_down(&alone.client)?;
    fs::remove_dir_all(&joining.shim.bundle)?;
    pod.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

/// The shim has logged no warning or error, but for the one about a host without KVM.
fn no_trouble(pod: &Served<'_>) -> Result<()> {
    let log = pod.shim.log()?;
    let is_trouble = |line: &&str| {
        let is_loud = ["warn", "error"].iter().any(|level| line.contains(&format!("level={level}")));
        is_loud && !line.contains("guests run by translation")
    };
    let trouble: Vec<_> = log.lines().filter(is_trouble).collect();
    ensure!(trouble.is_empty(), "the shim has logged {trouble:#?}");
    Ok(())
}

fn output_continues(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let script = "i=0; while read -r word; do i=$((i+1)); echo $i $word; echo $i >&2; done; echo end";
    let config = bundle.config(&["sh", "-c", script], |_| ())?;
    let root = containerd.root().to_owned();
    let file = |name: &str| root.join(name);
    let stdio = |request: &mut containerd_shim_protos::api::CreateTaskRequest, name: &str| {
        let uri = |kind: &str| format!("file://{}", file(&format!("{name}.{kind}")).display());
        request.stdin = file(&format!("{name}.in")).display().to_string();
        (request.stdout, request.stderr) = (uri("out"), uri("err"));
    };
    let input = |name: &str| -> Result<fs::File> {
        let path = file(&format!("{name}.in"));
        mkfifo(&path, Mode::S_IRWXU)?;
        Ok(fs::File::options().read(true).write(true).open(path)?)
    };
    let has = |name: &str, text: &str| -> Result<()> {
        let end = Instant::now() + DEADLINE;
        while fs::read_to_string(file(name)).unwrap_or_default() != text {
            ensure!(Instant::now() < end, "{name} has {:?}", fs::read_to_string(file(name)));
            #[expect(clippy::disallowed_methods, reason = "a change of a file has no event")]
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    };
    let mut first = input("first")?;
    let mut source = Served::of(containerd, &config)?;
    source.create(|request| stdio(request, "first"))?;
    source.begin()?;
    first.write_all(b"a\nb\n")?;
    has("first.out", "1 a\n2 b\n")?;
    let dir = file("images");
    checkpoint(&source, &dir)?;
    first.write_all(b"c\n")?;
    has("first.out", "1 a\n2 b\n3 c\n")?;
    source.end()?;
    let mut second = input("second")?;
    let mut restored = Served::of(containerd, &config)?;
    restored.create(|request| {
        stdio(request, "second");
        request.checkpoint = dir.display().to_string();
    })?;
    restored.begin()?;
    second.write_all(b"d\n")?;
    has("second.out", "3 d\n")?;
    has("second.err", "3\n")?;
    // The end of input is passed on too.
    let close = CloseIORequest { id: restored.shim.id.clone(), stdin: true, ..Default::default() };
    drop(second);
    restored.client.ok::<Empty>("CloseIO", &close)?;
    ensure!(restored.wait("")?.exit_status == 0, "the container does not end with 0");
    has("second.out", "3 d\nend\n")?;
    restored.end_stopped()?;
    for name in
        ["first", "second"].iter().flat_map(|name| ["in", "out", "err"].map(|kind| format!("{name}.{kind}")))
    {
        fs::remove_file(file(&name))?;
    }
    Ok(fs::remove_dir_all(&dir)?)
}

/// Archives of the agent do not name the system that has made them, while those of gzip do (RFC 1952, 2.3).
fn small_trees_are_archived_by_the_agent(dir: &Path) -> Result<()> {
    const UNKNOWN: u8 = 255;
    let mut archives = 0;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.display().to_string().ends_with(".tar.gz.img") {
            archives += 1;
            ensure!(fs::read(&path)?.get(9) == Some(&UNKNOWN), "{} is of GNU tar and gzip", path.display());
        }
    }
    ensure!(archives > 0, "there is no tmpfs");
    Ok(())
}
