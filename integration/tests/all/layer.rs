//! The writes of a container are in its snapshot after its end, and visible at the next start.

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    containerd::Containerd,
    image::{Image, Layer},
    setup::{Setup, Value},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::harness::{IMAGE, on_every_containerd, on_newest_containerd};

on_every_containerd!(
    writes_reach_the_snapshot,
    stop_and_start_keeps_writes,
    a_killed_vm_keeps_what_was_synced
);
on_newest_containerd!(
    a_killed_shim_keeps_what_was_synced,
    a_killed_vm_keeps_what_was_synced_native,
    nothing_written_leaves_nothing,
    native_snapshotter,
    what_the_host_put_into_the_snapshot_is_there,
    marks_of_the_hosts_overlay_do_not_matter,
    attributes_of_the_image_survive,
    too_much_stays_on_the_disk,
    many_files_and_large_ones,
    names_of_one_file_and_sockets_are_kept,
);

const DISK: &str = "machinen-writable.ext4";

/// A container that stays, with its snapshot, between tasks.
struct Kept<'a> {
    containerd: &'a Containerd,
    id: String,
    snapshotter: &'static str,
}

impl<'a> Kept<'a> {
    /// Starts the container in the background.
    fn start(
        containerd: &'a Containerd,
        image: &str,
        snapshotter: &'static str,
        script: &str,
    ) -> Result<Self> {
        let run = containerd.run(image, &["sh", "-ec", script]).detached().flag("--null-io");
        let run = run.flag("--snapshotter").flag(snapshotter);
        let id = run.container().to_owned();
        run.ok()?;
        Ok(Self { containerd, id, snapshotter })
    }

    /// Starts the container and waits for the end of its task, which must be a success.
    fn run(containerd: &'a Containerd, image: &str, snapshotter: &'static str, script: &str) -> Result<Self> {
        let from = containerd.log().position();
        let kept = Self::start(containerd, image, snapshotter, script)?;
        containerd.log().wait_for_event(from, "/tasks/exit")?;
        Ok(kept)
    }

    fn snapshots(&self, args: &[&str]) -> Result<Vec<u8>> {
        let all = [&["snapshots", "--snapshotter", self.snapshotter], args].concat();
        Ok(self.containerd.ctr(all)?.run()?.ok()?.stdout)
    }

    /// The directory on the host that has the container's changes, or (native) everything.
    fn dir(&self) -> Result<PathBuf> {
        let mounts = String::from_utf8(self.snapshots(&["mounts", "/nowhere", &self.id])?)?;
        let options = mounts.split([' ', ',']).find_map(|option| option.strip_prefix("upperdir="));
        let source = mounts.split(' ').nth(3);
        let dir = options.or(source).context("no directory")?.trim();
        Ok(PathBuf::from(dir))
    }

    fn delete_task(&self) -> Result<i32> {
        let output = self.containerd.ctr_output(&["tasks", "delete", &self.id])?;
        let told = output.error_text();
        let digits =
            told.split("exit code ").nth(1).and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
        Ok(digits.and_then(|digits| digits.parse().ok()).unwrap_or(output.status))
    }

    /// Runs a new task on the same snapshot to its end; returns its output.
    fn again(&self) -> Result<String> {
        let output = self.containerd.ctr(["tasks", "start", &self.id])?.run()?.ok()?;
        Ok(output.text())
    }

    fn remove(self) -> Result<()> {
        self.containerd.ctr_ok(&["containers", "delete", &self.id])?;
        Ok(())
    }

    /// The changes in containerd's own view: the content of the archive of `ctr snapshots diff`, by path.
    fn diff(&self) -> Result<BTreeMap<String, tar::Header>> {
        let kind = "application/vnd.oci.image.layer.v1.tar";
        let bytes = self.snapshots(&["diff", "--media-type", kind, &self.id])?;
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut found = BTreeMap::new();
        for entry in archive.entries()? {
            let entry = entry?;
            let path = entry.path()?.display().to_string();
            found.insert(path.trim_end_matches('/').to_owned(), entry.header().clone());
        }
        Ok(found)
    }
}

