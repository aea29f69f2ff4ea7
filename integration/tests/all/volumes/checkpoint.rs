//! Containers with volumes are checkpointed and restored. The files of a volume are not part of the checkpoint: a
//! restored container has those of its own configuration, and opens them again by their names.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{
    api::{Empty, Status},
    shim::oci::CheckpointOptions,
};
use machinen_integration::{bundle::Bundle, containerd::Containerd, process::Invocation, served::Served};
use serde_json::{Value, json};
use ttrpc::Code;

use super::{bind, shell, source};
use crate::{
    checkpoint::{checkpoint, request},
    harness::on_newest_containerd,
};

on_newest_containerd!(
    open_files_move_to_another_source,
    one_of_everything,
    watches,
    other_volumes_are_refused,
    other_files_are_refused,
    files_without_their_name_are_refused,
);

/// Reads and writes lines of open files, below a working directory in the volume.
const LINES: &str = "cd /data/dir; exec 3</data/in 4>>/data/log; read -r a <&3; echo $a >&4; touch /dev/shm/ready; \
                     until [ -e /dev/shm/go ]; do usleep 50000; done; read -r b <&3; echo $b >&4; pwd >&4; \
                     cat here >&4; cat /etc/one >&4; touch /dev/shm/done; exec sleep 1000";
const READY: &str = "until [ -e /dev/shm/ready ]; do usleep 50000; done";
const GO: &str =
    "touch /dev/shm/go; for n in $(seq 400); do [ -e /dev/shm/done ] && exit 0; usleep 50000; done; exit 1";

/// A directory with the files that [`LINES`] uses.
fn lines(containerd: &Containerd) -> Result<PathBuf> {
    let data = source(containerd)?;
    fs::create_dir(data.join("dir"))?;
    for (name, text) in [("in", "one\ntwo\n"), ("dir/here", "here\n"), ("single", "1\n"), ("log", "")] {
        fs::write(data.join(name), text)?;
    }
    Ok(data)
}

fn lines_config(bundle: &Bundle, data: &Path, change: impl FnOnce(&mut Value)) -> Result<PathBuf> {
    bundle.config(&["sh", "-ec", LINES], |spec| {
        bind(spec, data, "/data", &[]);
        bind(spec, &data.join("single"), "/etc/one", &["ro"]);
        change(spec);
    })
}

fn copy(containerd: &Containerd, data: &Path) -> Result<PathBuf> {
    let other = source(containerd)?;
    Invocation::new("cp").arg("-a").arg(data.join(".")).arg(&other).run()?.ok()?;
    Ok(other)
}

