//! Tests of VM snapshots and of clones that are restored from them.

use std::{
    fs::File,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    time::Instant,
};

use machinen_vm::{ChannelKind, Vm, VmExit, VmSnapshot, VmSnapshotError, VmSpec};

use crate::host::{self, Host, chain};

async fn saved(host: &Host) -> VmSnapshot {
    let start = Instant::now();
    let spec = host.spec(ChannelKind::Serial);
    let saved =
        VmSnapshot::make(&spec, &host.dir(), None).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    println!(
        "saved in {:?}, {} bytes of device state, {:?}",
        start.elapsed(),
        saved.devices.len(),
        saved.original
    );
    host.no_files_are_left();
    saved
}

#[tokio::test]
async fn clones_continue_where_their_template_waits() {
    let host = Host::new();
    let saved = saved(&host).await;
    for _ in 0..3 {
        let start = Instant::now();
        let vm = Vm::restore(host.spec(ChannelKind::Serial), &host.dir(), &saved, None).await;
        let vm = vm.unwrap_or_else(|error| panic!("{}", chain(&error)));
        let restored = start.elapsed();
        vm.attach_disk(host.disk("base", true)).await.unwrap();
        vm.agent().await.unwrap_or_else(|error| panic!("{}: {}", chain(&error), host.console()));
        println!("restored after {restored:?}, agent ready after {:?}", start.elapsed());
        vm.open_stream().await.unwrap();
        assert_eq!(vm.shutdown(std::time::Duration::from_secs(10)).await, VmExit::Requested);
        host.nothing_is_left(vm.pid());
    }
}

#[tokio::test]
async fn a_template_cannot_be_changed() {
    let host = Host::new();
    let saved = saved(&host).await;
    // Opened for writing as QEMU does, and by root.
    let path = format!("/proc/self/fd/{}", saved.memory.as_raw_fd());
    let memory = File::options().read(true).write(true).open(path).unwrap();
    let mut before = [0; 64];
    memory.read_exact_at(&mut before, 1 << 20).unwrap();
    memory.write_at(b"changed", 1 << 20).unwrap_err();
    memory.set_len(0).unwrap_err();
    let vm = Vm::restore(host.spec(ChannelKind::Serial), &host.dir(), &saved, None).await.unwrap();
    vm.agent().await.unwrap();
    vm.kill().await;
    let mut after = [1; 64];
    memory.read_exact_at(&mut after, 1 << 20).unwrap();
    assert_eq!(before, after);
}

/// The clone is a twin of its template's QEMU, or a QEMU of its own that loads the template's state: with the same restrictions.
#[tokio::test]
async fn a_twin_is_confined_as_another_clone() {
    let host = Host::new();
    let mut saved = saved(&host).await;
    saved.original.as_ref().unwrap_or_else(|reason| panic!("there is no twin: {reason}"));
    let start = async |saved: &VmSnapshot| {
        let vm = Vm::restore(host.spec(ChannelKind::Serial), &host.dir(), saved, None).await;
        let vm = vm.unwrap_or_else(|error| panic!("{}", chain(&error)));
        vm.agent().await.unwrap_or_else(|error| panic!("{}", chain(&error)));
        vm
    };
    let restrictions = |pid: u32| {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
        let kept = ["Cap", "NoNewPrivs", "Seccomp:", "Groups", "SigBlk", "SigIgn"];
        let status = read("status");
        let status = status.lines().filter(|line| kept.iter().any(|name| line.starts_with(name)));
        let cgroup = read("cgroup");
        [status.collect::<Vec<_>>().join("\n"), read("limits"), read("oom_score_adj"), cgroup].join("\n")
    };
    let user = |pid: u32| {
        std::fs::metadata(format!("/proc/{pid}/task/{pid}/stat")).map(|_| pid).and_then(|pid| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
            Ok(status.lines().find(|line| line.starts_with("Uid:")).unwrap_or_default().to_owned())
        })
    };
    let namespaces = |pid: u32| {
        let own = ["net", "mnt", "ipc", "uts", "cgroup", "pid"];
        own.map(|name| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap())
    };
    let twins = [start(&saved).await, start(&saved).await];
    let pids = twins.each_ref().map(|vm| vm.pid());
    let alike = pids.map(restrictions);
    saved.original = Err("not this time".into());
    let other = start(&saved).await;
    let expected = restrictions(other.pid());
    assert_eq!(alike, [expected.clone(), expected]);
    let users = [pids[0], pids[1], other.pid()].map(|pid| user(pid).unwrap());
    assert!(
        users[0] != users[1] && users[1] != users[2] && !users.iter().any(|user| user.contains("\t0")),
        "{users:?}"
    );
    let host_namespaces = namespaces(std::process::id());
    for pid in pids {
        assert!(namespaces(pid).iter().zip(&host_namespaces).all(|(own, of_host)| own != of_host));
        assert!(std::fs::read_dir(format!("/proc/{pid}/root/proc")).unwrap().next().is_none());
    }
    assert_ne!(namespaces(pids[0])[5], namespaces(pids[1])[5]);
    for vm in twins.into_iter().chain([other]) {
        vm.kill().await;
        host.nothing_is_left(vm.pid());
    }
}

