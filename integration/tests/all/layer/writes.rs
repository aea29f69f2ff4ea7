//! The writes of a container, of each kind and of any number, reach its snapshot.

use std::{
    fs,
    io::Read,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    containerd::Containerd,
    process::Invocation,
    setup::{Setup, Value},
};

use super::{DISK, Kept};
use crate::harness::{IMAGE, on_every_containerd, on_newest_containerd};

on_every_containerd!(writes_reach_the_snapshot, stop_and_start_keeps_writes);
on_newest_containerd!(
    nothing_written_leaves_nothing,
    too_much_stays_on_the_disk,
    many_files_and_large_ones,
    names_of_one_file_and_sockets_are_kept,
);

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
    ensure!(status("gone").is_err(), "a directory that was made and removed");
    // No attributes that only the guest uses.
    let mut origin = [0; 256];
    let origin = rustix::fs::lgetxattr(upper.join("etc/passwd"), "trusted.overlay.origin", &mut origin[..]);
    ensure!(origin.is_err(), "overlayfs's own attributes of the guest");

    ensure!(kept.delete_task()? == 0, "the script failed");
    let disk = upper.with_file_name(DISK);
    ensure!(!disk.exists(), "the disk is still there");
    let names: Vec<_> = fs::read_dir(upper.parent().context("no parent")?)?.collect::<Result<_, _>>()?;
    ensure!(names.len() == 2, "more than the snapshot's two directories: {names:?}");

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
    let next = format!("{}-next", kept.id);
    let mounts = String::from_utf8(kept.snapshots(&["prepare", "--target", "/nowhere", &next, &committed])?)?;
    ensure!(mounts.contains(&upper.display().to_string()), "the commit is another directory: {mounts}");
    kept.snapshots(&["rm", &next])?;
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

fn nothing_written_leaves_nothing(containerd: &mut Containerd) -> Result<()> {
    let kept = Kept::run(containerd, IMAGE, "overlayfs", "cat /etc/passwd")?;
    let upper = kept.dir()?;
    let before = fs::metadata(&upper)?.ino();
    ensure!(kept.delete_task()? == 0, "the script failed");
    ensure!(
        fs::read_dir(&upper)?.next().is_none() && fs::metadata(&upper)?.ino() == before,
        "the directory was replaced"
    );
    ensure!(!upper.with_file_name(DISK).exists(), "the disk is still there");
    ensure!(kept.diff()?.is_empty(), "the diff is not empty");
    kept.remove()
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
    let sum = Invocation::new("md5sum").arg(upper.join("big")).run()?.ok()?.text();
    let wanted = fs::read_to_string(upper.join("sum"))?;
    ensure!(sum.split(' ').next() == wanted.split(' ').next(), "another content");
    let holes = fs::metadata(upper.join("holes"))?;
    ensure!(holes.len() == 4096 * 211 && holes.blocks() * 512 < 200 << 10, "{} blocks", holes.blocks());
    kept.remove()
}
