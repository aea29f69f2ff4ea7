//! A container's creation that fails in any of its phases: nothing is left of it, and the next try works, in a
//! pod without another container and in a VM that another container uses.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
    fake::{Behaviour, FakeVmm},
    served::Served,
};
use serde_json::{Value, json};

use crate::{fake::fake, fork::eventually, harness::on_newest_containerd};

on_newest_containerd!(
    of_the_only_container,
    of_the_only_container_by_its_vm,
    of_a_later_container,
    of_a_later_container_by_its_vm,
);

/// The disks of one container with an overlay.
const DISKS: usize = 2;

/// A cause for a creation to fail.
struct Fault {
    name: &'static str,
    spec: fn(&mut Value),
    request: fn(&mut api::CreateTaskRequest),
    /// The bundle has a writable disk that is not one.
    damaged_disk: bool,
    /// Words of the error.
    words: &'static [&'static str],
}

/// One for each step that does not depend on the VMM.
const FAULTS: [Fault; 5] = [
    Fault {
        name: "planned: a stream that is missing",
        request: |request| request.stdout = "/no/such/fifo".to_owned(),
        words: &["/no/such/fifo"],
        ..NONE
    },
    Fault {
        name: "launched: a logging program that does not become ready",
        request: |request| request.stdout = "binary-v2:///bin/false".to_owned(),
        words: &["logging program", "false"],
        ..NONE
    },
    Fault {
        name: "launched: a disk that is damaged",
        // The disk of a root file system that receives no changes is in the bundle.
        spec: |spec| spec["root"]["readonly"] = json!(true),
        damaged_disk: true,
        words: &["machinen-writable.ext4"],
        ..NONE
    },
    Fault {
        name: "launched: an anchor that cannot start",
        spec: |spec| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut();
            let network = namespaces.into_iter().flatten().find(|entry| entry["type"] == "network");
            if let Some(network) = network {
                network["path"] = json!("/no/such/netns");
            }
        },
        words: &["network namespace", "/no/such/netns"],
        ..NONE
    },
    Fault {
        name: "attached: a guest that refuses the container",
        spec: |spec| {
            if let Some(mounts) = spec["mounts"].as_array_mut() {
                mounts.push(mount("/refused", "tmpfs", "refused", &["size=many"]));
            }
        },
        words: &["create", "refused"],
        ..NONE
    },
];

const NONE: Fault =
    Fault { name: "no fault", spec: |_| (), request: |_| (), damaged_disk: false, words: &[] };

impl Fault {
    /// Creates the container, which must fail and leave nothing.
    fn fails(&self, containerd: &Containerd, rootfs: &Bundle, served: &Served<'_>) -> Result<()> {
        self.try_it(containerd, rootfs, served).with_context(|| self.name.to_owned())
    }

    fn try_it(&self, containerd: &Containerd, rootfs: &Bundle, served: &Served<'_>) -> Result<()> {
        let bundle = &served.shim.bundle;
        fs::copy(rootfs.config(&["sleep", "1000"], self.spec)?, bundle.join("config.json"))?;
        let before = containerd.inventory()?;
        let damaged = bundle.join("machinen-writable.ext4");
        if self.damaged_disk {
            fs::write(&damaged, "not a disk")?;
        }
        let mut request = served.shim.create_request();
        (self.request)(&mut request);
        let (_, message) = served.client.refused("Create", &request)?;
        ensure!(self.words.iter().all(|word| message.contains(word)), "{message}");
        if self.damaged_disk {
            fs::remove_file(&damaged).context("a disk of an earlier container was removed")?;
        }
        remove_console(bundle.join("vm"))?;
        containerd.settle(&before)
    }
}

/// Removes what a VM that failed leaves on purpose: the log of its console, and the directory if it has nothing
/// else.
fn remove_console(dir: PathBuf) -> Result<()> {
    let log = dir.join("console.log");
    if !log.exists() {
        return Ok(());
    }
    fs::remove_file(&log)?;
    // The directory has gone already if another container's VM has made it.
    fs::remove_dir(&dir).with_context(|| format!("{} is not empty", dir.display()))
}

/// The same container is created, runs and is deleted.
fn works(rootfs: &Bundle, served: &mut Served<'_>) -> Result<()> {
    let config = rootfs.config(&["sleep", "1000"], |_| ())?;
    fs::copy(config, served.shim.bundle.join("config.json"))?;
    served.create(|_| ())?;
    served.begin()?;
    served.client.ok::<api::Empty>("Kill", &served.kill("", 9))?;
    served.wait("")?;
    served.client.ok::<api::DeleteResponse>("Delete", &served.delete(""))?;
    Ok(())
}