#[tokio::test]
async fn a_snapshot_that_qemu_refuses_leaves_nothing() {
    let host = Host::new();
    let spec = || host.spec(ChannelKind::Serial);
    let mut saved = saved(&host).await;
    saved.original = Err("its state is loaded".into());
    let devices = saved.devices.clone();
    let refused = async |saved: &VmSnapshot, spec: VmSpec, words: &str| {
        let error = Vm::restore(spec, &host.dir(), saved, None).await.unwrap_err();
        let text = chain(&error);
        assert!(text.contains(words), "{words:?} is not in {text:?}");
        host.no_files_are_left();
    };
    // Streams that are cut off at the start and later, and bytes that are not a stream of QEMU.
    for (length, flip) in [(1000, None), (devices.len() / 2, None), (devices.len(), Some(0))] {
        saved.devices = devices[..length].to_vec();
        if let Some(at) = flip {
            saved.devices[at] ^= 0xff;
        }
        refused(&saved, spec(), "QEMU did not restore the state of a VM").await;
    }
    saved.devices = devices;
    refused(&saved, VmSpec { memory_mib: 256, ..spec() }, "QEMU did not restore the state of a VM").await;
    let version = saved.qemu;
    saved.qemu.micro += 1;
    refused(&saved, spec(), "the state was saved by QEMU").await;
    saved.qemu = version;
    saved.memory_fd += 1;
    refused(&saved, spec(), "under another number").await;
    saved.memory_fd -= 1;
    let memory = std::mem::replace(&mut saved.memory, File::open("/dev/zero").unwrap().into());
    refused(&saved, spec(), "not sealed").await;
    saved.memory = memory;
    let vm = Vm::restore(spec(), &host.dir(), &saved, None).await.unwrap();
    vm.agent().await.unwrap();
    vm.kill().await;
    host.nothing_is_left(vm.pid());
}

#[tokio::test]
async fn the_console_of_a_guest_that_never_waits_is_quoted() {
    let host = Host::new();
    let spec = VmSpec { kernel_args: "init=/nowhere".into(), ..host.spec(ChannelKind::Serial) };
    let error = VmSnapshot::make(&spec, &host.dir(), None).await.unwrap_err();
    assert!(
        matches!(error, VmSnapshotError::Waiting { .. }) && chain(&error).contains("panic"),
        "{}",
        chain(&error)
    );
    std::fs::remove_dir_all(host.dir()).unwrap();
    let error = VmSnapshot::make(&host.spec(host.vhost_user_vsock()), &host.dir(), None).await.unwrap_err();
    assert!(matches!(error, VmSnapshotError::Channel), "{}", chain(&error));
    host.no_files_are_left();
}

#[tokio::test]
async fn a_clone_that_is_killed_is_noticed() {
    let host = Host::new();
    let saved = saved(&host).await;
    let vm = Vm::restore(host.spec(ChannelKind::Serial), &host.dir(), &saved, None).await.unwrap();
    vm.agent().await.unwrap();
    host::kill(vm.pid());
    let exit = vm.exited().await;
    assert!(matches!(exit, VmExit::Killed { signal: libc::SIGKILL, .. }), "{exit:?}");
    host.nothing_is_left(vm.pid());
}
