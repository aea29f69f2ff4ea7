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
        VmSnapshot::make(&spec, &host.dir()).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    println!("saved in {:?}, {} bytes of device state", start.elapsed(), saved.devices.len());
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

#[tokio::test]
async fn a_snapshot_that_qemu_refuses_leaves_nothing() {
    let host = Host::new();
    let spec = || host.spec(ChannelKind::Serial);
    let mut saved = saved(&host).await;
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
    let error = VmSnapshot::make(&spec, &host.dir()).await.unwrap_err();
    assert!(
        matches!(error, VmSnapshotError::Waiting { .. }) && chain(&error).contains("panic"),
        "{}",
        chain(&error)
    );
    std::fs::remove_dir_all(host.dir()).unwrap();
    let error = VmSnapshot::make(&host.spec(host.vhost_user_vsock()), &host.dir()).await.unwrap_err();
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
