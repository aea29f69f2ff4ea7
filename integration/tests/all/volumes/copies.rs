//! Copy mounts: a container gets a copy of a directory of the host, and what it writes stays in the VM.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Result, ensure};
use containerd_shim_protos::api::{DeleteResponse, Empty};
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    paths,
    process::Invocation,
    served::Served,
    setup::{self, Setup},
};
use serde_json::Value;

use super::{bind, shell, source};
use crate::{
    checkpoint::checkpoint,
    fork::{fork, sh},
    harness::{IMAGE, on_newest_containerd},
};

on_newest_containerd!(
    the_host_keeps_its_files,
    a_changed_directory_is_another_copy,
    several_and_mounts_below,
    writes_are_bounded,
    what_is_written_is_in_a_checkpoint,
    other_copies_are_refused,
    forks_have_what_was_written,
    mistakes_are_named,
    a_pod_gives_disks_back,
    disks_are_collected,
);

const ANNOTATION: &str = "io.machinen.copy-mount";

/// A directory of the host with a file, a link, a directory of a user and an executable.
fn directory(containerd: &Containerd) -> Result<PathBuf> {
    let dir = source(containerd)?;
    // Other tests share the cache: these files are in no disk yet.
    fs::write(dir.join("file"), format!("one {}\n", dir.display()))?;
    symlink("file", dir.join("link"))?;
    fs::create_dir(dir.join("dir"))?;
    fs::write(dir.join("dir/owned"), "owned\n")?;
    chown(dir.join("dir/owned"), Some(1000), Some(1001))?;
    fs::write(dir.join("run"), "#!/bin/sh\necho ran\n")?;
    fs::set_permissions(dir.join("run"), fs::Permissions::from_mode(0o755))?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o751))?;
    Ok(dir)
}

fn copied(spec: &mut Value, mounts: &[(&Path, &str)]) {
    let all: Vec<_> =
        mounts.iter().map(|(host, container)| format!("{}:{container}", host.display())).collect();
    spec["annotations"][ANNOTATION] = all.join(",").into();
}

/// What the host's directory has: names, kinds, modes, times and content.
fn state(dir: &Path) -> Result<String> {
    let list = Invocation::new("find").arg(dir).args(["-printf", "%P %y %m %U %G %T@ %l\\n"]).run()?.ok()?;
    let content = Invocation::new("grep").args(["-r", ""]).arg(dir).run()?.ok()?;
    Ok(list.text() + &content.text())
}

fn run(containerd: &Containerd, bundle: &Bundle, dir: &Path, script: &str) -> Result<String> {
    let config = bundle.config(&["sh", "-ec", script], |spec| copied(spec, &[(dir, "/data")]))?;
    containerd.run_spec(&config).ok()
}

/// The base disks of the cache whose source is the directory.
fn disks(containerd: &Containerd, dir: &Path) -> Result<BTreeSet<String>> {
    let listed = containerd.machinen(&["rootdisk", "ls", "--json"])?.run()?.ok()?;
    let listed: Value = serde_json::from_str(&listed.text())?;
    let all = listed.as_array().into_iter().flatten();
    let ours = all.filter(|disk| disk["source"] == dir.display().to_string());
    Ok(ours.filter_map(|disk| disk["key"].as_str().map(ToOwned::to_owned)).collect())
}

const CHANGE: &str = "cat /data/link /data/dir/owned; /data/run; stat -c '%u:%g %a' /data/dir/owned /data; \
                      echo more >>/data/file; rm -r /data/dir; mkdir /data/new; echo x >/data/new/x; chmod 700 /data/run";

/// The second container finds the disk of the first one, and nothing of what that has written.
fn the_host_keeps_its_files(containerd: &mut Containerd) -> Result<()> {
    let dir = directory(containerd)?;
    let (before, bundle) = (state(&dir)?, Bundle::busybox(containerd)?);
    let file = fs::read_to_string(dir.join("file"))?;
    for _ in 0..2 {
        let seen = run(containerd, &bundle, &dir, CHANGE)?;
        ensure!(seen == format!("{file}owned\nran\n1000:1001 644\n0:0 751\n"), "{seen:?}");
        ensure!(state(&dir)? == before, "the host's directory has changed: {}", state(&dir)?);
        ensure!(disks(containerd, &dir)?.len() == 1, "{:?}", disks(containerd, &dir));
    }
    Ok(())
}