fn writes_reach_the_snapshot(containerd: &mut Containerd) -> Result<()> {
    let long = "n".repeat(255);
    let script = format!(
        "echo new > /new; chown 1000:1001 /new; chmod 4755 /new; ln /new /hard; mkfifo -m 600 /fifo; \
         ln -s /nowhere /sym; truncate -s 32M /sparse; echo end >> /sparse; rm /etc/secret; \
         rm -r /home/alice; mkdir -m 700 /home/alice; echo x > /home/alice/f; touch -d @1000000000 /etc/passwd; \
         mknod /null c 1 3; mknod /disk b 8 0; echo long > /root/{long}; mkdir -p /a/b/c; echo deep > /a/b/c/d; \
         mknod /a/b/disk b 8 0; \
         mkdir /gone; rmdir /gone"
    );
    let kept = Kept::run(containerd, IMAGE, "overlayfs", &script)?;
    // The task has ended but is not deleted: `commit` and `diff` of a stopped container read the snapshot
    // now.
    let upper = kept.dir()?;
    let status = |path: &str| {
        fs::symlink_metadata(upper.join(path)).with_context(|| format!("no {path} in {}", upper.display()))
    };
    let new = status("new")?;
    ensure!((new.mode() & 0o7777, new.uid(), new.gid(), new.nlink()) == (0o4755, 1000, 1001, 2), "{new:?}");
    ensure!(
        new.ino() == status("hard")?.ino() && fs::read(upper.join("new"))? == b"new\n",
        "not the same file"
    );
    ensure!(status("fifo")?.file_type().is_fifo() && status("fifo")?.mode() & 0o777 == 0o600, "no fifo");
    ensure!(fs::read_link(upper.join("sym"))? == Path::new("/nowhere"), "another target");
    let sparse = status("sparse")?;
    ensure!(sparse.len() == (32 << 20) + 4 && sparse.blocks() < 64, "{} blocks", sparse.blocks());
    let whiteout = status("etc/secret")?;
    ensure!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0, "{whiteout:?}");
    let mut opaque = [0; 8];
    let length = rustix::fs::lgetxattr(upper.join("home/alice"), "trusted.overlay.opaque", &mut opaque[..])?;
    ensure!(&opaque[..length] == b"y" && status("home/alice")?.mode() & 0o777 == 0o700, "not opaque");
    let passwd = status("etc/passwd")?;
    ensure!(passwd.mtime() == 1_000_000_000, "{passwd:?}");
    ensure!(status("null")?.rdev() == 0x103 && status("disk")?.rdev() == 0, "devices");
    ensure!(fs::read(upper.join("root").join(&long))? == b"long\n", "long name");
    ensure!(fs::read(upper.join("a/b/c/d"))? == b"deep\n", "deep");
    // Nothing of the image can be visible there, and a whiteout would make the diff below fail.
    ensure!(status("a/b/disk").is_err(), "a mark in a new directory");
    ensure!(status("gone").is_err(), "what was there and is gone again");
    // No attributes that only the guest uses.
    let mut origin = [0; 256];
    let origin = rustix::fs::lgetxattr(upper.join("etc/passwd"), "trusted.overlay.origin", &mut origin[..]);
    ensure!(origin.is_err(), "overlayfs's own attributes of the guest");

    ensure!(kept.delete_task()? == 0, "the script failed");
    let disk = upper.with_file_name(DISK);
    ensure!(!disk.exists(), "the disk is still there");
    let names: Vec<_> = fs::read_dir(upper.parent().context("no parent")?)?.collect::<Result<_, _>>()?;
    ensure!(names.len() == 2, "something beside the snapshot's two directories: {names:?}");

    let diff = kept.diff()?;
    for path in
        ["new", "hard", "fifo", "sym", "sparse", "etc/.wh.secret", "home/alice/f", "etc/passwd", "a/b/c/d"]
    {
        ensure!(diff.contains_key(path), "no {path} in the diff: {:?}", diff.keys());
    }
    ensure!(!diff.contains_key("bin/busybox"), "what was not touched is in the diff");
    ensure!(diff["sparse"].entry_size()? == (32 << 20) + 4, "the diff has another size");

    // A commit, and a container on top of it.
    let committed = format!("{}-committed", kept.id);
    kept.snapshots(&["commit", &committed, &kept.id])?;
    let view = format!("{}-view", kept.id);
    let mounts = String::from_utf8(kept.snapshots(&["view", "--target", "/nowhere", &view, &committed])?)?;
    ensure!(mounts.contains(&upper.display().to_string()), "the commit is another directory: {mounts}");
    kept.snapshots(&["rm", &view])?;
    kept.snapshots(&["rm", &committed])?;
    kept.remove()
}

