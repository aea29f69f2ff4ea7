//! What programs do with files of a volume, and what the host sees of it.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{bundle::Bundle, containerd::Containerd};
use nix::{sys::stat::Mode, unistd::mkfifo};

use super::{bind, run, served, shell, source};
use crate::harness::on_newest_containerd;

on_newest_containerd!(
    both_sides_read_and_write,
    owners_and_modes,
    names_change,
    an_unlinked_file_stays_open,
    shared_mappings_and_locks,
    a_big_file_and_many_small_ones,
    links_are_resolved_in_the_container,
    attributes_sizes_and_holes,
    a_fifo_of_the_host_connects_processes_of_the_guest,
);

fn both_sides_read_and_write(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    fs::write(data.join("from-host"), "one\n")?;
    let served = served(containerd, &data)?;
    ensure!(shell(&served, "cat /data/from-host; echo two >/data/from-guest; mkdir /data/dir")? == "one\n");
    ensure!(
        fs::read_to_string(data.join("from-guest"))? == "two\n",
        "the host does not see the guest's file"
    );
    ensure!(data.join("dir").is_dir(), "the host does not see the guest's directory");
    // Names and attributes may be a second old.
    File::options().append(true).open(data.join("from-host"))?.write_all(b"three\n")?;
    fs::write(data.join("dir/new"), "four\n")?;
    fs::remove_file(data.join("from-guest"))?;
    let seen = shell(&served, "sleep 1.2; cat /data/from-host /data/dir/new; ls /data")?;
    ensure!(seen == "one\nthree\nfour\ndir\nfrom-host\n", "{seen}");
    shell(&served, "for n in 1 2 3; do echo $n >>/data/log; done")?;
    File::options().append(true).open(data.join("log"))?.write_all(b"host\n")?;
    // The guest may not know the new size yet, and appends all the same.
    shell(&served, "echo 4 >>/data/log")?;
    let written = fs::read_to_string(data.join("log"))?;
    ensure!(written == "1\n2\n3\nhost\n4\n", "appended: {written}");
    let seen = shell(&served, "sleep 1.2; cat /data/log")?;
    ensure!(seen == written, "the guest sees {seen}");
    served.end()
}

fn owners_and_modes(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    fs::write(data.join("private"), "secret\n")?;
    fs::set_permissions(data.join("private"), fs::Permissions::from_mode(0o600))?;
    fs::create_dir(data.join("group"))?;
    chown(data.join("group"), Some(2000), Some(3000))?;
    fs::set_permissions(data.join("group"), fs::Permissions::from_mode(0o770))?;
    let bundle = Bundle::busybox(containerd)?;
    let script = "umask 027; cat /data/private 2>/dev/null || echo refused; touch /data/no 2>/dev/null || echo refused; \
                  echo x >/data/group/mine; mkdir /data/group/dir; id -u";
    let config = bundle.config(&["sh", "-c", script], |spec| {
        bind(spec, &data, "/data", &[]);
        spec["process"]["user"] = serde_json::json!({"uid": 1000, "gid": 1000, "additionalGids": [3000]});
        spec["process"]["capabilities"] = serde_json::json!({});
    })?;
    let seen = containerd.run_spec(&config).ok()?;
    ensure!(seen == "refused\nrefused\n1000\n", "{seen}");
    let mine = fs::metadata(data.join("group/mine"))?;
    ensure!((mine.uid(), mine.gid(), mine.mode() & 0o7777) == (1000, 1000, 0o640), "{mine:?}");
    run(
        containerd,
        &bundle,
        &data,
        "chown 7:8 /data/private; chmod 4711 /data/private; stat -c '%u:%g %a' /data/private",
    )?;
    let private = fs::metadata(data.join("private"))?;
    ensure!((private.uid(), private.gid(), private.mode() & 0o7777) == (7, 8, 0o4711), "{private:?}");
    Ok(())
}

fn names_change(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let script = "cd /data; echo a >a; echo b >b; mv a b; cat b; ln b c; stat -c %h c; mkdir d; mv b d/e; ls . d; \
                  rmdir d 2>/dev/null || echo not empty; rm -r d; ls; stat -c %h c";
    let seen = run(containerd, &Bundle::busybox(containerd)?, &data, script)?;
    ensure!(seen == "a\n2\n.:\nc\nd\n\nd:\ne\nnot empty\nc\n1\n", "{seen}");
    ensure!(fs::read_to_string(data.join("c"))? == "a\n", "the host sees another file");
    Ok(())
}

fn an_unlinked_file_stays_open(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let script = "cd /data; echo kept >f; exec 3<f 4>>f; rm f; echo more >&4; cat <&3; ls | wc -l";
    let seen = run(containerd, &Bundle::busybox(containerd)?, &data, script)?;
    ensure!(seen == "kept\nmore\n0\n", "{seen}");
    ensure!(fs::read_dir(&data)?.next().is_none(), "something is left on the host");
    Ok(())
}