fn a_changed_directory_is_another_copy(containerd: &mut Containerd) -> Result<()> {
    let (dir, bundle) = (directory(containerd)?, Bundle::busybox(containerd)?);
    let config = bundle.config(&["sleep", "1000"], |spec| copied(spec, &[(&dir, "/data")]))?;
    let running = Served::run(containerd, &config)?;
    fs::write(dir.join("file"), "two\n")?;
    fs::remove_file(dir.join("link"))?;
    let seen = run(containerd, &bundle, &dir, "cat /data/file; ls /data")?;
    ensure!(seen == "two\ndir\nfile\nrun\n", "{seen:?}");
    // What runs already keeps what was copied.
    let seen = shell(&running, "cat /data/link; ls /data")?;
    ensure!(seen.starts_with("one") && seen.ends_with("dir\nfile\nlink\nrun\n"), "{seen:?}");
    ensure!(disks(containerd, &dir)?.len() == 2, "{:?}", disks(containerd, &dir));
    running.end()
}

/// A read-only root file system, a copy below a directory that the image does not have, and a volume in a copy.
fn several_and_mounts_below(containerd: &mut Containerd) -> Result<()> {
    let (one, two, volume) = (directory(containerd)?, directory(containerd)?, source(containerd)?);
    fs::write(two.join("second"), "second\n")?;
    fs::write(volume.join("shared"), "shared\n")?;
    let script = "cat /a/b/c/file /two/second /two/dir/shared; echo x >/a/b/c/x; echo y >/two/y; echo z >/two/dir/z; \
                  ! echo no >/root-file 2>/dev/null; ls /a/b/c /two";
    let config = Bundle::busybox(containerd)?.config(&["sh", "-ec", script], |spec| {
        spec["root"]["readonly"] = true.into();
        bind(spec, &volume, "/two/dir", &[]);
        copied(spec, &[(&two, "/two"), (&one, "/a/b/c")]);
    })?;
    let seen = containerd.run_spec(&config).ok()?;
    let file = fs::read_to_string(one.join("file"))?;
    let listed = "/a/b/c:\ndir\nfile\nlink\nrun\nx\n\n/two:\ndir\nfile\nlink\nrun\nsecond\ny\n";
    ensure!(seen == format!("{file}second\nshared\n{listed}"), "{seen:?}");
    ensure!(fs::read_to_string(volume.join("z"))? == "z\n", "the volume is not the host's");
    ensure!(!one.join("x").exists() && !two.join("y").exists() && !two.join("dir/z").exists());
    Ok(())
}

fn writes_are_bounded(containerd: &mut Containerd) -> Result<()> {
    let dir = directory(containerd)?;
    let script = "df -m /data | tail -1 | awk '{ print ($2 < 70) }'; ! dd if=/dev/zero of=/data/big bs=1M count=90 2>&1";
    let config = Bundle::busybox(containerd)?.config(&["sh", "-ec", script], |spec| {
        copied(spec, &[(&dir, "/data")]);
        spec["annotations"]["io.machinen.copy-mount-size"] = "64".into();
    })?;
    let seen = containerd.run_spec(&config).ok()?;
    ensure!(seen.contains("No space left on device"), "{seen}");
    Ok(())
}

/// Reads and writes open files in the copy when it is told to.
const LINES: &str = "cd /data/dir; exec 3<../file 4>>../log; echo one >&4; rm ../run; echo kept >../kept; chmod 711 .; \
                     touch /dev/shm/ready; until [ -e /dev/shm/go ]; do usleep 50000; done; cat <&3 >&4; pwd >&4; \
                     touch /dev/shm/done; exec sleep 1000";
const READY: &str = "until [ -e /dev/shm/ready ]; do usleep 50000; done";
const GO: &str =
    "touch /dev/shm/go; for n in $(seq 400); do [ -e /dev/shm/done ] && exit 0; usleep 50000; done; exit 1";

