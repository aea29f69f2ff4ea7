//! What is mounted where, and with which options.

use std::{
    fs,
    os::unix::fs::{MetadataExt, chown, symlink},
};

use anyhow::{Result, ensure};
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
    served::Served,
};

use serde_json::json;

use super::{bind, shell, source};
use crate::harness::{IMAGE, on_every_containerd, on_newest_containerd};

on_every_containerd!(by_ctr);
on_newest_containerd!(
    read_only,
    a_single_file_is_live,
    nested,
    onto_links_of_the_image,
    two_containers_of_a_pod,
    mounts_below_the_source,
    mapped_users,
);

fn by_ctr(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    fs::write(data.join("f"), "seen\n")?;
    let flag = |options| format!("type=bind,src={},dst=/shared/deep,options={options}", data.display());
    let script = "cat /shared/deep/f; echo x >/shared/deep/new && echo written";
    let run = |options: &str| {
        containerd.run(IMAGE, &["sh", "-c", script]).flags(&["--mount", &flag(options.to_owned())]).output()
    };
    let output = run("rbind:ro")?;
    ensure!(output.text() == "seen\n" && output.error_text().contains("Read-only file system"), "{output}");
    let output = run("rbind:rw")?;
    ensure!(output.text() == "seen\nwritten\n", "{output}");
    Ok(())
}

fn read_only(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    fs::write(data.join("f"), "as it was\n")?;
    let bundle = Bundle::busybox(containerd)?;
    let script = "for d in ro rro; do touch /$d/x; rm /$d/f; chmod 0 /$d/f; echo x >>/$d/f; done 2>&1 | grep -c Read-only; \
                  touch /rw/y && awk '$2 == \"/rw\" { print $3, $4 }' /proc/mounts | tr , ' '; cp /bin/true /rw/true; /rw/true";
    let config = bundle.config(&["sh", "-c", script], |spec| {
        bind(spec, &data, "/ro", &["ro"]);
        bind(spec, &data, "/rro", &["rro", "rslave"]);
        bind(spec, &data, "/rw", &["nosuid", "nodev", "noexec", "rprivate"]);
    })?;
    let output = containerd.run_spec(&config).output()?;
    let text = output.text();
    let mut lines = text.lines();
    ensure!(lines.next() == Some("8") && output.status == 126, "{output}");
    let line = lines.next().unwrap_or_default();
    for word in ["fuse.machinen", "nosuid", "nodev", "noexec", "rw"] {
        ensure!(line.split(' ').any(|found| found == word), "no {word}: {output}");
    }
    ensure!(fs::read_to_string(data.join("f"))? == "as it was\n", "a read-only volume was written");
    Ok(())
}

/// A file that is written in place changes in the container, and one that is replaced does not, as with runc.
fn a_single_file_is_live(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let (hosts, other) = (data.join("hosts"), data.join("resolv.conf"));
    fs::write(&hosts, "10.0.0.1 one\n")?;
    fs::write(&other, "nameserver 1\n")?;
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sleep", "1000"], |spec| {
        bind(spec, &hosts, "/etc/hosts", &["rprivate", "rw"]);
        bind(spec, &other, "/etc/resolv.conf", &["ro"]);
    })?;
    let served = Served::run(containerd, &config)?;
    ensure!(shell(&served, "cat /etc/hosts /etc/resolv.conf")? == "10.0.0.1 one\nnameserver 1\n");
    fs::write(&hosts, "10.0.0.2 two\n10.0.0.3 three\n")?;
    let seen = shell(&served, "sleep 1.2; cat /etc/hosts; echo 10.0.0.4 four >>/etc/hosts")?;
    ensure!(seen == "10.0.0.2 two\n10.0.0.3 three\n", "{seen}");
    ensure!(fs::read_to_string(&hosts)?.ends_with("four\n"), "the guest's line is missing on the host");
    fs::write(data.join("new"), "nameserver 2\n")?;
    fs::rename(data.join("new"), &other)?;
    let seen = shell(&served, "sleep 1.2; cat /etc/resolv.conf; rm /etc/hosts || echo busy")?;
    ensure!(seen.starts_with("nameserver 1\n") && seen.ends_with("busy\n"), "{seen}");
    served.end()
}

fn nested(containerd: &mut Containerd) -> Result<()> {
    let (outer, inner, file) = (source(containerd)?, source(containerd)?, source(containerd)?.join("f"));
    fs::write(inner.join("inner"), "")?;
    fs::write(&file, "file\n")?;
    let bundle = Bundle::busybox(containerd)?;
    let script = "ls /outer /outer/sub; cat /outer/sub/file; df -P /outer/tmp | tail -n 1 | cut -d' ' -f1; touch /outer/tmp/t";
    let config = bundle.config(&["sh", "-ec", script], |spec| {
        bind(spec, &outer, "/outer", &[]);
        bind(spec, &inner, "/outer/sub", &[]);
        bind(spec, &file, "/outer/sub/file", &["ro"]);
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(mount("/outer/tmp", "tmpfs", "tmpfs", &[]));
    })?;
    let seen = containerd.run_spec(&config).ok()?;
    ensure!(seen == "/outer:\nsub\ntmp\n\n/outer/sub:\nfile\ninner\nfile\ntmpfs\n", "{seen}");
    ensure!(fs::read_dir(outer.join("tmp"))?.next().is_none(), "a file of the guest's tmpfs is on the host");
    ensure!(fs::metadata(inner.join("file"))?.size() == 0, "the mount point has a content");
    Ok(())
}