/// Locks hold between processes of one pod.
fn shared_mappings_and_locks(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let program = r#"
import fcntl, mmap, os, struct
f = open("/data/map", "w+b"); f.truncate(8192)
m = mmap.mmap(f.fileno(), 8192, mmap.MAP_SHARED)
child = os.fork()
if child == 0:
    m[4096:4101] = b"child"; os._exit(0)
os.waitpid(child, 0)
print(m[4096:4101].decode()); m[0:6] = b"parent"; m.flush()
def other(lock):
    child = os.fork()
    if child == 0:
        g = open("/data/map", "r+b")
        try: lock(g)
        except OSError: os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
posix = lambda g: fcntl.lockf(g, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)
whole = lambda g: fcntl.flock(g, fcntl.LOCK_EX | fcntl.LOCK_NB)
for lock, free in (posix, lambda: fcntl.lockf(f, fcntl.LOCK_UN)), (whole, lambda: fcntl.flock(f, fcntl.LOCK_UN)):
    lock(f); held = other(lock); free(); print(held, other(lock))
"#;
    let bundle = Bundle::with_workloads(containerd)?;
    let config = bundle.config(&["python3.13", "-c", program], |spec| bind(spec, &data, "/data", &[]))?;
    let seen = containerd.run_spec(&config).ok()?;
    ensure!(seen == "child\n1 0\n1 0\n", "{seen}");
    let written = fs::read(data.join("map"))?;
    ensure!(
        written.len() == 8192 && &written[..6] == b"parent" && &written[4096..4101] == b"child",
        "not written"
    );
    Ok(())
}

fn a_big_file_and_many_small_ones(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let many = data.join("many");
    fs::create_dir(&many)?;
    for number in 0..3000 {
        File::create(many.join(format!("file-{number}")))?;
    }
    let script = "cd /data; ls many | wc -l; ls -l many | tail -n 1 | wc -l; dd if=/dev/urandom of=big bs=1M count=24 2>/dev/null; \
                  sha256sum <big; for n in $(seq 50); do echo $n >small-$n; done; ls | wc -l";
    let seen = run(containerd, &Bundle::busybox(containerd)?, &data, script)?;
    let lines: Vec<_> = seen.lines().collect();
    ensure!(lines.len() == 4 && lines[0] == "3000" && lines[1] == "1" && lines[3] == "52", "{seen}");
    let sum =
        machinen_integration::process::Invocation::new("sha256sum").arg(data.join("big")).run()?.ok()?.text();
    let digest = lines[2].split(' ').next().context("a digest")?;
    ensure!(sum.starts_with(digest), "the host has another content: {sum} {seen}");
    Ok(())
}

fn links_are_resolved_in_the_container(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    symlink("/etc/passwd", data.join("absolute"))?;
    symlink("../etc/secret", data.join("upwards"))?;
    let script =
        "cat /data/absolute | head -n 1; cat /data/upwards; ln -s absolute /data/made; readlink /data/made";
    let seen = run(containerd, &Bundle::busybox(containerd)?, &data, script)?;
    ensure!(seen == "root:x:0:0:root:/root:/bin/sh\nfor root only\nabsolute\n", "{seen}");
    Ok(())
}

fn attributes_sizes_and_holes(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let program = r#"
import os
os.chdir("/data")
f = os.open("holes", os.O_RDWR | os.O_CREAT, 0o644)
os.pwrite(f, b"end", (1 << 32) + 5); print(os.fstat(f).st_size, os.fstat(f).st_blocks < 64)
os.posix_fallocate(f, 0, 4096); os.ftruncate(f, 10); print(os.fstat(f).st_size, os.pread(f, 20, 0) == bytes(10))
os.setxattr("holes", "user.machinen", b"kept"); print(os.getxattr("holes", "user.machinen"), os.listxattr("holes"))
os.utime("holes", ns=(1_000_000_001, 2_000_000_002)); print(os.stat("holes").st_mtime_ns)
s = os.statvfs("/data"); print(s.f_blocks > 0)
"#;
    let bundle = Bundle::with_workloads(containerd)?;
    let config = bundle.config(&["python3.13", "-c", program], |spec| bind(spec, &data, "/data", &[]))?;
    let seen = containerd.run_spec(&config).ok()?;
    let wanted = "4294967304 True\n10 True\nb'kept' ['user.machinen']\n2000000002\nTrue\n";
    ensure!(seen == wanted, "{seen}");
    Ok(())
}

/// A process that waits at it waits in the guest's kernel, and holds up nothing else.
fn a_fifo_of_the_host_connects_processes_of_the_guest(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    mkfifo(&data.join("fifo"), Mode::S_IRWXU)?;
    let script = "for i in 1 2 3 4 5 6; do cat /data/fifo >/dev/null & done; ls /data; echo x >/data/file; \
                  cat /data/file; kill $(jobs -p); wait; (echo through >/data/fifo) & cat /data/fifo";
    let seen = run(containerd, &Bundle::busybox(containerd)?, &data, script)?;
    ensure!(seen == "fifo\nx\nthrough\n", "{seen}");
    Ok(())
}