/// The checkpoint is tried, and the restored container is checkpointed and restored again. The host's directory has changed
/// meanwhile.
fn what_is_written_is_in_a_checkpoint(containerd: &mut Containerd) -> Result<()> {
    let (dir, bundle) = (directory(containerd)?, Bundle::busybox(containerd)?);
    let file = fs::read_to_string(dir.join("file"))?;
    let config = bundle.config(&["sh", "-ec", LINES], |spec| {
        copied(spec, &[(&dir, "/data")]);
        spec["annotations"]["io.machinen.verify"] = "restore".into();
    })?;
    let first = Served::run(containerd, &config)?;
    shell(&first, READY)?;
    let images = containerd.root().join("images");
    checkpoint(&first, &images)?;
    let inspected = containerd.machinen(&["snapshot", "inspect"])?.arg(&images).run()?.ok()?.text();
    let key = disks(containerd, &dir)?.pop_first().unwrap_or_default();
    ensure!(inspected.lines().any(|line| line == format!("copy       /data of {key}")), "{inspected}");
    shell(&first, "echo later >/data/later")?;
    first.end()?;
    fs::write(dir.join("file"), "changed\n")?;
    let second = Served::restored(containerd, &config, &images)?;
    fs::remove_dir_all(&images)?;
    let list = "ls /data; cat /data/kept /data/log; stat -c %a /data/dir";
    let expected = "dir\nfile\nkept\nlink\nlog\nkept\none\n711\n";
    let seen = shell(&second, list)?;
    ensure!(seen == expected, "{seen:?}");
    checkpoint(&second, &images)?;
    second.end()?;
    let third = Served::restored(containerd, &config, &images)?;
    shell(&third, GO)?;
    let log = shell(&third, "cat /data/log")?;
    ensure!(log == format!("one\n{file}/data/dir\n"), "{log:?}");
    third.end()?;
    ensure!(!dir.join("log").exists() && dir.join("run").exists(), "the host's directory has changed");
    let left: Vec<_> = fs::read_dir(paths::workspace().join("target/test/rootdisk"))?.flatten().collect();
    let left: Vec<_> = left.iter().map(|entry| entry.file_name()).collect();
    ensure!(!left.iter().any(|name| name.to_string_lossy().contains("archived")), "{left:?}");
    Ok(fs::remove_dir_all(&images)?)
}

/// A restore that is refused with these words, and leaves nothing.
fn refused(containerd: &Containerd, config: &Path, images: &Path, words: &[&str]) -> Result<()> {
    let served = Served::of(containerd, config)?;
    let mut create = served.shim.create_request();
    create.checkpoint = images.display().to_string();
    let (_, message) = served.client.refused("Create", &create)?;
    for word in words {
        ensure!(message.contains(word), "{word:?} is not in {message}");
    }
    served.shim.shut_down(&served.client)
}

fn other_copies_are_refused(containerd: &mut Containerd) -> Result<()> {
    let (dir, bundle) = (directory(containerd)?, Bundle::busybox(containerd)?);
    let own_cache = containerd.root().join("rootdisk");
    containerd.configure(&Setup::new().set("rootdisk", "dir", setup::Value::path(&own_cache)))?;
    let config = |mounts: &[(&Path, &str)]| bundle.config(&["sleep", "1000"], |spec| copied(spec, mounts));
    let served = Served::run(containerd, &config(&[(&dir, "/data")])?)?;
    let images = containerd.root().join("images");
    checkpoint(&served, &images)?;
    served.end()?;
    let without = bundle.config(&["sleep", "1000"], |_| ())?;
    refused(containerd, &without, &images, &["a copy mount at /data", ANNOTATION])?;
    let more = config(&[(&dir, "/data"), (&dir, "/more")])?;
    refused(containerd, &more, &images, &["a copy mount at /more, which the checkpoint does not have"])?;
    // The base disk is removed, and the directory has other files.
    let same = config(&[(&dir, "/data")])?;
    let key = disks(containerd, &dir)?.pop_first().unwrap_or_default();
    containerd.machinen(&["rootdisk", "prune"])?.run()?.ok()?;
    let content = fs::read(dir.join("file"))?;
    let modified = fs::metadata(dir.join("file"))?.modified()?;
    fs::write(dir.join("file"), "other\n")?;
    refused(containerd, &same, &images, &["the copy mount at /data", &key, "not in the cache any more"])?;
    // A directory with the same files will do.
    fs::write(dir.join("file"), content)?;
    fs::File::open(dir.join("file"))?.set_modified(modified)?;
    Served::restored(containerd, &same, &images)?.end()?;
    containerd.configure(&Setup::new())?;
    Ok(fs::remove_dir_all(&images)?)
}

fn forks_have_what_was_written(containerd: &mut Containerd) -> Result<()> {
    let dir = directory(containerd)?;
    let annotation = format!("{ANNOTATION}={}:/data", dir.display());
    let run = containerd
        .run(IMAGE, &["sh", "-c", "echo x >/data/x; rm /data/link; touch /ready; exec sleep 100000"])
        .detached()
        .flag("--null-io")
        .flags(&["--annotation", &annotation]);
    run.ok()?;
    let (source, new) = (run.container(), containerd.new_id());
    sh(containerd, source, "until [ -e /ready ]; do usleep 50000; done")?;
    fork(containerd, &[source, &new])?;
    sh(containerd, source, "echo source >/data/x")?;
    sh(containerd, &new, "echo new >/data/y")?;
    let list = "cd /data; ls; cat x y 2>/dev/null || true";
    let seen = (sh(containerd, source, list), sh(containerd, &new, list));
    let expected = ("dir\nfile\nrun\nx\nsource".to_owned(), "dir\nfile\nrun\nx\ny\nx\nnew".to_owned());
    ensure!((seen.0?, seen.1?) == expected, "the fork and its source share files, or lack some");
    ensure!(!dir.join("x").exists() && dir.join("link").is_symlink());
    containerd.end(source)?;
    containerd.end(&new)
}

