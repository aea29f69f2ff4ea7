//! Files and attributes in a snapshot that the host or the image has put there.

use std::fs;

use anyhow::{Result, ensure};
use machinen_integration::{
    containerd::Containerd,
    image::{Image, Layer},
};

use super::Kept;
use crate::harness::{IMAGE, on_newest_containerd};

on_newest_containerd!(
    what_the_host_put_into_the_snapshot_is_there,
    marks_of_the_hosts_overlay_are_ignored,
    attributes_of_the_image_survive,
);

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
    ensure!(upper.join("dir/put").exists(), "the host's file is gone after the next end");
    kept.remove()
}

/// An overlay that was mounted with an index marks its upper directory with its lower directory, and files
/// with their origin, none of which exist in this VM.
fn marks_of_the_hosts_overlay_are_ignored(containerd: &mut Containerd) -> Result<()> {
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
        let printed = kept.again()?;
        ensure!(printed == seen, "with a mark on {file:?} the next start printed {printed:?}");
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
