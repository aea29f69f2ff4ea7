//! The container's files on the host, below the root of the process whose pid represents the container.

mod border;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    process::Invocation,
    served::Served,
    setup::{Setup, Value},
};

use crate::harness::{IMAGE, on_every_containerd, on_newest_containerd};

on_every_containerd!(
    the_host_sees_the_files,
    the_container_sees_what_the_host_writes,
    a_paused_container_is_for_reading,
);
on_newest_containerd!(
    much_is_copied_both_ways,
    either_channel,
    checkpoints_are_unaffected,
    each_container_of_a_pod_has_its_own,
);

/// A container that waits, and its root on the host.
struct Shown<'a> {
    containerd: &'a Containerd,
    id: String,
    pid: u32,
}

impl<'a> Shown<'a> {
    fn start(containerd: &'a Containerd) -> Result<Self> {
        Self::of(containerd, containerd.idle(IMAGE, None)?)
    }

    fn of(containerd: &'a Containerd, id: String) -> Result<Self> {
        let pid = containerd.task(&id).listed()?.pid;
        Ok(Self { containerd, id, pid })
    }

    fn root(&self, path: &str) -> PathBuf {
        root(self.pid, path)
    }

    /// Runs a shell command in the container, which must succeed, and returns what it printed.
    fn inside(&self, script: &str) -> Result<String> {
        let exec = self.containerd.new_id();
        let output = self.containerd.exec(&self.id, &exec, &["sh", "-ec", script]).output()?;
        Ok(output.ok()?.text())
    }

    fn end(self) -> Result<()> {
        self.containerd.end(&self.id)
    }
}

fn root(pid: u32, path: &str) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join("root").join(path)
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let names = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

fn the_host_sees_the_files(containerd: &mut Containerd) -> Result<()> {
    let shown = Shown::start(containerd)?;
    let etc = names(&shown.root("etc"))?;
    ensure!(etc.contains(&"passwd.link".to_owned()) && etc.contains(&"secret".to_owned()), "{etc:?}");

    // The time is that of the write, not of an earlier moment.
    let file = shown.root("new");
    ensure!(
        fs::read(&file).is_err_and(|error| error.kind() == io::ErrorKind::NotFound),
        "the file is there already"
    );
    shown.inside("echo one >/new")?;
    ensure!(fs::read_to_string(&file)? == "one\n", "{:?}", fs::read_to_string(&file));
    let mut held = File::open(&file)?;
    shown.inside("echo two >>/new")?;
    let mut text = String::new();
    held.read_to_string(&mut text)?;
    ensure!(text == "one\ntwo\n", "an open file reads {text:?}");
    // The write is in place: size and name stay the same.
    shown.inside("printf 1 | dd of=/new conv=notrunc 2>/dev/null")?;
    text.clear();
    held.rewind()?;
    held.read_to_string(&mut text)?;
    ensure!(text == "1ne\ntwo\n", "an open file reads {text:?}");
    shown.inside("mv /new /moved; echo other >/new; rm /moved")?;
    ensure!(fs::read_to_string(&file)? == "other\n", "the name stands for another file");
    ensure!(held.metadata()?.len() == 8, "an open file without a name has another size");
    drop(held);

    // All attributes of a file.
    let of = |path: &str| fs::symlink_metadata(shown.root(path)).with_context(|| path.to_owned());
    let home = of("home/alice")?;
    ensure!((home.uid(), home.gid(), home.mode() & 0o7777) == (1000, 1000, 0o750), "{home:?}");
    ensure!(of("bin/setuid")?.mode() == 0o100_755, "without setuid: {:o}", of("bin/setuid")?.mode());
    ensure!(fs::read_link(shown.root("bin/ls"))? == Path::new("busybox"), "a link is a link");
    let (passwd, link) = (of("etc/passwd")?, of("etc/passwd.link")?);
    ensure!(passwd.nlink() == 2 && passwd.ino() == link.ino(), "{passwd:?} and {link:?}");
    let mut value = Vec::with_capacity(64);
    let room = rustix::buffer::spare_capacity(&mut value);
    rustix::fs::getxattr(shown.root("etc/labelled"), "user.machinen", room)?;
    ensure!(value == b"kept", "{value:?}");
    let busybox = Path::new("/bin/busybox").metadata()?;
    ensure!(of("bin/busybox")?.len() == busybox.len(), "{:?}", of("bin/busybox")?);

    // The init's view, including mounts.
    let command = fs::read(shown.root("proc/1/cmdline"))?;
    ensure!(command.starts_with(b"sleep\0"), "{}", String::from_utf8_lossy(&command));
    shown.inside("echo in memory >/dev/shm/file")?;
    ensure!(fs::read_to_string(shown.root("dev/shm/file"))? == "in memory\n", "a tmpfs");

    // A device of the container cannot be opened on this host.
    let null = of("dev/null")?;
    ensure!(null.file_type().is_char_device() && null.rdev() == 0x103, "{null:?}");
    let device = File::open(shown.root("dev/null"));
    ensure!(
        device.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied),
        "a device of the host's"
    );
    let program = Invocation::new(shown.root("bin/busybox")).arg("true").spawn();
    ensure!(program.is_err(), "a program of the container's runs on the host");
    shown.inside("ln -s /etc/hostname /absolute")?;
    ensure!(fs::read_link(shown.root("absolute"))? == Path::new("/etc/hostname"), "an absolute link");
    // The host reads links and follows none, or the guest would decide which file of the host a program opens.
    shown.inside("ln -s etc /relative; ln -s /etc /directory")?;
    for link in ["absolute", "relative/passwd", "directory/passwd", "proc/self/root/etc/passwd"] {
        let followed = File::open(shown.root(link));
        ensure!(
            followed.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::ELOOP)),
            "{link}: {followed:?}"
        );
    }
    shown.end()
}