fn mistakes_are_named(containerd: &mut Containerd) -> Result<()> {
    let dir = directory(containerd)?;
    let shown = dir.display();
    let pod = "io.kubernetes.cri.container-type=container";
    for (value, other, words) in [
        (
            format!("{shown}-gone:/data"),
            None,
            &["-gone, the source of the copy mount /data", "No such file"][..],
        ),
        (
            format!("{shown}/file:/data"),
            None,
            &["/file, the source of the copy mount /data", "not a directory"],
        ),
        (format!("{shown}:data"), None, &[ANNOTATION, "two absolute paths"]),
        (format!("{shown}:/a/../b"), None, &[ANNOTATION, "two absolute paths"]),
        (format!("{shown}:/a,{shown}:/a/"), None, &[ANNOTATION, "whose destinations differ"]),
        (
            format!("{shown}:/data"),
            Some("io.machinen.copy-mount-size=1"),
            &["copy-mount-size", "MiB from 64"],
        ),
        (format!("{shown}:/data"), Some(pod), &[ANNOTATION, "rootdisk.copies_in_pods"]),
    ] {
        let mut run =
            containerd.run(IMAGE, &["true"]).flag("--annotation").flag(format!("{ANNOTATION}={value}"));
        if let Some(annotation) = other {
            run = run.flags(&["--annotation", annotation]);
        }
        let output = run.output()?;
        ensure!(output.status != 0, "{value} was accepted");
        for word in words {
            ensure!(output.error_text().contains(word), "{word:?} is not in {output}");
        }
    }
    Ok(())
}

/// A container of a pod has a copy of its own, and its disks leave the VM with it, as they do if it cannot be created.
fn a_pod_gives_disks_back(containerd: &mut Containerd) -> Result<()> {
    let (dir, bundle) = (directory(containerd)?, Bundle::busybox(containerd)?);
    let config = |at: &str| bundle.config(&["sleep", "1000"], |spec| copied(spec, &[(&dir, at)]));
    let users = || -> Result<usize> {
        let listed = containerd.machinen(&["rootdisk", "ls", "--json"])?.run()?.ok()?;
        let listed: Value = serde_json::from_str(&listed.text())?;
        let ours = listed.as_array().into_iter().flatten();
        let ours = ours.filter(|disk| disk["source"] == dir.display().to_string());
        Ok(ours.filter_map(|disk| disk["users"].as_array()).map(Vec::len).sum())
    };
    let first = Served::idle(containerd)?;
    for _ in 0..2 {
        let mut second = first.in_same_vm(containerd, &config("/data")?)?;
        second.create(|_| ())?;
        second.begin()?;
        let seen = shell(&second, "ls /data; echo x >/data/x")?;
        ensure!(seen == "dir\nfile\nlink\nrun\n" && users()? > 0, "{seen:?}");
        shell(&first, "[ ! -e /data ]")?;
        second.client.ok::<Empty>("Kill", &second.kill("", 9))?;
        second.wait("")?;
        second.client.ok::<DeleteResponse>("Delete", &second.delete(""))?;
        fs::remove_dir_all(&second.shim.bundle)?;
        ensure!(users()? == 0, "the disk is still in use");
        let refused = first.in_same_vm(containerd, &config("/bin/busybox/data")?)?;
        refused.client.refused("Create", &refused.shim.create_request())?;
        fs::remove_dir_all(&refused.shim.bundle)?;
        ensure!(users()? == 0, "the disk of a container that was not created is still in use");
    }
    first.end()
}

fn disks_are_collected(containerd: &mut Containerd) -> Result<()> {
    let (dir, bundle) = (directory(containerd)?, Bundle::busybox(containerd)?);
    let own_cache = containerd.root().join("rootdisk");
    containerd.configure(&Setup::new().set("rootdisk", "dir", setup::Value::path(&own_cache)))?;
    let config = bundle.config(&["sleep", "1000"], |spec| copied(spec, &[(&dir, "/data")]))?;
    let running = Served::run(containerd, &config)?;
    let prune = || containerd.machinen(&["rootdisk", "prune"])?.run()?.ok();
    prune()?;
    ensure!(disks(containerd, &dir)?.len() == 1, "a disk in use was removed");
    running.end()?;
    prune()?;
    ensure!(disks(containerd, &dir)?.is_empty(), "{:?}", disks(containerd, &dir));
    containerd.configure(&Setup::new())
}
