use std::os::unix::net::UnixStream;

use machinen_base::{
    fs::{lock_shared, try_lock, try_lock_shared},
    process::Spawn,
};

use super::*;
use crate::qemu::qmp::tests::{GREETING, OK, qemu};

const REFUSED: &str = r#"{"error": {"class": "GenericError", "desc": "no"}, "id": $ID}"#;

fn read_only(serial: &str) -> DiskSpec {
    let source = DiskBacking::File(File::open("/dev/null").unwrap().into());
    DiskSpec {
        source,
        read_only: true,
        volatile: false,
        serial: serial.into(),
        reserve: DiskReserve::default(),
    }
}

fn served() -> DiskSpec {
    let (socket, _) = UnixStream::pair().unwrap();
    DiskSpec { source: DiskBacking::Nbd { socket: socket.into(), export: "x" }, ..read_only("n") }
}

/// Runs `work` against a QEMU that gives these answers, and returns the names of the commands that it
/// received.
async fn with_qemu<F>(answers: &[&str], work: impl FnOnce(AttachedDisks) -> F) -> Vec<String>
where
    F: Future<Output = ()>,
{
    let (ours, theirs) = UnixStream::pair().unwrap();
    let answers: Vec<&str> = [OK].iter().chain(answers).copied().collect();
    let client = async {
        let (qmp, events) = Qmp::connect(ours).await.unwrap();
        let qemu = Spawn::new("sleep").args(["100"]).start().unwrap();
        work(AttachedDisks::new(qmp, events, qemu.limits())).await;
    };
    let ((), commands) = tokio::join!(client, qemu(theirs, GREETING, &answers));
    commands[1..].iter().map(|command| command["execute"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn the_target_of_a_detached_disk_is_used_again_after_all_others() {
    let gone = r#"{"event": "DEVICE_DELETED", "data": {"device": "disk-1"}}
{"return": {}, "id": $ID}"#;
    let answers = [OK, OK, OK, OK, OK, OK, gone, OK, OK, OK, OK, OK, OK, OK, OK];
    let commands = with_qemu(&answers, |mut disks| async move {
        let first = disks.attach(read_only("a")).await.unwrap();
        let second = disks.attach(read_only("b")).await.unwrap();
        assert_eq!((first.target, second.target), (0, 1));
        disks.detach(first).await.unwrap();
        assert!(matches!(disks.detach(first).await, Err(VmError::NoDisk(_))));
        assert_eq!(disks.attach(read_only("c")).await.unwrap().target, 2);
        disks.next_target = TARGETS;
        assert_eq!(disks.attach(read_only("d")).await.unwrap(), first);
    })
    .await;
    let attach = ["add-fd", "blockdev-add", "device_add"];
    let detach = ["device_del", "blockdev-del", "remove-fd"];
    assert_eq!(commands, [attach, attach, detach, attach, attach].concat());
}

#[tokio::test]
async fn disks_in_a_templates_slots_can_be_detached() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let open = |write| File::options().read(true).write(write).open(file.path()).unwrap();
    let disk = |write: bool| DiskSpec {
        source: DiskBacking::File(open(write).into()),
        read_only: !write,
        ..read_only("a")
    };
    let slots = SlotDisks::new(disk(false), disk(true)).unwrap();
    let gone = r#"{"event": "DEVICE_DELETED", "data": {"device": "disk-2"}}
{"return": {}, "id": $ID}"#;
    let commands = with_qemu(&[gone, OK, OK, OK, OK, OK], |mut disks| async move {
        disks.take_over(slots.unwrap()).unwrap();
        disks.detach(SlotDisks::ADDRESSES[1]).await.unwrap();
        assert_eq!(disks.attach(read_only("b")).await.unwrap().target, 2);
    })
    .await;
    let detach = ["device_del", "blockdev-del", "remove-fd"];
    assert_eq!(commands, [detach, ["add-fd", "blockdev-add", "device_add"]].concat());
}

#[tokio::test]
async fn a_templates_slots_without_disks_are_removed() {
    let [first, second] = [1, 2].map(|number| {
        format!(
            r#"{{"event": "DEVICE_DELETED", "data": {{"device": "disk-{number}"}}}}
{{"return": {{}}, "id": $ID}}"#
        )
    });
    let commands = with_qemu(&[&first, OK, OK, &second, OK, OK, OK, OK, OK], |mut disks| async move {
        disks.take_over(SlotDisks::holes().unwrap()).unwrap();
        disks.close_slots().await.unwrap();
        disks.close_slots().await.unwrap();
        assert_eq!(disks.attach(read_only("b")).await.unwrap().target, 2);
    })
    .await;
    let remove = ["device_del", "blockdev-del", "remove-fd"];
    assert_eq!(commands, [remove, remove, ["add-fd", "blockdev-add", "device_add"]].concat());
}

#[tokio::test]
async fn a_templates_slots_are_used_again_until_they_are_closed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let disk = || DiskSpec {
        source: DiskBacking::File(File::options().read(true).write(true).open(file.path()).unwrap().into()),
        read_only: false,
        ..read_only("a")
    };
    let [first, second] = [1, 2].map(|number| {
        format!(
            r#"{{"event": "DEVICE_DELETED", "data": {{"device": "disk-{number}"}}}}
{{"return": {{}}, "id": $ID}}"#
        )
    });
    let fill = ["add-fd", "blockdev-add", "qom-set"];
    let empty = ["qom-set", "blockdev-del", "remove-fd"];
    let remove = ["device_del", "blockdev-del", "remove-fd"];
    let refused = ["add-fd", "blockdev-add", "qom-set", "blockdev-del", "remove-fd"];
    let answers =
        [&[OK; 6][..], &[OK, OK, REFUSED, OK, OK], &[OK; 3], &[&first, OK, OK], &[OK; 3], &[&second, OK, OK]];
    let commands = with_qemu(&answers.concat(), |mut disks| async move {
        disks.take_over(SlotDisks::holes().unwrap()).unwrap();
        for _ in 0..2 {
            let address = disks.attach(disk()).await;
            // The second time QEMU refuses, and the slot stays empty.
            if let Ok(address) = address {
                assert_eq!(address, SlotDisks::ADDRESSES[1]);
                disks.detach(address).await.unwrap();
            }
        }
        let address = disks.attach(disk()).await.unwrap();
        assert_eq!(address, SlotDisks::ADDRESSES[1]);
        disks.close_slots().await.unwrap();
        disks.detach(address).await.unwrap();
        assert!(disks.empty.is_empty());
    })
    .await;
    assert_eq!(commands, [&fill[..], &empty, &refused, &fill, &remove, &empty, &remove].concat());
}

#[tokio::test]
async fn a_disk_that_is_refused_leaves_nothing_in_qemu() {
    for (answers, expected) in [
        (&[REFUSED][..], &["add-fd"][..]),
        (&[OK, REFUSED, OK], &["add-fd", "blockdev-add", "remove-fd"]),
        (&[OK, OK, REFUSED, OK, OK], &["add-fd", "blockdev-add", "device_add", "blockdev-del", "remove-fd"]),
    ] {
        let commands = with_qemu(answers, |mut disks| async move {
            let error = disks.attach(read_only("a")).await.unwrap_err();
            assert_eq!(error.to_string(), "cannot attach disk a");
        })
        .await;
        assert_eq!(commands, expected);
    }
}

#[tokio::test]
async fn a_disk_that_is_served_needs_no_fdset() {
    let gone = r#"{"event": "DEVICE_DELETED", "data": {"device": "disk-1"}}
{"return": {}, "id": $ID}"#;
    let commands = with_qemu(&[OK, OK, OK, gone, OK], |mut disks| async move {
        let address = disks.attach(served()).await.unwrap();
        disks.detach(address).await.unwrap();
    })
    .await;
    assert_eq!(commands, ["getfd", "blockdev-add", "device_add", "device_del", "blockdev-del"]);
    for (answers, expected) in [
        (&[OK, REFUSED, OK][..], &["getfd", "blockdev-add", "closefd"][..]),
        (&[OK, OK, REFUSED, OK], &["getfd", "blockdev-add", "device_add", "blockdev-del"]),
    ] {
        let commands = with_qemu(answers, |mut disks| async move {
            disks.attach(served()).await.unwrap_err();
        })
        .await;
        assert_eq!(commands, expected);
    }
}

#[test]
fn qemu_cannot_lock_out_other_users_of_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, "x").unwrap();
    let file = File::open(&path).unwrap();
    lock_shared(&file).unwrap();
    let disk = DiskSpec { source: DiskBacking::File(file.into()), ..read_only("base") };
    let (disk, held) = disk.with_own_file().unwrap();
    let DiskBacking::File(qemus) = disk.source else { panic!("a disk of a file") };
    let qemus = File::from(qemus);
    assert!(!try_lock(&qemus).unwrap(), "QEMU has no exclusive lock while the shim has its shared one");
    assert!(try_lock_shared(&File::open(&path).unwrap()).unwrap(), "another start uses the disk");
    assert_eq!(opened_read_only(&qemus.into()), Some(true));
    drop(held);
}

#[tokio::test]
async fn a_file_with_another_access_mode_never_reaches_qemu() {
    let commands = with_qemu(&[], |mut disks| async move {
        let wrong = DiskSpec { read_only: false, ..read_only("a") };
        assert!(matches!(disks.attach(wrong).await, Err(VmError::Disk { .. })));
    })
    .await;
    assert!(commands.is_empty());
}

#[test]
fn a_serial_number_has_room_in_scsi() {
    let long = format!("base-{}", "a".repeat(64));
    assert_eq!(short_serial(&long), &long[..20]);
    assert_eq!(short_serial("base-web"), "base-web");
    assert_eq!(short_serial(&"é".repeat(20)), "é".repeat(10));
}
