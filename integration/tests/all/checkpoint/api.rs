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
    api::{
        CheckpointTaskRequest, CloseIORequest, DeleteResponse, Empty, PauseRequest, ResumeRequest,
        StartResponse, Status,
    },
    shim::oci::CheckpointOptions,
};
use machinen_integration::{
    bundle::{self, Bundle},
    containerd::Containerd,
    image::hex,
    paths,
    process::{DEADLINE, Invocation},
    served::Served,
    setup::{Setup, Value},
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount, umount2},
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};
use sha2::{Digest as _, Sha256};
use ttrpc::Code;

use super::{COUNTER, checkpoint, counts_from, refused, request};
use crate::harness::on_newest_containerd;

on_newest_containerd!(
    files_and_who_goes_on,
    nothing_runs_before_start,
    output_goes_on,
    deleted_with_images_in_the_guest,
    what_fails_leaves_the_source_running,
    no_room_for_what_the_guest_writes,
    killed_while_it_is_taken,
    shim_killed_while_it_writes
);

fn files_and_who_goes_on(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sh", "-c", COUNTER], |_| ())?;
    let served = Served::run(containerd, &config)?;
    let dir = |name: &str| containerd.root().join(name);
    let goes_on = |from: u32| {
        let status = served.exec_to("look", &["sh", "-c", &counts_from(from)], "")?;
        ensure!(status == 0, "the counter does not go on: {status}");
        Ok(())
    };
    goes_on(100)?;
    // The container runs; the request has the default options.
    checkpoint(&served, &dir("first"))?;
    served.is("", Status::RUNNING, served.pid)?;
    goes_on(102)?;
    complete(&dir("first"))?;
    small_trees_are_archived_by_the_agent(&dir("first"))?;
    // The client pauses the container, and resumes it after the checkpoint.
    let id = || served.shim.id.clone();
    served.client.ok::<Empty>("Pause", &PauseRequest { id: id(), ..Default::default() })?;
    checkpoint(&served, &dir("second"))?;
    served.is("", Status::PAUSED, served.pid)?;
    served.client.ok::<Empty>("Resume", &ResumeRequest { id: id(), ..Default::default() })?;
    goes_on(104)?;
    // A directory in use.
    let (code, message) = refused(&served.client, &request(&served, &dir("first"), None)?)?;
    ensure!(code == Code::ALREADY_EXISTS && message.contains("is not empty"), "{code:?}: {message}");
    goes_on(104)?;
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
    ensure!(exit == 137, "it ended with {exit}");
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
    ensure!(!containerd.root().join("first").exists(), "it is still there");
    let nothing = snapshot(&["inspect", "first"])?;
    ensure!(nothing.status == 1 && nothing.error_text().contains("is not a checkpoint"), "{nothing}");
    Ok(())
}