fn stop_and_start_keeps_writes(containerd: &mut Containerd) -> Result<()> {
    let script = "echo run >> /count; cat /count; test -e /etc/secret && rm /etc/secret || echo no secret; \
                  test -u /setuid && echo setuid || { echo x > /setuid; chmod 4711 /setuid; chown 5:6 /setuid; \
                  chmod u+s /setuid; }; stat -c '%a %u %g' /setuid; touch -d '2001-02-03 04:05:06' /count";
    let kept = Kept::run(containerd, IMAGE, "overlayfs", script)?;
    ensure!(kept.delete_task()? == 0, "the script failed");
    let first = fs::metadata(kept.dir()?.join("count"))?;
    for count in 2..4 {
        let seen = kept.again()?;
        let wanted = format!("{}no secret\nsetuid\n4711 5 6\n", "run\n".repeat(count));
        ensure!(seen == wanted, "start {count} printed\n{seen}");
    }
    let upper = kept.dir()?;
    ensure!(
        fs::read_to_string(upper.join("count"))? == "run\n".repeat(3),
        "the last start is not in the snapshot"
    );
    ensure!(fs::metadata(upper.join("count"))?.mtime() == first.mtime(), "another time");
    ensure!(!upper.with_file_name(DISK).exists(), "the disk is still there");
    kept.remove()
}

/// Two names of each kind of file, made by the first start and checked by all. syslogd follows the link to
/// the path of its socket.
const PAIRS: &str = "if ! test -e /d; then mkdir /d; echo x > /d/file; ln -s nowhere /d/link; mkfifo /d/fifo; \
                     mknod /d/null c 1 3; ln -s /d/socket /dev/log; syslogd -n & until test -S /d/socket; do usleep 10000; done; \
                     kill -9 $!; chmod 640 /d/socket; chown 5:6 /d/socket; \
                     for kind in file link fifo null socket; do ln /d/$kind /$kind; done; ln /link /link2; fi; \
                     for kind in file link fifo null socket; do stat -c '%n %F %h' /$kind; \
                     stat -c %i /d/$kind /$kind | uniq | wc -l; done; stat -c '%a %u %g' /d/socket";

fn names_of_one_file_and_sockets_are_kept(containerd: &mut Containerd) -> Result<()> {
    for snapshotter in ["overlayfs", "native"] {
        let kept = Kept::run(containerd, IMAGE, snapshotter, PAIRS)?;
        ensure!(kept.delete_task()? == 0, "the script failed");
        for start in 2..4 {
            let seen = kept.again()?;
            let wanted = "/file regular file 2\n1\n/link symbolic link 3\n1\n/fifo fifo 2\n1\n\
                          /null character special file 2\n1\n/socket socket 2\n1\n640 5 6\n";
            ensure!(seen == wanted, "{snapshotter}, start {start} printed\n{seen}");
        }
        kept.remove()?;
    }
    Ok(())
}

/// Kills a process of a container that has synced, and checks what the next start finds.
fn killed(
    containerd: &Containerd,
    snapshotter: &'static str,
    words: &dyn Fn(&str) -> Vec<String>,
    wait: &str,
) -> Result<()> {
    let script = "if [ -e /synced ]; then cat /synced; test -e /etc/secret || echo removed; exit; fi; \
                  echo kept > /synced; rm /etc/secret; sync; echo ready; sleep 1000";
    let run = containerd.run(IMAGE, &["sh", "-ec", script]).flag("--snapshotter").flag(snapshotter);
    // In the foreground, so that its output shows when it is ready; without --rm, so that the snapshot stays.
    let id = run.container().to_owned();
    let running = run.kept().spawn(Duration::from_secs(90))?;
    running.wait_for_stdout("ready")?;
    let kept = Kept { containerd, id, snapshotter };
    let upper = kept.dir()?;
    ensure!(!upper.join("synced").exists(), "nothing was exported yet");
    let from = containerd.log().position();
    let words = words(&kept.id);
    let inventory = containerd.inventory()?;
    let found =
        inventory.processes.iter().find(|process| words.iter().all(|word| process.command.contains(word)));
    let pid = found.with_context(|| format!("no process {words:?} in\n{inventory}"))?.pid;
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    containerd.log().wait_for(from, |line| line.contains(wait))?;
    let ended = running.wait()?;
    ensure!(ended.status != 0, "{ended}");
    containerd.ctr_output(&["tasks", "delete", "--force", &kept.id])?;
    let beside = snapshotter == "overlayfs";
    ensure!(upper.with_file_name(DISK).exists() == beside, "the disk is gone with what was on it");
    let seen = kept.again()?;
    ensure!(seen == "kept\nremoved\n", "the next start printed\n{seen}");
    ensure!(fs::read_to_string(upper.join("synced"))? == "kept\n", "it is not in the snapshot");
    ensure!(!upper.with_file_name(DISK).exists(), "the disk is still there");
    kept.remove()
}