fn the_container_sees_what_the_host_writes(containerd: &mut Containerd) -> Result<()> {
    let shown = Shown::start(containerd)?;
    let at = |path: &str| shown.root(path);
    fs::create_dir(at("data"))?;
    fs::set_permissions(at("data"), fs::Permissions::from_mode(0o711))?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o640).open(at("data/file"))?;
    file.write_all(b"from the host\n")?;
    chown(at("data/file"), Some(1000), Some(50))?;
    file.sync_all()?;
    let seen = shown.inside("cat /data/file; stat -c '%u %g %a' /data /data/file")?;
    ensure!(seen == "from the host\n0 0 711\n1000 50 640\n", "{seen}");

    // A file of the image, which is copied up at the first write.
    let mut passwd = OpenOptions::new().append(true).open(at("etc/passwd"))?;
    passwd.write_all(b"bob:x:1001:1001::/:/bin/sh\n")?;
    ensure!(passwd.metadata()?.len() == at("etc/passwd").metadata()?.len(), "a copied file has two sizes");
    let entry = shown.inside("grep ^bob /etc/passwd")?;
    ensure!(entry == "bob:x:1001:1001::/:/bin/sh\n", "{entry}");

    symlink("/data/file", at("link"))?;
    fs::hard_link(at("data/file"), at("second"))?;
    fs::rename(at("data"), at("renamed"))?;
    ensure!(fs::read_to_string(at("renamed/file"))? == "from the host\n", "after a rename");
    fs::write(at("etc/secret"), "shorter")?;
    fs::remove_file(at("etc/group"))?;
    let old = rustix::fs::Timespec { tv_sec: 1_000_000_000, tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: old, last_modification: old };
    rustix::fs::utimensat(rustix::fs::CWD, at("second"), &times, rustix::fs::AtFlags::empty())?;
    rustix::fs::setxattr(at("second"), "user.host", b"value", rustix::fs::XattrFlags::empty())?;
    let mut value = Vec::with_capacity(64);
    rustix::fs::getxattr(at("renamed/file"), "user.host", rustix::buffer::spare_capacity(&mut value))?;
    ensure!(value == b"value", "{value:?}");
    nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRUSR)?;
    let seen = shown.inside(
        "readlink /link; stat -c '%h %Y' /renamed/file; cat /etc/secret; echo; ls /etc/group /data 2>&1 | wc -l; \
         stat -c %F /pipe",
    )?;
    ensure!(seen == "/data/file\n2 1000000000\nshorter\n2\nfifo\n", "{seen}");
    let full = fs::remove_dir(at("renamed"));
    ensure!(full.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::DirectoryNotEmpty), "{full:?}");

    // Files that the host has written belong to the container like all others.
    let id = shown.id.clone();
    shown.containerd.ctr_ok(&["tasks", "pause", &id])?;
    let archive = containerd.root().join("diff.tar.gz");
    fs::write(&archive, containerd.ctr(["snapshots", "diff"])?.arg(&id).run()?.ok()?.stdout)?;
    let names = Invocation::new("tar").arg("-tzf").arg(&archive).run()?.ok()?.text();
    ensure!(
        names.contains("renamed/file") && names.contains("etc/.wh.group"),
        "the file is not in the snapshot: {names}"
    );
    fs::remove_file(&archive)?;
    containerd.ctr_ok(&["tasks", "resume", &id])?;
    shown.end()
}