/// Every file of the manifest exists, without subdirectories and with the recorded size and digest, and is of
/// a kind that CRIU's tools recognize.
fn complete(dir: &Path) -> Result<BTreeMap<String, String>> {
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
    // The count is kept in a pipe and in memory only: the root file system of the two is not the same.
    let script = "mkfifo /p 2>/dev/null; i=100; exec 3<>/p; rm /p; while :; do i=$((i+1)); echo $i >/count; \
                  usleep 50000; done";
    let config = bundle.config(&["sh", "-c", script], |_| ())?;
    let source = Served::run(containerd, &config)?;
    let status = source.exec_to("look", &["sh", "-c", &counts_from(100)], "")?;
    ensure!(status == 0, "no counter: {status}");
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir)?;
    source.end()?;
    let mut restored = Served::of(containerd, &config)?;
    restored.create(|request| request.checkpoint = dir.display().to_string())?;
    restored.is("", Status::CREATED, restored.pid)?;
    // The restored container does not need the checkpoint's files any more.
    fs::remove_dir_all(&dir)?;
    // A file that the restored processes would write within a twentieth of a second.
    let status = restored.exec_to("still", &["sh", "-c", "usleep 500000; test ! -e /count"], "")?;
    ensure!(status == 0, "it runs before its start");
    restored.begin()?;
    restored.is("", Status::RUNNING, restored.pid)?;
    let status = restored.exec_to("look", &["sh", "-c", &counts_from(102)], "")?;
    ensure!(status == 0, "the counter does not go on: {status}");
    // Another checkpoint, of the restored container; the container that is created from it is never started.
    checkpoint(&restored, &dir)?;
    let mut unused = Served::of(containerd, &config)?;
    unused.create(|request| request.checkpoint = dir.display().to_string())?;
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
    ensure!(source.exec_to("ready", &["sh", "-c", ready], "")? == 0, "it does not get ready");
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir)?;
    source.end()?;
    let pod = Served::idle(containerd)?;
    for starts in [false, true] {
        let mut restored = pod.beside(containerd, &config)?;
        restored.create(|request| request.checkpoint = dir.display().to_string())?;
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
    let mut source = pod.beside(containerd, &config)?;
    source.create(|_| ())?;
    source.begin()?;
    ensure!(source.exec_to("ready", &["sh", "-c", ready], "")? == 0, "it does not get ready");
    let (code, message) = refused(&source.client, &request(&source, &dir, None)?)?;
    ensure!(code == Code::ALREADY_EXISTS && message.contains("is not empty"), "{code:?}: {message}");
    source.client.ok::<Empty>("Kill", &source.kill("", 9))?;
    source.wait("")?;
    source.client.ok::<DeleteResponse>("Delete", &source.delete(""))?;
    fs::remove_dir_all(&source.shim.bundle)?;
    no_trouble(&pod)?;
    pod.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

/// The shim has logged no warning or error.
fn no_trouble(pod: &Served<'_>) -> Result<()> {
    let log = pod.shim.log()?;
    let is_trouble =
        |line: &&str| ["warn", "error"].iter().any(|level| line.contains(&format!("level={level}")));
    let trouble: Vec<_> = log.lines().filter(is_trouble).collect();
    ensure!(trouble.is_empty(), "the shim says {trouble:#?}");
    Ok(())
}

fn output_goes_on(containerd: &mut Containerd) -> Result<()> {
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
            #[expect(clippy::disallowed_methods, reason = "a file tells nobody that it changed")]
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
    ensure!(restored.wait("")?.exit_status == 0, "it does not end well");
    has("second.out", "3 d\nend\n")?;
    restored.end_stopped()?;
    for name in
        ["first", "second"].iter().flat_map(|name| ["in", "out", "err"].map(|kind| format!("{name}.{kind}")))
    {
        fs::remove_file(file(&name))?;
    }
    Ok(fs::remove_dir_all(&dir)?)
}

fn what_fails_leaves_the_source_running(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    // A connection of the container with itself, which the request does not ask to keep.
    let script = format!("(nc -l -p 7000 -e cat &) ; sleep 1; sleep 1000 | nc 127.0.0.1 7000 & {COUNTER}");
    let config = bundle.config(&["sh", "-c", &script], |_| ())?;
    let served = Served::run(containerd, &config)?;
    let dir = containerd.root().join("images");
    let connected = "until grep -q ' 01 ' /proc/net/tcp; do usleep 50000; done; exec true";
    ensure!(served.exec_to("connected", &["sh", "-c", connected], "")? == 0, "no connection");
    let fails = |request: &CheckpointTaskRequest, code: Code, words: &[&str]| {
        let (found, message) = refused(&served.client, request)?;
        ensure!(found == code, "{found:?} instead of {code:?}: {message}");
        for word in words {
            ensure!(message.contains(word), "{word:?} is not in {message}");
        }
        ensure!(!dir.exists(), "something is left of a checkpoint that failed");
        let status = served.exec_to("look", &["sh", "-c", &counts_from(100)], "")?;
        ensure!(status == 0, "the counter does not go on: {status}");
        served.is("", Status::RUNNING, served.pid)
    };
    // The error contains CRIU's message.
    let plain = request(&served, &dir, None)?;
    fails(&plain, Code::FAILED_PRECONDITION, &["criu cannot checkpoint", "tcp"])?;
    // A directory that does not exist, and a full file system.
    let nowhere = request(&served, Path::new("/nowhere/at/all"), None)?;
    let open = CheckpointOptions { open_tcp: true, ..Default::default() };
    let nowhere = CheckpointTaskRequest { options: request(&served, &dir, Some(&open))?.options, ..nowhere };
    fails(&nowhere, Code::INTERNAL, &["/nowhere/at/all"])?;
    let small = containerd.root().join("small");
    fs::create_dir(&small)?;
    mount(Some("tmpfs"), &small, Some("tmpfs"), MsFlags::empty(), Some("size=64k"))?;
    let full = fails(
        &request(&served, &small.join("images"), Some(&open))?,
        Code::RESOURCE_EXHAUSTED,
        &["not enough space", "small"],
    );
    let left = fs::read_dir(&small)?.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
    umount(&small)?;
    full?;
    ensure!(left.is_empty(), "left on the full disk: {left:?}");
    fs::remove_dir(&small)?;
    // A second directory that does not exist, after the first was written.
    let elsewhere =
        CheckpointOptions { open_tcp: true, image_path: "/nowhere/at/all".to_owned(), ..Default::default() };
    fails(&request(&served, &dir, Some(&elsewhere))?, Code::INTERNAL, &["/nowhere/at/all"])?;
    // An added process is not a descendant of the init.
    let sleep = served.exec("added", &["sleep", "1000"]);
    served.client.ok::<Empty>("Exec", &sleep)?;
    served.client.ok::<StartResponse>("Start", &served.start("added"))?;
    fails(&request(&served, &dir, Some(&open))?, Code::FAILED_PRECONDITION, &["processes were added"])?;
    served.client.ok::<Empty>("Kill", &served.kill("added", 9))?;
    served.wait("added")?;
    served.client.ok::<DeleteResponse>("Delete", &served.delete("added"))?;
    // Without such obstacles, a second try works.
    served.client.ok::<Empty>("Checkpoint", &request(&served, &dir, Some(&open))?)?;
    complete(&dir)?;
    served.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

fn no_room_for_what_the_guest_writes(containerd: &mut Containerd) -> Result<()> {
    let cache = containerd.root().join("small-cache");
    fs::create_dir(&cache)?;
    mount(Some("tmpfs"), &cache, Some("tmpfs"), MsFlags::empty(), Some("size=30m"))?;
    containerd.configure(&Setup::new().set("rootdisk", "dir", Value::path(&cache)))?;
    let tried = in_little_room(containerd, &cache);
    umount2(&cache, MntFlags::MNT_DETACH)?;
    fs::remove_dir(&cache)?;
    tried
}

fn in_little_room(containerd: &Containerd, cache: &Path) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    // The content of a tmpfs is part of a checkpoint.
    let script = format!("head -c 40m /dev/urandom >/tmp/much; {COUNTER}");
    let config = bundle.config(&["sh", "-c", &script], |spec| {
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(bundle::mount("/tmp", "tmpfs", "tmpfs", &["mode=1777"]));
    })?;
    let served = Served::run(containerd, &config)?;
    let goes_on = || {
        let status = served.exec_to("look", &["sh", "-c", &counts_from(100)], "")?;
        ensure!(status == 0, "the counter does not go on: {status}");
        Ok(())
    };
    goes_on()?;
    let dir = containerd.root().join("images");
    let (code, message) = refused(&served.client, &request(&served, &dir, None)?)?;
    ensure!(code == Code::RESOURCE_EXHAUSTED && message.contains("not enough space"), "{code:?}: {message}");
    ensure!(!dir.exists(), "something is left of a checkpoint that failed");
    goes_on()?;
    mount(Some("tmpfs"), cache, Some("tmpfs"), MsFlags::MS_REMOUNT, Some("size=500m"))?;
    checkpoint(&served, &dir)?;
    complete(&dir)?;
    goes_on()?;
    served.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

fn killed_while_it_is_taken(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let served = Served::run(containerd, &bundle.config(&["sleep", "1000"], |_| ())?)?;
    let dir = containerd.root().join("images");
    let inventory = containerd.inventory()?;
    let qemu = inventory.processes.iter().find(|process| process.command.contains("microvm"));
    let qemu = qemu.context("no QEMU")?.pid;
    let request = request(&served, &dir, None)?;
    let before = nameless_files(qemu)?;
    let answer = thread::scope(|scope| {
        let answer = scope.spawn(|| refused(&served.client, &request));
        let end = Instant::now() + DEADLINE;
        // QEMU opens the disk onto which the guest dumps.
        while nameless_files(qemu).is_ok_and(|files| files <= before) && Instant::now() < end {
            #[expect(clippy::disallowed_methods, reason = "another process's descriptors tell nobody")]
            thread::sleep(Duration::from_millis(10));
        }
        let killed = kill(Pid::from_raw(qemu.cast_signed()), Signal::SIGKILL);
        let answer = answer.join().expect("no panic");
        killed?;
        answer
    });
    let (code, message) = answer?;
    ensure!(code != Code::OK && !message.is_empty(), "{code:?}");
    ensure!(!dir.exists(), "something is left of a checkpoint that failed");
    let exit = served.wait("")?.exit_status;
    ensure!(exit == 137, "it ended with {exit}");
    served.end_stopped()
}

/// The shim is killed when it has begun to write: the remains are not accepted as a checkpoint.
fn shim_killed_while_it_writes(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let script = "(head -c 100m /dev/zero; touch /ready; exec sleep 1000) | tail -c 100m";
    let served = Served::run(containerd, &bundle.config(&["sh", "-c", script], |_| ())?)?;
    let ready = "until [ -e /ready ]; do usleep 50000; done";
    ensure!(served.exec_to("ready", &["sh", "-c", ready], "")? == 0, "it does not get ready");
    let dir = containerd.root().join("images");
    let request = request(&served, &dir, None)?;
    let inventory = containerd.inventory()?;
    let shim = inventory.processes.iter().find(|process| process.command.contains(&served.shim.id));
    let shim = shim.context("no shim")?;
    ensure!(shim.command.contains("containerd-shim-machinen-v1"), "{}", shim.command);
    let answer = thread::scope(|scope| {
        let answer = scope.spawn(|| served.client.ok::<Empty>("Checkpoint", &request));
        let end = Instant::now() + DEADLINE;
        let begun = || fs::read_dir(&dir).is_ok_and(|mut files| files.next().is_some());
        while !begun() && Instant::now() < end {
            #[expect(clippy::disallowed_methods, reason = "who makes it tells nobody")]
            thread::sleep(Duration::from_millis(1));
        }
        let killed = kill(Pid::from_raw(shim.pid.cast_signed()), Signal::SIGKILL);
        let answer = answer.join().expect("no panic");
        killed.map(|()| answer)
    });
    ensure!(answer?.is_err(), "the shim has answered before it was killed");
    ensure!(!dir.join("machinen.json").exists(), "it says that it is a checkpoint");
    let refused = containerd.machinen(&["snapshot", "inspect"])?.arg(&dir).run()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(refused.status != 0 && said.contains("not a checkpoint"), "{said}");
    served.shim.delete()?;
    fs::remove_dir_all(&served.shim.bundle)?;
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

/// The number of files without a name that a process has open.
fn nameless_files(pid: u32) -> Result<usize> {
    let links = fs::read_dir(format!("/proc/{pid}/fd"))?.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    Ok(links.filter(|link| link.to_string_lossy().ends_with(" (deleted)")).count())
}
