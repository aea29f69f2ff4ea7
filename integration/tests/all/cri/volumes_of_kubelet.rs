//! Volumes that kubelet prepares on the node before it names their directories to containerd: each is a row of a table, and
//! all of them are in one pod.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    cri::{Container, Handler, Node, Pod, api},
    loop_device::LoopDevice,
    process::Invocation,
};

use super::both_runtimes;

both_runtimes! {
    every: [],
    oldest_and_newest: [],
    newest: [volumes, a_block_device],
}

/// A volume at `/NAME` in the pod's containers.
struct Volume {
    name: &'static str,
    /// Makes it in a directory of its own, and returns what containerd gets.
    make: fn(&mut Mounts, &Path) -> Result<PathBuf>,
    /// What else kubelet says about it.
    options: fn(&mut api::Mount),
    check: fn(&Seen<'_>) -> Result<()>,
}

/// The volume in a container of root, and in one of an ordinary user with the volume's group.
struct Seen<'a> {
    dir: PathBuf,
    root: &'a Container<'a>,
    user: &'a Container<'a>,
    handler: Handler,
}

/// The group of the pod's volumes (`fsGroup`).
const GROUP: u32 = 2000;

const VOLUMES: [Volume; 8] = [
    Volume { name: "memory", make: memory, options: |_| (), check: memory_is_bounded },
    Volume { name: "disk", make: small_disk, options: |_| (), check: a_full_disk_is_an_error },
    Volume { name: "sub-path", make: sub_path, options: |_| (), check: only_the_part_is_seen },
    Volume { name: "sub-file", make: sub_file, options: |_| (), check: a_file_is_seen },
    Volume { name: "projected", make: projected, options: read_only, check: replaced },
    Volume { name: "group", make: of_group, options: |_| (), check: the_group_may_write },
    Volume { name: "read-only", make: mounts_below, options: read_only, check: nothing_is_written },
    Volume { name: "later", make: shared, options: follows_host, check: a_later_mount_is_seen },
];

fn volumes(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let dir = pod.dir()?;
    let mut mounts = Mounts::default();
    let mut given = Vec::new();
    for volume in &VOLUMES {
        let dir = dir.join(volume.name);
        fs::create_dir(&dir)?;
        let mut mount = api::Mount {
            host_path: (volume.make)(&mut mounts, &dir)?.display().to_string(),
            container_path: format!("/{}", volume.name),
            ..Default::default()
        };
        (volume.options)(&mut mount);
        given.push(mount);
    }
    let root = pod.start("root", &IDLE, |config| config.mounts.clone_from(&given))?;
    let user = pod.start("user", &IDLE, |config| {
        config.mounts.clone_from(&given);
        let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        let security = security.expect("the container has a security context");
        security.run_as_user = Some(api::Int64Value { value: 1000 });
        security.run_as_group = Some(api::Int64Value { value: 1000 });
        security.supplemental_groups = vec![GROUP.into()];
    })?;
    for volume in &VOLUMES {
        let dir = dir.join(volume.name);
        let seen = Seen { dir, root: &root, user: &user, handler: node.handler() };
        (volume.check)(&seen).with_context(|| format!("the volume {}", volume.name))?;
    }
    pod.remove()
}

const IDLE: [&str; 2] = ["sleep", "100000"];

/// What the test has mounted; it is unmounted in the end, the last one first.
#[derive(Debug, Default)]
struct Mounts(Vec<PathBuf>);

impl Mounts {
    /// Mounts on a directory or a file.
    fn add(&mut self, options: &[&str], source: &Path, target: &Path) -> Result<()> {
        Invocation::new("mount").args(options.iter().copied()).args([source, target]).run()?.ok()?;
        self.0.push(target.to_owned());
        Ok(())
    }

    fn tmpfs(&mut self, options: &str, target: &Path) -> Result<()> {
        self.add(&["-t", "tmpfs", "-o", options], Path::new("tmpfs"), target)
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for target in self.0.iter().rev() {
            if let Err(error) = Invocation::new("umount").arg(target).run().and_then(|output| output.ok()) {
                eprintln!("{error:#}");
            }
        }
    }
}

/// `emptyDir` with `medium: Memory` and a size.
fn memory(mounts: &mut Mounts, dir: &Path) -> Result<PathBuf> {
    mounts.tmpfs("size=4m", dir)?;
    Ok(dir.to_owned())
}

fn memory_is_bounded(seen: &Seen<'_>) -> Result<()> {
    is_full_after(seen, "memory", 4)
}

/// A file system of its own, as of a local volume. An `emptyDir` on disk has no bound of its own: kubelet looks at its size,
/// and evicts the pod.
fn small_disk(mounts: &mut Mounts, dir: &Path) -> Result<PathBuf> {
    let image = dir.with_extension("image");
    fs::File::create(&image)?.set_len(4 << 20)?;
    Invocation::new("mke2fs").args(["-q", "-t", "ext4", "-m", "0"]).arg(&image).run()?.ok()?;
    mounts.add(&["-o", "loop"], &image, dir)?;
    Ok(dir.to_owned())
}