/// `nerdctl cp`: an archive of the files below the root, and one that is unpacked there.
fn much_is_copied_both_ways(containerd: &mut Containerd) -> Result<()> {
    const SIZE: u64 = 100 << 20;
    let shown = Shown::start(containerd)?;
    let sum = |path: &Path| -> Result<String> {
        let text = Invocation::new("sha256sum").arg(path).run()?.ok()?.text();
        Ok(text.split(' ').next().unwrap_or_default().to_owned())
    };
    let theirs = shown.inside(&format!(
        "head -c {SIZE} /dev/urandom >/big; mkdir -p /tree/a/b; i=0; \
         while [ $i -lt 300 ]; do echo $i >/tree/a/$i; ln -s ../$i /tree/a/b/$i; i=$((i+1)); done; \
         sha256sum </big"
    ))?;
    let begun = Instant::now();
    let ours = sum(&shown.root("big"))?;
    ensure!(theirs.starts_with(&ours), "{theirs} became {ours}");
    println!("reading {} MiB took {:.1?}", SIZE >> 20, begun.elapsed());

    let (archive, copy) = (containerd.root().join("copy.tar"), containerd.root().join("copy"));
    fs::create_dir(&copy)?;
    let tar = |mode: &str, dir: &Path, what: &str| -> Result<()> {
        Invocation::new("tar").arg(mode).arg(&archive).arg("-C").arg(dir).arg(what).run()?.ok().map(drop)
    };
    let begun = Instant::now();
    tar("-cf", &shown.root(""), "tree")?;
    println!("archiving 600 files took {:.1?}", begun.elapsed());
    tar("-xf", &copy, "tree")?;
    for number in [0, 150, 299] {
        let text = fs::read_to_string(copy.join(format!("tree/a/{number}")))?;
        ensure!(text == format!("{number}\n"), "{number}: {text}");
        let link = fs::read_link(copy.join(format!("tree/a/b/{number}")))?;
        ensure!(link == Path::new(&format!("../{number}")), "{number}: {}", link.display());
    }
    ensure!(
        names(&copy.join("tree/a"))?.len() == 301 && names(&copy.join("tree/a/b"))?.len() == 300,
        "files are missing"
    );
    fs::create_dir(shown.root("unpacked"))?;
    tar("-xf", &shown.root("unpacked"), "tree")?;
    let same = shown.inside("diff -r /tree/a /unpacked/tree/a && echo same")?;
    ensure!(same == "same\n", "{same}");

    for (way, from, to) in
        [("out", shown.root("big"), copy.join("big")), ("in", copy.join("big"), shown.root("again"))]
    {
        let begun = Instant::now();
        fs::copy(from, to)?;
        println!("copying {} MiB {way} took {:.1?}", SIZE >> 20, begun.elapsed());
    }
    let back = shown.inside("sha256sum </again")?;
    ensure!(back == theirs, "{theirs} came back as {back}");
    fs::remove_dir_all(&copy)?;
    fs::remove_file(&archive)?;
    shown.end()
}

fn a_paused_container_is_for_reading(containerd: &mut Containerd) -> Result<()> {
    let shown = Shown::start(containerd)?;
    reads_and_does_not_write(&shown)?;
    shown.end()
}

/// Reads while the container is paused, and both reads and writes before and after.
fn reads_and_does_not_write(shown: &Shown<'_>) -> Result<()> {
    let file = shown.root("file");
    fs::write(&file, "before")?;
    let mut open = OpenOptions::new().append(true).open(&file)?;
    shown.containerd.ctr_ok(&["tasks", "pause", &shown.id])?;
    ensure!(fs::read_to_string(&file)? == "before" && names(&shown.root("bin"))?.len() > 100, "while paused");
    for (what, refused) in [
        ("a write to an open file", open.write_all(b" and after")),
        ("a new file", fs::write(shown.root("other"), "")),
        ("a new directory", fs::create_dir(shown.root("dir"))),
        ("an open", OpenOptions::new().write(true).open(&file).map(drop)),
        ("a removal", fs::remove_file(&file)),
        ("a new mode", fs::set_permissions(&file, fs::Permissions::from_mode(0o600))),
    ] {
        let errno = refused.as_ref().err().and_then(io::Error::raw_os_error);
        ensure!(errno == Some(libc::EROFS), "{what} in a paused container: {refused:?}");
    }
    shown.containerd.ctr_ok(&["tasks", "resume", &shown.id])?;
    open.write_all(b" and after")?;
    let seen = shown.inside("cat /file")?;
    ensure!(seen == "before and after", "{seen}");
    Ok(())
}