fn a_killed_vm_keeps_what_was_synced(containerd: &mut Containerd) -> Result<()> {
    killed(containerd, "overlayfs", &|id| vec!["microvm".to_owned(), id.to_owned()], "/tasks/exit")
}

fn a_killed_vm_keeps_what_was_synced_native(containerd: &mut Containerd) -> Result<()> {
    killed(containerd, "native", &|id| vec!["microvm".to_owned(), id.to_owned()], "/tasks/exit")
}

fn a_killed_shim_keeps_what_was_synced(containerd: &mut Containerd) -> Result<()> {
    let words = |id: &str| vec!["containerd-shim-machinen-v1".to_owned(), "-id".to_owned(), id.to_owned()];
    killed(containerd, "overlayfs", &words, "/tasks/delete")?;
    // ctr keeps its fifos when the shim is lost, whatever the runtime.
    let fifos = containerd.root().join("fifo");
    for dir in fs::read_dir(&fifos)? {
        fs::remove_dir_all(dir?.path())?;
    }
    Ok(())
}

fn nothing_written_leaves_nothing(containerd: &mut Containerd) -> Result<()> {
    let kept = Kept::run(containerd, IMAGE, "overlayfs", "cat /etc/passwd")?;
    let upper = kept.dir()?;
    let before = fs::metadata(&upper)?.ino();
    ensure!(kept.delete_task()? == 0, "the script failed");
    ensure!(
        fs::read_dir(&upper)?.next().is_none() && fs::metadata(&upper)?.ino() == before,
        "it was replaced"
    );
    ensure!(!upper.with_file_name(DISK).exists(), "the disk is still there");
    ensure!(kept.diff()?.is_empty(), "the diff is not empty");
    kept.remove()
}

fn native_snapshotter(containerd: &mut Containerd) -> Result<()> {
    let script = "echo run >> /count; cat /count; rm -f /etc/secret; rm -rf /home/alice; mkdir /home/alice; \
                  echo x > /home/alice/f; echo y >> /etc/passwd; wc -l < /etc/passwd";
    let kept = Kept::run(containerd, IMAGE, "native", script)?;
    ensure!(kept.delete_task()? == 0, "the script failed");
    let dir = kept.dir()?;
    ensure!(fs::read_to_string(dir.join("count"))? == "run\n", "not in the snapshot");
    ensure!(!dir.join("etc/secret").exists() && dir.join("bin/busybox").exists(), "odd tree");
    ensure!(fs::metadata(dir.join("bin/busybox"))?.nlink() == 1, "the old tree is still there");
    let diff = kept.diff()?;
    for path in ["count", "etc/.wh.secret", "home/alice/f", "etc/passwd"] {
        ensure!(diff.contains_key(path), "no {path} in the diff: {:?}", diff.keys());
    }
    ensure!(!diff.contains_key("bin/busybox"), "what was not touched is in the diff");
    let lines = fs::read_to_string(dir.join("etc/passwd"))?.lines().count();
    let seen = kept.again()?;
    ensure!(seen == format!("run\nrun\n{}\n", lines + 1), "the next start printed\n{seen}");
    let others: Vec<_> = fs::read_dir(dir.parent().context("no parent")?)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.contains("machinen"))
        .collect();
    ensure!(others.is_empty(), "left beside the snapshots: {others:?}");
    kept.remove()
}

/// Changes of the snapshot on the host, as by `nerdctl cp` and `ctr c restore --rw`.
fn what_the_host_put_into_the_snapshot_is_there(containerd: &mut Containerd) -> Result<()> {
    let script =
        "if [ -e /first ]; then cat /put /dir/put; ls /etc/secret || echo gone; exit; fi; echo > /first";
    let kept = Kept::run(containerd, IMAGE, "overlayfs", script)?;
    ensure!(kept.delete_task()? == 0, "the script failed");
    let upper = kept.dir()?;
    fs::write(upper.join("put"), "one\n")?;
    fs::create_dir(upper.join("dir"))?;
    fs::write(upper.join("dir/put"), "two\n")?;
    fs::create_dir_all(upper.join("etc"))?;
    let device = nix::sys::stat::makedev(0, 0);
    let kind = nix::sys::stat::SFlag::S_IFCHR;
    nix::sys::stat::mknod(&upper.join("etc/secret"), kind, nix::sys::stat::Mode::empty(), device)?;
    let seen = kept.again()?;
    ensure!(seen == "one\ntwo\ngone\n", "the next start printed\n{seen}");
    ensure!(upper.join("dir/put").exists(), "it is gone after the next end");
    kept.remove()
}