fn a_full_disk_is_an_error(seen: &Seen<'_>) -> Result<()> {
    is_full_after(seen, "disk", 4)
}

/// Writing stops with an error when the volume of so many MiB is full, and what could be written is there.
fn is_full_after(seen: &Seen<'_>, name: &str, mib: u64) -> Result<()> {
    let script = format!(
        "cd /{name}; ! dd if=/dev/zero of=file bs=64k count=1000 2> /tmp/error; cat /tmp/error; stat -f -c '%s %b' ."
    );
    let shown = seen.root.shell(&script)?;
    ensure!(shown.contains("No space left on device"), "{shown}");
    let numbers = shown.lines().last().unwrap_or_default().split(' ').map(str::parse::<u64>);
    let size: u64 = numbers.product::<Result<_, _>>()?;
    ensure!((mib << 19..=mib << 20).contains(&size), "{size} bytes: {shown}");
    let written = fs::metadata(seen.dir.join("file"))?.len();
    ensure!((mib << 19..=mib << 20).contains(&written), "{written} bytes are there");
    seen.root.shell(&format!("rm /{name}/file; echo again > /{name}/file"))?;
    Ok(())
}

/// kubelet opens the part, and binds that to a place of its own, so that it cannot be exchanged.
fn sub_path(mounts: &mut Mounts, dir: &Path) -> Result<PathBuf> {
    let (part, bound) = (dir.join("volume/part"), dir.join("volume-subpaths/0"));
    fs::create_dir_all(&part)?;
    fs::create_dir_all(&bound)?;
    fs::write(part.join("file"), "of the part\n")?;
    fs::write(dir.join("volume/secret"), "")?;
    mounts.add(&["--bind"], &part, &bound)?;
    Ok(bound)
}

fn only_the_part_is_seen(seen: &Seen<'_>) -> Result<()> {
    let shown =
        seen.root.shell("ls -A /sub-path /sub-path/..; cat /sub-path/file; echo new > /sub-path/new")?;
    ensure!(shown.contains("of the part") && !shown.contains("secret"), "{shown}");
    // It is the volume's directory, not a copy.
    let new = fs::read_to_string(seen.dir.join("volume/part/new"))?;
    ensure!(new == "new\n", "{new}");
    Ok(())
}

fn sub_file(mounts: &mut Mounts, dir: &Path) -> Result<PathBuf> {
    let (part, bound) = (dir.join("file"), dir.join("bound"));
    fs::write(&part, "one\n")?;
    fs::write(&bound, "")?;
    mounts.add(&["--bind"], &part, &bound)?;
    Ok(bound)
}

fn a_file_is_seen(seen: &Seen<'_>) -> Result<()> {
    let shown = seen.root.shell("cat /sub-file; echo two >> /sub-file")?;
    let kept = fs::read_to_string(seen.dir.join("file"))?;
    ensure!(shown == "one\n" && kept == "one\ntwo\n", "{shown} {kept}");
    Ok(())
}

/// Writes the files of a ConfigMap as kubelet does, and lets `..data` lead to them.
fn publish(dir: &Path, version: &str) -> Result<()> {
    let data = dir.join(format!("..{version}"));
    fs::create_dir(&data)?;
    fs::write(data.join("key"), format!("{version}\n"))?;
    let (new, link) = (dir.join("..data_tmp"), dir.join("..data"));
    symlink(format!("..{version}"), &new)?;
    let old = fs::read_link(&link);
    fs::rename(&new, &link)?;
    match old {
        Ok(old) => fs::remove_dir_all(dir.join(old))?,
        Err(_) => symlink("..data/key", dir.join("key"))?,
    }
    Ok(())
}

/// Events of such a volume are tested without CRI (`volumes::replaced`): no program of this image waits for them.
fn projected(_: &mut Mounts, dir: &Path) -> Result<PathBuf> {
    publish(dir, "one")?;
    Ok(dir.to_owned())
}

fn replaced(seen: &Seen<'_>) -> Result<()> {
    let before = seen.root.shell("cat /projected/key")?;
    ensure!(before == "one\n", "{before}");
    publish(&seen.dir, "two")?;
    let script = "until grep -qx two /projected/key; do sleep 0.1; done 2> /dev/null; ls -A /projected";
    let names = seen.root.shell(script)?;
    ensure!(names == "..data\n..two\nkey\n", "{names}");
    Ok(())
}

/// `fsGroup`: kubelet gives the volume to the group, whose new files belong to it too.
fn of_group(_: &mut Mounts, dir: &Path) -> Result<PathBuf> {
    chown(dir, None, Some(GROUP))?;
    fs::set_permissions(dir, Permissions::from_mode(0o2775))?;
    Ok(dir.to_owned())
}

fn the_group_may_write(seen: &Seen<'_>) -> Result<()> {
    let shown = seen.user.shell("echo new > /group/file; stat -c '%u %g %a' /group /group/file")?;
    ensure!(shown == "0 2000 2775\n1000 2000 644\n", "{shown}");
    let made = fs::metadata(seen.dir.join("file"))?;
    ensure!((made.uid(), made.gid()) == (1000, GROUP), "{} {}", made.uid(), made.gid());
    let refused = seen.user.shell("! touch /sub-path/file 2>&1")?;
    ensure!(refused.contains("Permission denied"), "{refused}");
    Ok(())
}