fn a_disk_that_is_frozen_is_for_reading(containerd: &mut Containerd) -> Result<()> {
    let run = containerd.run(IMAGE, &["sleep", "1000"]).detached();
    let run = run.flags(&["--null-io", "--snapshotter", "blockfile"]);
    run.ok()?;
    let shown = Shown::of(containerd, run.container().to_owned())?;
    reads_and_does_not_write(&shown)?;
    shown.end()
}

mod containerd_with_blockfile {
    #[test]
    fn a_disk_that_is_frozen_is_for_reading() {
        let setup = machinen_integration::setup::Setup::new().blockfile();
        crate::harness::run_with(crate::harness::NEWEST, &setup, super::a_disk_that_is_frozen_is_for_reading);
    }
}

fn either_channel(containerd: &mut Containerd) -> Result<()> {
    for channel in ["vsock", "serial"] {
        containerd.configure(&Setup::new().set("vm", "channel", Value::text(channel)))?;
        let shown = Shown::start(containerd)?;
        let data: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
        fs::write(shown.root("data"), &data)?;
        ensure!(fs::read(shown.root("data"))? == data, "over {channel}");
        shown.end()?;
    }
    Ok(())
}

fn checkpoints_are_unaffected(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sleep", "1000"], |_| ())?;
    let source = Served::run(containerd, &config)?;
    fs::write(root(source.pid, "file"), "kept")?;
    let file = File::open(root(source.pid, "file"))?;
    let images = containerd.root().join("images");
    let request = api::CheckpointTaskRequest {
        id: source.shim.id.clone(),
        path: images.display().to_string(),
        ..Default::default()
    };
    source.client.ok::<api::Empty>("Checkpoint", &request)?;
    ensure!(file.metadata()?.len() == 4, "the view has not outlived a checkpoint");
    drop(file);
    fs::write(root(source.pid, "file"), "changed")?;
    source.end()?;

    // The files of a restored container are visible like any other's, also before it is started.
    let mut restored = Served::of(containerd, &config)?;
    restored.create_from(&images)?;
    ensure!(root(restored.pid, "proc/1").exists(), "a restored container is not visible before its start");
    restored.begin()?;
    fs::write(root(restored.pid, "other"), "new")?;
    let status = restored.exec_to("look", &["sh", "-c", "[ $(cat /other) = new ]"], "")?;
    ensure!(status == 0, "a restored container does not see what the host writes");
    restored.end()?;
    Ok(fs::remove_dir_all(&images)?)
}

fn each_container_of_a_pod_has_its_own(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sleep", "1000"], |_| ())?;
    let first = Served::run(containerd, &config)?;
    let (id, dir) = ("second".to_owned(), first.shim.bundle.join("second"));
    fs::create_dir_all(&dir)?;
    fs::copy(&config, dir.join("config.json"))?;
    let (client, bundle) = (&first.client, dir.display().to_string());
    let request = api::CreateTaskRequest { id: id.clone(), bundle, ..Default::default() };
    let second = client.ok::<api::CreateTaskResponse>("Create", &request)?.pid;
    ensure!(root(second, "etc/passwd").exists(), "a container that has not been started is not seen");
    client.ok::<api::StartResponse>("Start", &api::StartRequest { id: id.clone(), ..Default::default() })?;
    let held = File::open(root(first.pid, "etc/passwd"))?;
    fs::write(root(first.pid, "name"), "first")?;
    fs::write(root(second, "name"), "second")?;
    ensure!(fs::read_to_string(root(first.pid, "name"))? == "first", "one root for both");

    // The end of one container does not affect the other.
    client.ok::<api::Empty>("Kill", &api::KillRequest { id: id.clone(), signal: 9, ..Default::default() })?;
    client.ok::<api::WaitResponse>("Wait", &api::WaitRequest { id: id.clone(), ..Default::default() })?;
    client.ok::<api::DeleteResponse>("Delete", &api::DeleteRequest { id, ..Default::default() })?;
    ensure!(io::read_to_string(&held)?.starts_with("root:"), "the other's files");
    ensure!(fs::read_to_string(root(first.pid, "name"))? == "first", "the other's root");
    drop(held);
    first.end()
}
