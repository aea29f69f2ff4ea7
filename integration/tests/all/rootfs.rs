//! The image's files in the guest, and that containers do not see each other's writes.

use std::{fs::Permissions, os::unix::fs::PermissionsExt};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    image::{Image, Layer},
};

use crate::harness::{IMAGE, on_every_containerd, on_newest_containerd};

on_every_containerd!(writes_are_private);
on_newest_containerd!(the_image_as_it_was_made, layers_and_whiteouts, size_and_kind, mode_of_the_root);

fn writes_are_private(containerd: &mut Containerd) -> Result<()> {
    let script = "echo mine > /etc/passwd; rm /etc/secret; mkdir /new; echo kept > /new/file; sleep 1000";
    let first = containerd.run(IMAGE, &["sh", "-c", script]).detached().flag("--null-io");
    let id = first.container().to_owned();
    first.ok()?;
    let seen =
        containerd.run(IMAGE, &["sh", "-c", "head -1 /etc/passwd; cat /etc/secret; ls -d /new"]).output()?;
    ensure!(seen.text() == "root:x:0:0:root:/root:/bin/sh\nfor root only\n", "{seen}");
    containerd.end(&id)
}

fn the_image_as_it_was_made(containerd: &mut Containerd) -> Result<()> {
    let script = "stat -c '%n %a %u:%g %h %F' /tmp /root /home/alice /bin/setuid /etc/secret /etc/passwd.link /bin/sh; \
                  readlink /bin/sh; test /etc/passwd -ef /etc/passwd.link && echo same; wc -c < /bin/busybox";
    let seen = containerd.run(IMAGE, &["sh", "-c", script]).ok()?;
    let size = std::fs::metadata("/bin/busybox").context("no busybox")?.len();
    let wanted = format!(
        "/tmp 1777 0:0 2 directory\n/root 700 0:0 2 directory\n/home/alice 750 1000:1000 2 directory\n\
         /bin/setuid 4755 0:0 1 regular empty file\n/etc/secret 600 0:0 1 regular file\n\
         /etc/passwd.link 644 0:0 2 regular file\n/bin/sh 777 0:0 1 symbolic link\n\
         busybox\nsame\n{size}\n"
    );
    ensure!(seen == wanted, "the guest has\n{seen}instead of\n{wanted}");
    Ok(())
}

fn layers_and_whiteouts(containerd: &mut Containerd) -> Result<()> {
    let long = "n".repeat(255);
    let below = Layer::new()
        .dir("data", 0o755)
        .file("data/gone", 0o644, "x")
        .file("data/replaced", 0o644, "old")
        .dir("data/opaque", 0o755)
        .file("data/opaque/below", 0o644, "x")
        .file(&format!("data/{long}"), 0o644, "long");
    let above = Layer::new()
        .whiteout("data/gone")
        .file("data/replaced", 0o600, "new")
        .dir("data/opaque", 0o700)
        .opaque("data/opaque")
        .file("data/opaque/above", 0o644, "x");
    let name = "machinen.test/layers:1";
    let image = Image::busybox()?.with(name, below).with(name, above);
    containerd.import(&image)?;
    let before = containerd.inventory()?;
    let seen = containerd.run(name, &["sh", "-c", "cd /data; find . | sort; cat replaced"]).ok()?;
    let wanted = format!("./{long}\n./opaque\n./opaque/above\n./replaced\nnew");
    ensure!(seen == format!(".\n{wanted}"), "the guest has\n{seen}");
    containerd.settle(&before)
}

/// The overlay's own root is not the image's, and must still look like it.
fn mode_of_the_root(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    std::fs::set_permissions(bundle.rootfs(), Permissions::from_mode(0o751))?;
    std::os::unix::fs::chown(bundle.rootfs(), Some(7), Some(8))?;
    let config = bundle.config(&["stat", "-c", "%a %u:%g", "/"], |_| ())?;
    let seen = containerd.run_spec(&config).ok()?;
    ensure!(seen == "751 7:8\n", "the guest has {seen}");
    Ok(())
}

fn size_and_kind(containerd: &mut Containerd) -> Result<()> {
    let script = "awk '$2 == \"/\" { print $3 }' /proc/mounts; df -k / | tail -1; \
                  dd if=/dev/zero of=/big bs=1M count=64 2>/dev/null && wc -c < /big; \
                  mknod /null c 1 3 && echo x > /null && ln /etc/passwd /etc/link && mv /home /house && echo usable";
    let seen = containerd.run(IMAGE, &["sh", "-c", script]).ok()?;
    let lines: Vec<&str> = seen.lines().collect();
    let [kind, size, big, usable] = lines[..] else { anyhow::bail!("odd output:\n{seen}") };
    ensure!(kind == "overlay" && big == "67108864" && usable == "usable", "{seen}");
    let kib: u64 = size.split_whitespace().nth(1).context("no size")?.parse()?;
    ensure!(kib >= 2 << 20, "the root file system has {kib} KiB, less than 2 GiB");
    Ok(())
}