fn read_only(mount: &mut api::Mount) {
    mount.readonly = true;
}

/// A volume with a mount below it.
fn mounts_below(mounts: &mut Mounts, dir: &Path) -> Result<PathBuf> {
    let below = dir.join("below");
    fs::create_dir(&below)?;
    mounts.tmpfs("size=1m", &below)?;
    Ok(dir.to_owned())
}

/// With machinen, what is mounted below is read-only too, which runc does on request (`recursiveReadOnly`) only. containerd
/// 2.1 ends if that is asked for and the shim names no features, so kubelet does not ask.
fn nothing_is_written(seen: &Seen<'_>) -> Result<()> {
    let refused =
        seen.root.shell("for dir in . below; do ! touch /read-only/$dir/file || echo written; done 2>&1")?;
    let below = if seen.handler == Handler::Runc { 1 } else { 2 };
    ensure!(refused.matches("Read-only file system").count() == below, "{refused}");
    Ok(())
}

/// `mountPropagation: HostToContainer`.
fn shared(mounts: &mut Mounts, dir: &Path) -> Result<PathBuf> {
    mounts.tmpfs("size=1m", dir)?;
    Invocation::new("mount").arg("--make-shared").arg(dir).run()?.ok()?;
    fs::create_dir(dir.join("point"))?;
    Ok(dir.to_owned())
}

fn follows_host(mount: &mut api::Mount) {
    mount.propagation = api::MountPropagation::PropagationHostToContainer.into();
}

fn a_later_mount_is_seen(seen: &Seen<'_>) -> Result<()> {
    let point = seen.dir.join("point");
    Invocation::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&point).run()?.ok()?;
    let shown = fs::write(point.join("file"), "mounted later\n")
        .map_err(Into::into)
        .and_then(|()| seen.root.shell("until cat /later/point/file; do sleep 0.1; done 2> /dev/null"));
    // The guest remembers its files, so it is in use until the pod ends.
    Invocation::new("umount").arg("--lazy").arg(&point).run()?.ok()?;
    ensure!(shown? == "mounted later\n", "another file");
    seen.root.shell("while [ -e /later/point/file ]; do sleep 0.1; done")?;
    Ok(())
}

/// A claim with `volumeMode: Block`: kubelet names a link that leads to the device.
fn a_block_device(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let dir = pod.dir()?;
    let image = dir.join("image");
    fs::create_dir(dir.join("files"))?;
    let device = LoopDevice::new(&image, &dir.join("files"))?;
    let link = dir.join("claim");
    symlink(&device.path, &link)?;
    ensure!(fs::metadata(&link)?.file_type().is_block_device(), "no device");
    let with_device = |config: &mut api::ContainerConfig| {
        config.devices = vec![api::Device {
            container_path: "/dev/xvda".to_owned(),
            host_path: link.display().to_string(),
            permissions: "mrw".to_owned(),
        }];
    };
    let container = pod.start("main", &IDLE, with_device)?;
    let size = container.shell("blockdev --getsize64 /dev/xvda")?;
    ensure!(size == format!("{}\n", 32 << 20), "{size}");
    for (offset, flags) in [(16, "oflag=direct"), (17, "conv=notrunc,fsync")] {
        let text = format!("block {offset}");
        container.shell(&format!(
            "(echo {text}; head -c 5000 /dev/zero) | dd of=/dev/xvda bs=4096 count=1 seek={offset} iflag=fullblock {flags} \
             && dd if=/dev/xvda bs=4096 count=1 skip={offset} iflag=direct 2> /dev/null | grep -q '^{text}$'"
        ))?;
    }
    refused_while_in_use(node, &pod, &device, &with_device)?;
    container.stop(0)?;
    container.remove()?;
    // Another container of the pod finds what was written, and so does the node.
    let next = pod.start("next", &IDLE, with_device)?;
    let read = next.shell("dd if=/dev/xvda bs=4096 count=2 skip=16 2> /dev/null | tr -d '\\0'")?;
    ensure!(read == "block 16\nblock 17\n", "{read}");
    pod.remove()?;
    let bytes = fs::read(&image)?;
    ensure!(bytes[16 << 12..].starts_with(b"block 16\n") && bytes[17 << 12..].starts_with(b"block 17\n"));
    Ok(())
}

/// Two kernels that write to one device destroy what is on it. With runc there is one kernel.
fn refused_while_in_use(
    node: &Node,
    pod: &Pod,
    device: &LoopDevice,
    with_device: &dyn Fn(&mut api::ContainerConfig),
) -> Result<()> {
    if node.handler() == Handler::Runc {
        return Ok(());
    }
    let other = node.pod(|_| ())?;
    for pod in [&other, pod] {
        let container = pod.create("second", &IDLE, with_device)?;
        let Err(refusal) = container.start() else { anyhow::bail!("two containers write to one device") };
        ensure!(refusal.message.contains(&format!("{} is in use on this host", device.path)), "{refusal}");
        container.remove()?;
    }
    other.remove()
}
