//! A RuntimeClass's handler with a snapshotter of its own: one that works, and one that the node or machinen cannot use.

use std::fs;

use anyhow::{Result, bail, ensure};
use machinen_integration::{
    cri::{Handler, Node},
    paths::Version,
    setup::Setup,
};

use super::run_with;

/// A pod whose container writes to its root file system.
fn writes(node: &Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let container = pod.idle("main")?;
    ensure!(container.shell("echo here > /file && cat /file")? == "here\n", "another file");
    pod.remove()
}

fn works(node: &mut Node) -> Result<()> {
    writes(node)
}

fn works_with_erofs(node: &mut Node) -> Result<()> {
    writes(node)?;
    // The layers of an image stay mounted as long as the image exists.
    let images = node.containerd().ctr_ok(&["images", "ls", "--quiet"])?;
    let images: Vec<_> = images.lines().collect();
    node.containerd().ctr_ok(&[&["images", "rm", "--sync"], &*images].concat()).map(drop)
}

/// Each of two tries is refused with both texts. When the administrator has chosen another snapshotter, pods work.
fn is_refused(node: &mut Node, snapshotter: &str, texts: [&str; 2]) -> Result<()> {
    for _ in 0..2 {
        // Only the pod's containers need a snapshot where the sandbox is the shim's.
        let started = node.pod(|_| ()).and_then(|pod| pod.idle("main").map(drop));
        let Err(refusal) = started else { bail!("a pod runs with the snapshotter {snapshotter}") };
        let refusal = format!("{refusal:#}");
        ensure!(texts.iter().all(|text| refusal.contains(text)), "{refusal}");
        node.remove_all_pods()?;
        node.settle()?;
    }
    let file = node.containerd().root().join("containerd.toml");
    let broken = fs::read_to_string(&file)?;
    let mended = broken.replace(&format!("snapshotter = {snapshotter:?}"), "snapshotter = \"overlayfs\"");
    ensure!(broken != mended, "{broken}");
    fs::write(&file, mended)?;
    node.restart()?;
    writes(node)
}

fn one_that_does_not_exist(node: &mut Node) -> Result<()> {
    is_refused(node, "no-such", ["snapshotter no-such", "not found"])
}

/// The snapshots are disks with ext3, which machinen does not give to a guest.
fn one_with_disks_of_another_kind(node: &mut Node) -> Result<()> {
    is_refused(
        node,
        "blockfile",
        ["rootfs mounts of the type \"ext3\" are not supported", "overlay, bind and ext4"],
    )
}

macro_rules! tests {
    ($($module:ident: $handler:ident;)*) => {
        $(mod $module {
            use super::*;

            #[test]
            fn native() {
                run_with(Version::V2_1, Handler::$handler, &Setup::new().snapshotter("native"), works);
            }

            #[test]
            fn blockfile() {
                let setup = Setup::new().blockfile().snapshotter("blockfile");
                run_with(Version::V2_1, Handler::$handler, &setup, works);
            }

            #[test]
            fn erofs() {
                run_with(Version::V2_1, Handler::$handler, &Setup::new().snapshotter("erofs"), works_with_erofs);
            }

            #[test]
            fn none_of_the_name() {
                let setup = Setup::new().snapshotter("no-such");
                run_with(Version::V2_1, Handler::$handler, &setup, one_that_does_not_exist);
            }

            #[test]
            fn of_another_file_system() {
                let setup = Setup::new().blockfile_of("ext3").snapshotter("blockfile");
                run_with(Version::V2_1, Handler::$handler, &setup, one_with_disks_of_another_kind);
            }
        })*
    };
}

tests! {
    machinen_2_1: Machinen;
    sandbox_2_1: MachinenSandbox;
}