fn descriptors(served: &Served<'_>) -> Result<usize> {
    let connect = api::ConnectRequest { id: served.shim.id.clone(), ..Default::default() };
    let connected: api::ConnectResponse = served.client.ok("Connect", &connect)?;
    Ok(fs::read_dir(format!("/proc/{}/fd", connected.shim_pid))?.count())
}

fn of_the_only_container(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let mut served = Served::of(containerd, &rootfs.config(&["true"], |_| ())?)?;
    // The first start opens descriptors that are kept for good reason.
    works(&rootfs, &mut served)?;
    let before = descriptors(&served)?;
    for fault in FAULTS {
        fault.fails(containerd, &rootfs, &served)?;
        fake.settle().context(fault.name)?;
        works(&rootfs, &mut served).with_context(|| format!("after {}", fault.name))?;
    }
    none_is_left(&served, before)?;
    served.shim.shut_down(&served.client)?;
    fake.settle()
}

/// Waits until the shim has no more descriptors than before: the kernel takes some time to remove the tap devices of a
/// VM that has ended.
fn none_is_left(served: &Served<'_>, before: usize) -> Result<()> {
    eventually(&format!("no more than {before} descriptors"), || Ok(descriptors(served)? <= before))
}

fn of_the_only_container_by_its_vm(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let mut served = Served::of(containerd, &rootfs.config(&["true"], |_| ())?)?;
    works(&rootfs, &mut served)?;
    let before = descriptors(&served)?;
    for behaviour in [
        Behaviour::Dies("no\n"),
        Behaviour::Refuses("qmp_capabilities"),
        Behaviour::Refuses("add-fd"),
        Behaviour::Refuses("device_add"),
        Behaviour::RefusesOnce("device_add", 1),
        Behaviour::DiesOn("device_add"),
    ] {
        fake.behaviour(behaviour);
        NONE.fails(containerd, &rootfs, &served).with_context(|| format!("{behaviour:?}"))?;
        fake.settle().with_context(|| format!("{behaviour:?}"))?;
        fake.behaviour(Behaviour::Well);
        works(&rootfs, &mut served).with_context(|| format!("after {behaviour:?}"))?;
    }
    none_is_left(&served, before)?;
    served.shim.shut_down(&served.client)?;
    fake.settle()
}

fn of_a_later_container(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let first = Served::run(containerd, &rootfs.config(&["sleep", "1000"], |_| ())?)?;
    let mut later = first.in_same_vm(containerd, &rootfs.config(&["true"], |_| ())?)?;
    works(&rootfs, &mut later)?;
    let before = descriptors(&first)?;
    for fault in FAULTS {
        fault.fails(containerd, &rootfs, &later)?;
        has_only_the_first(&fake, &first).context(fault.name)?;
        works(&rootfs, &mut later).with_context(|| format!("after {}", fault.name))?;
    }
    none_is_left(&first, before)?;
    fs::remove_dir_all(&later.shim.bundle)?;
    first.end()?;
    fake.settle()
}

/// The VM refuses either disk of the later container; the other disk is detached again.
fn of_a_later_container_by_its_vm(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let refusing = &FAULTS[FAULTS.len() - 1];
    for disk in [1, 2] {
        fake.behaviour(Behaviour::RefusesOnce("device_add", DISKS + disk));
        let first = Served::run(containerd, &rootfs.config(&["sleep", "1000"], |_| ())?)?;
        let mut later = first.in_same_vm(containerd, &rootfs.config(&["true"], |_| ())?)?;
        let refused =
            Fault { name: "launched: a disk that is refused", words: &["attach", "not today"], ..NONE };
        refused.fails(containerd, &rootfs, &later)?;
        // The driver of the VM has finished with the earlier disks when it attaches and detaches others.
        refusing.fails(containerd, &rootfs, &later)?;
        has_only_the_first(&fake, &first).with_context(|| format!("disk {disk}"))?;
        works(&rootfs, &mut later)?;
        fs::remove_dir_all(&later.shim.bundle)?;
        first.end()?;
        fake.settle()?;
    }
    Ok(())
}

/// The VM runs, with the first container and its disks only.
fn has_only_the_first(fake: &FakeVmm, first: &Served<'_>) -> Result<()> {
    let disks = fake.disks()?;
    ensure!(disks.len() == DISKS, "the disks of the VM are {disks:?}");
    let (status, output) = first.shell("echo well")?;
    ensure!(status == 0 && output == "well\n", "{status}: {output}");
    Ok(())
}
