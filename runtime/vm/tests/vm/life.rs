//! Tests of VMs that boot, run and end, with and without failures.

use std::{
    fs::{self, File},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use machinen_base::space::DiskReserve;
use machinen_vm::{ChannelKind, DiskBacking, DiskSpec, LaunchError, Vm, VmBootError, VmError, VmExit};
use tokio::io::AsyncWriteExt as _;

use crate::host::{self, Host, chain};

const GRACE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn the_life_of_a_vm_over_serial() {
    let host = Host::new();
    whole_life(&host, ChannelKind::Serial).await;
}

#[tokio::test]
async fn the_life_of_a_vm_over_vhost_user_vsock() {
    let host = Host::new();
    whole_life(&host, host.vhost_user_vsock()).await;
}

async fn whole_life(host: &Host, channel: ChannelKind) {
    let start = Instant::now();
    let vm =
        Vm::launch(host.spec(channel), &host.dir()).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let launched = start.elapsed();
    // While the guest boots.
    let read_only = vm.attach_disk(host.disk("base", true)).await.unwrap();
    let writable = vm.attach_disk(host.disk("writable", false)).await.unwrap();
    assert_ne!(read_only, writable);
    let attached = start.elapsed();
    let agent = vm.agent().await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let ready = start.elapsed();
    println!("launched {launched:?}, disks attached {attached:?}, agent ready {ready:?}");

    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    for line in ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line:?} is not in {status}");
    }
    assert!(!status.contains("Uid:\t0"), "{status}");

    let error = agent.start_container("missing", Duration::ZERO).await.unwrap_err();
    assert!(error.to_string().starts_with("guest agent: "), "{error}");
    let (first, mut stream) = vm.open_stream().await.unwrap();
    let (second, _other) = vm.open_stream().await.unwrap();
    assert_ne!(first, second);
    stream.write_all(b"not read").await.unwrap();

    vm.detach_disk(read_only).await.unwrap();
    assert!(matches!(vm.detach_disk(read_only).await, Err(VmError::NoDisk(_))));
    // The guest may not have noticed yet, so a new disk gets another target.
    assert_ne!(vm.attach_disk(host.disk("base", true)).await.unwrap(), read_only);

    let ending = Instant::now();
    let exit = vm.shutdown(GRACE).await;
    println!("shut down in {:?}", ending.elapsed());
    assert_eq!(exit, VmExit::Requested);
    assert!(ending.elapsed() < GRACE, "the guest did not power off by itself");
    assert_eq!(vm.exited().await, VmExit::Requested);
    host.nothing_is_left(vm.pid());
    assert!(matches!(vm.attach_disk(host.disk("late", true)).await, Err(VmError::Exited(_))));
}

#[tokio::test]
async fn a_disk_that_does_not_fit_is_refused() {
    let host = Host::new();
    let vm = Vm::launch(host.spec(ChannelKind::Serial), &host.dir()).await.unwrap();
    let disk = DiskSpec { read_only: false, ..host.disk("base", true) };
    let error = vm.attach_disk(disk).await.unwrap_err();
    assert!(
        chain(&error).contains("cannot attach disk base: the access mode of its file"),
        "{}",
        chain(&error)
    );
    let directory = OwnedFd::from(File::open(host.path()).unwrap());
    let error = vm
        .attach_disk(DiskSpec {
            source: DiskBacking::File(directory),
            read_only: true,
            volatile: false,
            serial: "dir".into(),
            reserve: DiskReserve::default(),
        })
        .await;
    let text = chain(&error.unwrap_err());
    assert!(text.starts_with("cannot attach disk dir: QEMU refused blockdev-add: "), "{text}");
    vm.attach_disk(host.disk("base", true)).await.unwrap();
    assert_eq!(vm.kill().await, VmExit::Requested);
    host.nothing_is_left(vm.pid());
}

#[tokio::test]
async fn a_guest_that_panics_is_quoted() {
    let host = Host::new();
    let mut spec = host.spec(ChannelKind::Serial);
    spec.kernel_args = "init=/nowhere".into();
    let vm = Vm::launch(spec, &host.dir()).await.unwrap();
    let error = vm.agent().await.unwrap_err();
    let text = chain(&error);
    assert!(
        matches!(&error, VmError::Boot(boot) if matches!(**boot, VmBootError::Exited(VmExit::GuestPanic { .. })))
    );
    assert!(text.contains("panic") && text.contains("/nowhere"), "{text}");
    // The console log is kept, because it shows the reason.
    let log = fs::read_to_string(host.dir().join("console.log")).unwrap();
    assert!(log.contains("Kernel panic - not syncing"), "{log}");
    fs::remove_dir_all(host.dir()).unwrap();
    host.nothing_is_left(vm.pid());
}