/// An overlay that was mounted with an index marks its upper directory with its lower directory, and files
/// with their origin, none of which exist in this VM.
fn marks_of_the_hosts_overlay_do_not_matter(containerd: &mut Containerd) -> Result<()> {
    let script = "if [ -e /first ]; then cat /first; echo two >/first; echo x >>/etc/passwd; exit; fi; echo one >/first";
    let kept = Kept::run(containerd, IMAGE, "overlayfs", script)?;
    ensure!(kept.delete_task()? == 0, "the script failed");
    // struct ovl_fb: version 0, magic, length, flags, type of handle, uuid, and a handle of eight bytes.
    let mut origin = vec![0, 0xfb, 29, 0, 1];
    origin.extend([7; 16]);
    origin.extend([9; 8]);
    for (file, seen) in [("", "one\n"), ("first", "two\n")] {
        let path = kept.dir()?.join(file);
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(&path, "trusted.overlay.origin", &origin, flags)?;
        let said = kept.again()?;
        ensure!(said == seen, "with a mark on {file:?} the next start printed {said:?}");
    }
    kept.remove()
}

fn attributes_of_the_image_survive(containerd: &mut Containerd) -> Result<()> {
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0x0a, 0, 0, 0, 0, 0, 0, 0];
    let layer = Layer::new()
        .file("cap", 0o755, "x")
        .xattr("security.capability", capability)
        .file("note", 0o644, "x")
        .xattr("user.note", "two\nlines");
    let name = "machinen.test/attributes:1";
    containerd.import(&Image::busybox()?.with(name, layer))?;
    let before = containerd.inventory()?;
    // The new times cause the files to be copied up, with their attributes.
    let kept = Kept::run(containerd, name, "overlayfs", "touch /cap /note")?;
    ensure!(kept.delete_task()? == 0, "the script failed");
    for _ in 0..2 {
        let upper = kept.dir()?;
        let value = |file: &str, key: &str| -> Result<Vec<u8>> {
            let mut value = vec![0; 100];
            let length = rustix::fs::lgetxattr(upper.join(file), key, value.as_mut_slice())?;
            value.truncate(length);
            Ok(value)
        };
        ensure!(value("cap", "security.capability")? == capability, "the capability");
        ensure!(value("note", "user.note")? == b"two\nlines", "the note");
        // The changes are written to the disk before the start, and exported again after it.
        kept.again()?;
    }
    kept.remove()?;
    containerd.settle(&before)
}

fn too_much_stays_on_the_disk(containerd: &mut Containerd) -> Result<()> {
    containerd.configure(&Setup::new().set("rootdisk", "layer_max_entries", Value::number(20)))?;
    let script = "if [ -d /many ]; then ls /many | wc -l; exit; fi; mkdir /many; for i in $(seq 30); do \
                  echo $i > /many/$i; done";
    let from = containerd.log().position();
    let kept = Kept::run(containerd, IMAGE, "overlayfs", script)?;
    containerd.log().wait_for(from, |line| line.contains("more than 20 entries"))?;
    ensure!(kept.delete_task()? == 0, "a failed export changed the exit status");
    let upper = kept.dir()?;
    ensure!(fs::read_dir(&upper)?.next().is_none(), "half an export");
    ensure!(upper.with_file_name(DISK).exists(), "the disk is gone with what was on it");
    containerd.configure(&Setup::new())?;
    ensure!(kept.again()? == "30\n", "the files are lost");
    ensure!(fs::read_dir(upper.join("many"))?.count() == 30, "the files are not in the snapshot");
    kept.remove()
}

