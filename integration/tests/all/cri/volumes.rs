//! Files of the node in containers, as kubelet binds them.

use std::{fs, path::Path};

use anyhow::{Result, ensure};
use machinen_integration::cri::{IMAGE, Node, api};

use super::both_runtimes;

both_runtimes! {
    every: [],
    oldest_and_newest: [],
    newest: [directories_of_the_node, files_that_kubelet_writes, an_image_as_a_volume],
}

fn mount(host: &Path, container: &str, readonly: bool) -> api::Mount {
    api::Mount {
        host_path: host.display().to_string(),
        container_path: container.to_owned(),
        readonly,
        ..Default::default()
    }
}

/// `hostPath` and `emptyDir`, shared by two containers.
fn directories_of_the_node(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let dir = pod.dir()?;
    fs::write(dir.join("from-the-node"), "one\n")?;
    let writer = pod.start("writer", &["sleep", "100000"], |config| {
        config.mounts = vec![mount(&dir, "/data", false)];
    })?;
    let reader = pod.start("reader", &["sleep", "100000"], |config| {
        config.mounts = vec![mount(&dir, "/data", true)];
    })?;
    ensure!(reader.shell("cat /data/from-the-node")? == "one\n", "not the node's file");
    writer.shell("echo two > /data/from-the-pod")?;
    ensure!(fs::read_to_string(dir.join("from-the-pod"))? == "two\n", "not the pod's file");
    ensure!(reader.shell("cat /data/from-the-pod")? == "two\n", "not the neighbour's file");
    let refused = reader.shell("! touch /data/file 2>&1")?;
    ensure!(refused.contains("Read-only file system"), "{refused}");
    // A container that is restarted in place finds what the other has written.
    writer.stop(0)?;
    writer.remove()?;
    let again = pod.start("writer", &["cat", "/data/from-the-pod"], |config| {
        config.mounts = vec![mount(&dir, "/data", false)];
    })?;
    again.wait_for_log("two")?;
    pod.remove()
}

/// `/etc/hosts`, and the file for the container's last words.
fn files_that_kubelet_writes(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let dir = pod.dir()?;
    let (hosts, words) = (dir.join("etc-hosts"), dir.join("words"));
    fs::write(&hosts, format!("127.0.0.1 localhost\n{} pod-1\n", pod.address()?))?;
    fs::write(&words, "")?;
    let container = pod.start("main", &["sleep", "100000"], |config| {
        config.mounts =
            vec![mount(&hosts, "/etc/hosts", false), mount(&words, "/dev/termination-log", false)];
    })?;
    let seen = container.shell("cat /etc/hosts")?;
    ensure!(seen == fs::read_to_string(&hosts)?, "{seen}");
    container.shell("echo failed > /dev/termination-log")?;
    ensure!(fs::read_to_string(&words)? == "failed\n", "{:?}", fs::read_to_string(&words));
    pod.remove()
}

/// The volume `image` of Kubernetes: containerd mounts the image's file system on the node, and two containers see it.
fn an_image_as_a_volume(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let image = api::ImageSpec { image: IMAGE.to_owned(), ..Default::default() };
    let mounts = vec![api::Mount {
        container_path: "/image".to_owned(),
        image: Some(image),
        readonly: true,
        ..Default::default()
    }];
    for name in ["one", "two"] {
        let container = pod.start(name, &["sleep", "100000"], |config| config.mounts.clone_from(&mounts))?;
        let seen = container.shell(
            "cmp /bin/busybox /image/bin/busybox && ls -d /image/etc && /image/bin/busybox echo ran",
        )?;
        ensure!(seen == "/image/etc\nran\n", "{seen}");
        let refused = container.shell("! touch /image/file 2>&1")?;
        ensure!(refused.contains("Read-only file system"), "{refused}");
    }
    pod.remove()?;
    // containerd unmounts the image, and keeps its own directory for the next one.
    let own = node.containerd().root().join("s/io.containerd.grpc.v1.cri/image-volumes");
    Ok(fs::remove_dir(own)?)
}