/// The first restore is in another directory than the checkpoint, and the second is of the restored container. A trial
/// restore precedes each.
fn open_files_move_to_another_source(containerd: &mut Containerd) -> Result<()> {
    let data = lines(containerd)?;
    let bundle = Bundle::busybox(containerd)?;
    let verified = |spec: &mut Value| spec["annotations"]["io.machinen.verify"] = "restore".into();
    let first = Served::run(containerd, &lines_config(&bundle, &data, verified)?)?;
    shell(&first, READY)?;
    let dir = containerd.root().join("images");
    checkpoint(&first, &dir)?;
    let inspected = containerd.machinen(&["snapshot", "inspect"])?.arg(&dir).run()?.ok()?.text();
    for line in ["volume     /data a directory, writable", "volume     /etc/one a file, read-only"] {
        ensure!(inspected.lines().any(|found| found == line), "no {line:?} in {inspected}");
    }
    shell(&first, GO)?;
    ensure!(
        fs::read_to_string(data.join("log"))? == "one\ntwo\n/data/dir\nhere\n1\n",
        "the source has stopped"
    );
    first.end()?;
    let other = copy(containerd, &data)?;
    for (name, text) in [("in", "one\nTWO\n"), ("dir/here", "there\n"), ("single", "2\n"), ("log", "kept\n")]
    {
        fs::write(other.join(name), text)?;
    }
    let config = lines_config(&bundle, &other, verified)?;
    let second = Served::restored(containerd, &config, &dir)?;
    fs::remove_dir_all(&dir)?;
    checkpoint(&second, &dir)?;
    second.end()?;
    let third = Served::restored(containerd, &config, &dir)?;
    shell(&third, GO)?;
    let log = fs::read_to_string(other.join("log"))?;
    ensure!(log == "kept\nTWO\n/data/dir\nthere\n2\n", "{log}");
    third.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

/// Locks, a mapped file, a removed file and a removed working directory. The program prints what a lock of another
/// process gets.
const EVERYTHING: &str = r#"
import fcntl, mmap, os, time
os.mkdir("/data/gone"); os.chdir("/data/gone"); os.rmdir("/data/gone")
shared = open("/data/map", "r+b"); mapped = mmap.mmap(shared.fileno(), 8192); mapped[0:5] = b"dirty"
record = open("/data/record", "r+b"); fcntl.lockf(record, fcntl.LOCK_EX, 10)
whole = open("/data/whole", "r+b"); fcntl.flock(whole, fcntl.LOCK_EX)
removed = open("/data/removed", "w+b"); removed.write(b"kept"); removed.flush(); os.unlink("/data/removed")
offset = open("/data/offset", "r+b", buffering=0); offset.seek(3)
open("/dev/shm/ready", "w").close()
while not os.path.exists("/dev/shm/go"): time.sleep(0.05)
def other(lock):
    child = os.fork()
    if child == 0:
        try: lock()
        except OSError: os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
held = [
    other(lambda: fcntl.lockf(open("/data/record", "r+b"), fcntl.LOCK_EX | fcntl.LOCK_NB, 10)),
    other(lambda: fcntl.flock(open("/data/whole", "r+b"), fcntl.LOCK_EX | fcntl.LOCK_NB)),
]
mapped[4096:4101] = b"later"; mapped.flush()
removed.seek(0)
offset.write(b"DEF")
gone = os.readlink("/proc/self/cwd")
with open("/data/result", "w") as f: f.write(f"{held} {bytes(mapped[0:5])} {removed.read()} {gone}")
open("/dev/shm/done", "w").close()
time.sleep(1000)
"#;

fn python(bundle: &Bundle, program: &str, data: &Path) -> Result<PathBuf> {
    bundle.config(&["python3.13", "-c", program], |spec| {
        bind(spec, data, "/data", &[]);
        spec["process"]["env"] = json!(["PATH=/usr/bin:/bin", "LC_ALL=C", "PYTHONDONTWRITEBYTECODE=1"]);
    })
}

fn one_of_everything(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    for (name, size) in [("map", 8192), ("record", 16), ("whole", 16)] {
        fs::write(data.join(name), vec![b' '; size])?;
    }
    fs::write(data.join("offset"), "abcdefghi")?;
    let config = python(&Bundle::with_workloads(containerd)?, EVERYTHING, &data)?;
    let served = Served::run(containerd, &config)?;
    shell(&served, READY)?;
    let dir = containerd.root().join("images");
    let options = CheckpointOptions { file_locks: true, exit: true, ..Default::default() };
    served.client.ok::<Empty>("Checkpoint", &request(&served, &dir, Some(&options))?)?;
    ensure!(fs::read(data.join("map"))?.starts_with(b"dirty"), "the mapped file was not written back");
    served.wait("")?;
    served.end_stopped()?;
    let restored = Served::restored(containerd, &config, &dir)?;
    let names: Vec<_> = fs::read_dir(&data)?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(names.len() == 4, "a restore leaves files in the volume: {names:?}");
    shell(&restored, GO)?;
    let result = fs::read_to_string(data.join("result"))?;
    ensure!(result.starts_with("[1, 1] b'dirty' b'kept' /data/gone"), "{result}");
    ensure!(fs::read(data.join("map"))?[4096..].starts_with(b"later"), "the mapping is not that of the file");
    ensure!(fs::read_to_string(data.join("offset"))? == "abcDEFghi", "the file has another offset");
    restored.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

/// Watches a directory and a file of a volume, and writes down which of them has changed.
const WATCHER: &str = r#"
import ctypes, os, struct, time
paths = ["/data", "/data/dir/file"]
libc = ctypes.CDLL(None)
fd = libc.inotify_init1(os.O_NONBLOCK)
names = {libc.inotify_add_watch(fd, path.encode(), 0x306): path for path in paths}
seen = set()
open("/dev/shm/ready", "w").close()
while True:
    try: data = os.read(fd, 4096)
    except BlockingIOError: time.sleep(0.05); continue
    while data:
        wd, _, _, length = struct.unpack_from("iIII", data)
        seen.add(names[wd])
        data = data[16 + length:]
    with open("/dev/shm/new", "w") as f: f.write(" ".join(sorted(seen)))
    os.rename("/dev/shm/new", "/dev/shm/seen")
"#;

fn watches(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    fs::create_dir(data.join("dir"))?;
    fs::write(data.join("dir/file"), "")?;
    let config = python(&Bundle::with_workloads(containerd)?, WATCHER, &data)?;
    let served = Served::run(containerd, &config)?;
    shell(&served, READY)?;
    let dir = containerd.root().join("images");
    checkpoint(&served, &dir)?;
    served.end()?;
    let restored = Served::restored(containerd, &config, &dir)?;
    let change = "touch /data/new; chmod 600 /data/dir/file; \
                  for n in $(seq 200); do [ \"$(cat /dev/shm/seen 2>/dev/null)\" = '/data /data/dir/file' ] && exit; \
                  usleep 50000; done; cat /dev/shm/seen; exit 1";
    shell(&restored, change)?;
    restored.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

/// A restore that is refused with these words, and leaves nothing.
fn refused(containerd: &Containerd, config: &Path, dir: &Path, words: &[&str]) -> Result<Code> {
    let served = Served::of(containerd, config)?;
    let mut create = served.shim.create_request();
    create.checkpoint = dir.display().to_string();
    let (code, message) = served.client.refused("Create", &create)?;
    for word in words {
        ensure!(message.contains(word), "{word:?} is not in {message}");
    }
    served.shim.shut_down(&served.client)?;
    Ok(code)
}

fn other_volumes_are_refused(containerd: &mut Containerd) -> Result<()> {
    let data = lines(containerd)?;
    let bundle = Bundle::busybox(containerd)?;
    let served = Served::run(containerd, &lines_config(&bundle, &data, |_| ())?)?;
    shell(&served, READY)?;
    let dir = containerd.root().join("images");
    checkpoint(&served, &dir)?;
    served.end()?;
    let destination = |spec: &Value, number: usize| spec["mounts"][number]["destination"].clone();
    let last = |spec: &mut Value| spec["mounts"].as_array().expect("an array").len() - 1;
    let without = lines_config(&bundle, &data, |spec| {
        let number = last(spec) - 1;
        assert_eq!(destination(spec, number), "/data");
        spec["mounts"].as_array_mut().expect("an array").remove(number);
    })?;
    refused(containerd, &without, &dir, &["the volume /data", "add a bind mount with this destination"])?;
    let more = lines_config(&bundle, &data, |spec| bind(spec, &data, "/more", &[]))?;
    let code = refused(containerd, &more, &dir, &["the volume /more", "remove the mount"])?;
    ensure!(code == Code::FAILED_PRECONDITION, "{code:?}");
    let writable = lines_config(&bundle, &data, |spec| {
        let number = last(spec);
        spec["mounts"][number]["options"] = json!(["rbind"]);
    })?;
    refused(containerd, &writable, &dir, &["the volume /etc/one read-only", "add the option ro"])?;
    let directory = lines_config(&bundle, &data, |spec| {
        let number = last(spec);
        spec["mounts"][number]["source"] = data.display().to_string().into();
    })?;
    refused(containerd, &directory, &dir, &["the volume /etc/one, is a directory, and it was a file"])?;
    let gone = data.join("no-such");
    let missing = lines_config(&bundle, &data, |spec| {
        let number = last(spec);
        spec["mounts"][number]["source"] = gone.display().to_string().into();
    })?;
    let words = [&gone.display().to_string(), "the source of the mount /etc/one", "No such file"];
    refused(containerd, &missing, &dir, &words)?;
    // A file is open for writing in a volume that is read-only now.
    let read_only = lines_config(&bundle, &data, |spec| {
        let number = last(spec) - 1;
        spec["mounts"][number]["options"] = json!(["rbind", "ro"]);
    })?;
    refused(containerd, &read_only, &dir, &["criu cannot restore it", "data/log", "Read-only file system"])?;
    // None of them has changed the checkpoint.
    let restored = Served::restored(containerd, &lines_config(&bundle, &data, |_| ())?, &dir)?;
    shell(&restored, GO)?;
    restored.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

fn other_files_are_refused(containerd: &mut Containerd) -> Result<()> {
    let data = lines(containerd)?;
    let bundle = Bundle::busybox(containerd)?;
    let served = Served::run(containerd, &lines_config(&bundle, &data, |_| ())?)?;
    shell(&served, READY)?;
    let dir = containerd.root().join("images");
    checkpoint(&served, &dir)?;
    served.end()?;
    let change = |name: &str, act: &dyn Fn(&Path) -> std::io::Result<()>, words: &[&str]| -> Result<()> {
        let other = copy(containerd, &data)?;
        act(&other.join(name))?;
        let config = lines_config(&bundle, &other, |_| ())?;
        refused(containerd, &config, &dir, words).with_context(|| name.to_owned()).map(drop)
    };
    change("in", &|path| fs::write(path, "one\ntwo\nthree\n"), &["data/in has bad size"])?;
    change("in", &|path| fs::remove_file(path), &["data/in", "No such file"])?;
    let directory = |path: &Path| fs::remove_file(path).and_then(|()| fs::create_dir(path));
    change("log", &directory, &["data/log"])?;
    change("dir", &|path| fs::remove_dir_all(path), &["data/dir", "No such file"])?;
    Ok(fs::remove_dir_all(&dir)?)
}

fn files_without_their_name_are_refused(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    for name in ["renamed", "linked", "gone"] {
        fs::write(data.join(name), name)?;
    }
    let bundle = Bundle::busybox(containerd)?;
    let script = "while :; do [ -e /dev/shm/file ] && exec 3<$(cat /dev/shm/file) && rm /dev/shm/file; usleep 20000; done";
    let config = bundle.config(&["sh", "-c", script], |spec| {
        bind(spec, &data, "/data", &[]);
        bind(spec, &data, "/ro", &["ro"]);
    })?;
    let served = Served::run(containerd, &config)?;
    let dir = containerd.root().join("images");
    let open = |file: &str| {
        let script = format!(
            "echo {file} >/dev/shm/new; mv /dev/shm/new /dev/shm/file; until [ ! -e /dev/shm/file ]; do usleep 20000; done"
        );
        shell(&served, &script).map(drop)
    };
    let refused = |words: &[&str]| {
        let (code, message) = served.client.refused("Checkpoint", &request(&served, &dir, None)?)?;
        ensure!(code == Code::FAILED_PRECONDITION && !dir.exists(), "{code:?}: {message}");
        for word in words.iter().chain(&["process 1 (sh) uses", "that cannot be restored"]) {
            ensure!(message.contains(word), "{word:?} is not in {message}");
        }
        served.is("", Status::RUNNING, served.pid)
    };
    open("/data/renamed")?;
    fs::rename(data.join("renamed"), data.join("other"))?;
    // Names may be a second old.
    shell(&served, "sleep 1.2")?;
    refused(&["/data/renamed, a file of a volume", "was renamed or replaced"])?;
    open("/data/linked")?;
    fs::hard_link(data.join("linked"), data.join("link"))?;
    shell(&served, "rm /data/linked")?;
    refused(&["/data/linked, a file of a volume", "was renamed or replaced"])?;
    open("/ro/gone")?;
    fs::remove_file(data.join("gone"))?;
    shell(&served, "sleep 1.2")?;
    refused(&["/ro/gone, a file of a volume that is read-only"])?;
    // The container continues, and can be checkpointed without such a file.
    open("/data/other")?;
    checkpoint(&served, &dir)?;
    served.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}