fn many_files_and_large_ones(containerd: &mut Containerd) -> Result<()> {
    let script = "mkdir /many; cd /many; for i in $(seq 2000); do echo $i > $i; done; \
                  dd if=/dev/urandom of=/big bs=1M count=32 2>/dev/null; md5sum < /big > /sum; \
                  for i in $(seq 30); do dd if=/dev/zero of=/holes bs=4k count=1 seek=$((i * 7)) conv=notrunc; done 2>/dev/null";
    let kept = Kept::run(containerd, IMAGE, "overlayfs", script)?;
    ensure!(kept.delete_task()? == 0, "the script failed");
    let upper = kept.dir()?;
    ensure!(fs::read_dir(upper.join("many"))?.count() == 2000, "files are missing");
    ensure!(fs::read_to_string(upper.join("many/1234"))? == "1234\n", "another content");
    let mut big = Vec::new();
    fs::File::open(upper.join("big"))?.read_to_end(&mut big)?;
    ensure!(big.len() == 32 << 20, "{} bytes", big.len());
    let sum =
        machinen_integration::process::Invocation::new("md5sum").arg(upper.join("big")).run()?.ok()?.text();
    let wanted = fs::read_to_string(upper.join("sum"))?;
    ensure!(sum.split(' ').next() == wanted.split(' ').next(), "another content");
    let holes = fs::metadata(upper.join("holes"))?;
    ensure!(holes.len() == 4096 * 211 && holes.blocks() * 512 < 200 << 10, "{} blocks", holes.blocks());
    kept.remove()
}

/// The writes of a container to a snapshot of that kind are in the snapshot, and visible at the next start.
fn is_kept_in(containerd: &Containerd, snapshotter: &'static str) -> Result<()> {
    let script = "echo run >> /count; cat /count; rm -f /etc/secret; mkdir -p /new; echo x > /new/f";
    let kept = Kept::run(containerd, IMAGE, snapshotter, script)?;
    ensure!(kept.delete_task()? == 0, "the script failed");
    let diff = kept.diff()?;
    for path in ["count", "etc/.wh.secret", "new/f"] {
        ensure!(diff.contains_key(path), "no {path} in the diff: {:?}", diff.keys());
    }
    ensure!(!diff.contains_key("bin/busybox"), "what was not touched is in the diff");
    let seen = kept.again()?;
    ensure!(seen == "run\nrun\n", "the next start printed\n{seen}");
    kept.delete_task()?;
    kept.remove()
}

/// Snapshots that are disks are attached to the guest unchanged.
fn blockfile_snapshotter(containerd: &mut Containerd) -> Result<()> {
    is_kept_in(containerd, "blockfile")?;

    // While the container is paused, other processes read a whole file system; the container can be killed
    // then.
    let script = "echo one > /paused; sleep 1000";
    let kept = Kept::start(containerd, IMAGE, "blockfile", script)?;
    let exec = |words: &[&str]| {
        containerd.ctr_ok(&[&["tasks", "exec", "--exec-id", "look", &kept.id], words].concat())
    };
    exec(&["sh", "-c", "until [ -s /paused ]; do :; done; echo two > /also"])?;
    containerd.ctr_ok(&["tasks", "pause", &kept.id])?;
    let diff = kept.diff()?;
    ensure!(diff.contains_key("paused") && diff.contains_key("also"), "not in the diff: {:?}", diff.keys());
    containerd.ctr_ok(&["tasks", "resume", &kept.id])?;
    exec(&["sh", "-c", "echo three > /third"])?;
    containerd.ctr_ok(&["tasks", "pause", &kept.id])?;
    let from = containerd.log().position();
    containerd.ctr_ok(&["tasks", "kill", "--signal", "SIGKILL", &kept.id])?;
    containerd.log().wait_for_event(from, "/tasks/exit")?;
    ensure!(kept.delete_task()? == 137, "not killed");
    ensure!(kept.diff()?.contains_key("third"), "the last write is not there");
    kept.remove()
}

/// For a container, snapshots whose layers are disks of the host are an overlay like any other.
fn erofs_snapshotter(containerd: &mut Containerd) -> Result<()> {
    is_kept_in(containerd, "erofs")?;
    // The layers of an image stay mounted as long as the image exists.
    containerd.ctr_ok(&["images", "rm", "--sync", IMAGE]).map(drop)
}

mod on_disks {
    use machinen_integration::{paths::Version, setup::Setup};

    use crate::harness::run_with;

    /// 1.6 does not have this snapshotter.
    #[test]
    fn blockfile_1_7() {
        run_with(Version::V1_7, &Setup::new().blockfile(), super::blockfile_snapshotter);
    }

    /// 2.1 is the first that has this snapshotter.
    #[test]
    fn erofs_2_1() {
        run_with(Version::V2_1, &Setup::new(), super::erofs_snapshotter);
    }

    #[test]
    fn blockfile_2_1() {
        run_with(Version::V2_1, &Setup::new().blockfile(), super::blockfile_snapshotter);
    }
}