#[tokio::test]
async fn a_qemu_that_is_killed_is_noticed_at_once() {
    for channel in [ChannelKind::Serial, Host::new().vhost_user_vsock()] {
        let host = Host::new();
        let vm = Vm::launch(host.spec(channel), &host.dir()).await.unwrap();
        vm.agent().await.unwrap();
        let killed = Instant::now();
        host::kill(vm.pid());
        let exit = vm.exited().await;
        assert!(matches!(exit, VmExit::Killed { signal: libc::SIGKILL, .. }), "{exit:?}");
        assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
        host.nothing_is_left(vm.pid());
    }
}

#[tokio::test]
async fn a_guest_that_misses_its_deadline_is_not_taken_for_a_dead_one() {
    for channel in [ChannelKind::Serial, Host::new().vhost_user_vsock()] {
        let host = Host::new();
        let mut spec = host.spec(channel);
        spec.boot_timeout = Duration::from_millis(1);
        let vm = Vm::launch(spec, &host.dir()).await.unwrap();
        let text = chain(&vm.agent().await.unwrap_err());
        assert!(text.starts_with("the guest agent did not answer within 1ms"), "{text}");
        assert_eq!(vm.kill().await, VmExit::Requested);
        host.nothing_is_left(vm.pid());
    }
}

#[tokio::test]
async fn a_vm_that_still_boots_ends_at_once() {
    for channel in [ChannelKind::Serial, Host::new().vhost_user_vsock()] {
        let host = Host::new();
        let vm = Vm::launch(host.spec(channel.clone()), &host.dir()).await.unwrap();
        let ending = Instant::now();
        // There is nothing to sync yet.
        assert_eq!(vm.shutdown(GRACE).await, VmExit::Requested);
        assert!(ending.elapsed() < GRACE / 2, "{:?}", ending.elapsed());
        host.nothing_is_left(vm.pid());

        let vm = Vm::launch(host.spec(channel), &host.dir()).await.unwrap();
        let (pid, exited) = (vm.pid(), vm.exited());
        // The last handle.
        drop(vm);
        assert_eq!(exited.await, VmExit::Requested);
        assert!(ending.elapsed() < GRACE, "{:?}", ending.elapsed());
        host.nothing_is_left(pid);
    }
}

#[tokio::test]
async fn what_is_missing_is_named() {
    let host = Host::new();
    let spec = || host.spec(ChannelKind::Serial);
    let nowhere = || host.path().join("nowhere");
    let garbage = host.path().join("garbage");
    fs::write(&garbage, vec![7; 100_000]).unwrap();
    // A defect that only QEMU detects: the first half of a kernel.
    let half = host.path().join("half");
    let kernel = fs::read(spec().kernel).unwrap();
    fs::write(&half, &kernel[..kernel.len() / 2]).unwrap();
    let secret = host.path().join("secret");
    fs::copy(&garbage, &secret).unwrap();
    fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();

    for (spec, expected) in [
        (machinen_vm::VmSpec { kernel: nowhere(), ..spec() }, "cannot read the guest kernel"),
        (machinen_vm::VmSpec { image: nowhere(), ..spec() }, "cannot read the guest image"),
        (machinen_vm::VmSpec { kernel: secret, ..spec() }, "not readable by everyone"),
        (machinen_vm::VmSpec { kernel: garbage.clone(), ..spec() }, "not an uncompressed x86-64 kernel"),
        (machinen_vm::VmSpec { image: garbage, ..spec() }, "not an erofs image"),
        (machinen_vm::VmSpec { kernel: half, ..spec() }, "QEMU did not start: QEMU exited with status 1"),
        (machinen_vm::VmSpec { qemu: nowhere(), ..spec() }, "nowhere not found"),
        (host.spec(ChannelKind::VhostUserVsock { daemon: nowhere() }), "nowhere not found"),
    ] {
        let error = Vm::launch(spec, &host.dir()).await.unwrap_err();
        let text = chain(&error);
        assert!(text.contains(expected), "{expected:?} is not in {text:?}");
        if matches!(error, VmError::Launch(LaunchError::Exited { .. })) {
            assert!(text.contains("7.2"), "{text}");
        }
        host.no_files_are_left();
    }
}