fn onto_links_of_the_image(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    fs::write(data.join("f"), "seen\n")?;
    let bundle = Bundle::busybox(containerd)?;
    let rootfs = bundle.rootfs();
    symlink("/var", rootfs.join("absolute"))?;
    symlink("../../../../../../home", rootfs.join("upwards"))?;
    symlink("/var/last", rootfs.join("last"))?;
    let script = "cat /var/a/f /home/b/f /var/last/f /var/c";
    let config = bundle.config(&["sh", "-ec", script], |spec| {
        bind(spec, &data, "/absolute/a", &[]);
        bind(spec, &data, "/upwards/b", &[]);
        bind(spec, &data, "/last", &[]);
        bind(spec, &data.join("f"), "/absolute/c", &[]);
    })?;
    let seen = containerd.run_spec(&config).ok()?;
    ensure!(seen == "seen\n".repeat(4), "{seen}");
    Ok(())
}

fn two_containers_of_a_pod(containerd: &mut Containerd) -> Result<()> {
    let (data, own) = (source(containerd)?, source(containerd)?);
    let first = super::served(containerd, &data)?;
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sleep", "1000"], |spec| {
        bind(spec, &data, "/data", &["ro"]);
        bind(spec, &own, "/own", &[]);
    })?;
    let mut second = first.in_same_vm(containerd, &config)?;
    second.create(|_| ())?;
    second.begin()?;
    shell(&first, "echo first >/data/f; [ ! -e /own ]")?;
    let seen = shell(&second, "cat /data/f; echo second >/own/f; touch /data/x 2>/dev/null || echo refused")?;
    ensure!(seen == "first\nrefused\n", "{seen}");
    ensure!(
        fs::read_to_string(own.join("f"))? == "second\n",
        "the host does not see the second container's file"
    );
    second.client.ok::<containerd_shim_protos::api::Empty>("Kill", &second.kill("", 9))?;
    second.wait("")?;
    second.client.ok::<containerd_shim_protos::api::DeleteResponse>("Delete", &second.delete(""))?;
    fs::remove_dir_all(&second.shim.bundle)?;
    ensure!(shell(&first, "cat /data/f")? == "first\n", "the first container's volume is lost");
    first.end()
}

fn mounts_below_the_source(containerd: &mut Containerd) -> Result<()> {
    use machinen_integration::process::Invocation;
    let data = source(containerd)?;
    let below = data.join("below");
    fs::create_dir(&below)?;
    Invocation::new("mount").args(["-t", "tmpfs", "none"]).arg(&below).run()?.ok()?;
    let seen = (|| {
        fs::write(below.join("f"), "below\n")?;
        let bundle = Bundle::busybox(containerd)?;
        let config = bundle.config(
            &["sh", "-c", "cat /all/below/f; ls /one/below; echo x >/all/below/g"],
            |spec| {
                bind(spec, &data, "/all", &[]);
                let one = mount("/one", "bind", &data.display().to_string(), &["bind"]);
                spec["mounts"].as_array_mut().expect("an array").push(one);
            },
        )?;
        let seen = containerd.run_spec(&config).ok()?;
        ensure!(fs::read_to_string(below.join("g"))? == "x\n", "not written");
        Ok(seen)
    })();
    Invocation::new("umount").arg(&below).run()?.ok()?;
    ensure!(seen? == "below\n", "not only the recursive mount has the file below");
    Ok(())
}

/// ID-mapped mounts, as Kubernetes asks for them in pods with a user namespace.
fn mapped_users(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    for (name, owner) in [("of-root", 0), ("of-other", 1000)] {
        fs::write(data.join(name), "")?;
        chown(data.join(name), Some(owner), Some(owner))?;
    }
    let bundle = Bundle::busybox(containerd)?;
    let mapping = json!([{"containerID": 0, "hostID": 5000, "size": 2000}]);
    let script =
        "stat -c '%u %g' /data/of-root /data/of-other; touch /data/new-$0; stat -c '%u %g' /data/new-$0";
    // Its owner is not among the users of the container's namespace, so nothing can be made in it there.
    fs::create_dir(bundle.rootfs().join("data"))?;
    // By mappings of the mount, and by those of the container's user namespace.
    let config = bundle.config(&["sh", "-ec", script, "mount"], |spec| {
        bind(spec, &data, "/data", &[]);
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        let mount = mounts.last_mut().expect("it has just been added");
        mount["uidMappings"] = mapping.clone();
        mount["gidMappings"] = mapping.clone();
        spec["process"]["user"] = json!({"uid": 5000, "gid": 5000});
    })?;
    let seen = containerd.run_spec(&config).ok()?;
    ensure!(seen == "5000 5000\n6000 6000\n5000 5000\n", "{seen}");
    let config = bundle.config(&["sh", "-ec", script, "container"], |spec| {
        bind(spec, &data, "/data", &["idmap"]);
        spec["linux"]["uidMappings"] = mapping.clone();
        spec["linux"]["gidMappings"] = mapping.clone();
        let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("an array");
        namespaces.push(json!({"type": "user"}));
    })?;
    let seen = containerd.run_spec(&config).ok()?;
    ensure!(seen == "0 0\n1000 1000\n0 0\n", "{seen}");
    for name in ["new-mount", "new-container"] {
        let made = fs::metadata(data.join(name))?;
        ensure!((made.uid(), made.gid()) == (0, 0), "{name} belongs to {}", made.uid());
    }
    Ok(())
}
