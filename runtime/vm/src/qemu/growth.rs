//! Keeps the sparse disks of a VM from filling the host's file systems.
//!
//! As long as a file system has less free space than it has to keep, the guest's writes to its disks wait in QEMU, and
//! continue when there is space again. An error instead would make the guest's file system read-only.
//!
//! The kernel reports no event when a file system fills up. A look is due when the disks could have taken all that is
//! left, at the speed of fast storage, so with much free space there is next to none.

use std::{fs::File, io, time::Duration};

use machinen_base::space::{DiskReserve, FreeSpace};
use nix::sys::stat::fstat;
use serde_json::json;
use tokio::time::{Instant, sleep_until};

use super::qmp::{Qmp, QmpError};

/// How fast disks can take space, bytes a second.
const FASTEST: u64 = 1 << 30;
const SHORTEST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(60);
/// Between two looks at a file system with too little space.
const HELD: Duration = Duration::from_secs(1);
/// Writes that were on their way, and that fit in, bytes.
const ON_THE_WAY: u64 = 256 << 20;

/// Why a VM must end.
#[derive(Debug, thiserror::Error)]
#[error(
    "its disk {disk} has grown by {} MiB while its writes had to wait, because the host's file system has only {} MiB \
     free, of which {} MiB are kept free (rootdisk.disk_reserve_percent)",
    grown >> 20, space.free >> 20, space.kept >> 20
)]
pub(crate) struct GrowthError {
    /// QEMU's name of the disk.
    disk: String,
    /// Bytes.
    grown: u64,
    space: FreeSpace,
}

/// A disk that the guest writes to.
#[derive(Debug)]
pub(super) struct GrowingDisk {
    /// QEMU's name of the disk.
    name: String,
    file: File,
    reserve: DiskReserve,
    /// What the file took when the guest's writes began to wait, bytes; None: they do not wait.
    held_at: Option<u64>,
}

impl GrowingDisk {
    pub(super) fn new(name: String, file: File, reserve: DiskReserve) -> Self {
        Self { name, file, reserve, held_at: None }
    }

    fn taken(&self) -> io::Result<u64> {
        Ok(fstat(&self.file)?.st_blocks.unsigned_abs() * 512)
    }

    /// Looks at the disk; returns the time until the next look.
    async fn look(&mut self, qmp: &Qmp) -> Result<Duration, GrowthError> {
        let (space, taken) = match self.reserve.space(&self.file).and_then(|space| Ok((space, self.taken()?)))
        {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(disk = self.name, "cannot look for the free space of a disk: {error}");
                return Ok(LONGEST);
            }
        };
        match self.held_at {
            None if space.usable() > 0 => {}
            None => {
                let (free, kept) = (space.free >> 20, space.kept >> 20);
                tracing::warn!(
                    disk = self.name,
                    "the guest's writes wait: the host's file system has {free} MiB free, of which {kept} MiB are kept free \
                     (rootdisk.disk_reserve_percent)"
                );
                self.hold(qmp, true).await;
                self.held_at = Some(taken);
            }
            // With some distance, so that the writes do not stop again at once.
            Some(_) if space.usable() > space.kept / 8 => {
                tracing::info!(disk = self.name, "the guest's writes continue");
                self.hold(qmp, false).await;
                self.held_at = None;
            }
            Some(then) if taken > then + ON_THE_WAY => {
                return Err(GrowthError { disk: self.name.clone(), grown: taken - then, space });
            }
            Some(_) => {}
        }
        let left = Duration::from_millis(space.usable().saturating_mul(1000) / FASTEST);
        Ok(if self.held_at.is_some() { HELD } else { left.clamp(SHORTEST, LONGEST) })
    }

    /// Lets QEMU pass on the guest's writes at a byte a second, which none of them is small enough for, or at any speed.
    async fn hold(&self, qmp: &Qmp, held: bool) {
        let arguments = json!({
            "id": self.name, "bps": 0, "bps_rd": 0, "bps_wr": u8::from(held), "iops": 0, "iops_rd": 0, "iops_wr": 0,
        });
        match qmp.execute("block_set_io_throttle", arguments).await {
            // The VM is ending.
            Ok(_) | Err(QmpError::Closed) => {}
            // What the disk takes from now on shows whether that matters.
            Err(error) => tracing::warn!(disk = self.name, "cannot limit the writes to a disk: {error}"),
        }
    }
}

/// The disks of one VM that are looked at.
#[derive(Debug, Default)]
pub(super) struct GrowthWatch {
    disks: Vec<GrowingDisk>,
    next: Option<Instant>,
}

impl GrowthWatch {
    pub(super) fn add(&mut self, disk: GrowingDisk) {
        self.disks.push(disk);
        self.next = Some(Instant::now());
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.disks.retain(|disk| disk.name != name);
    }

    /// Waits until a look is due. Without disks there is none.
    pub(super) async fn until_look(&self) {
        match self.next {
            Some(next) if !self.disks.is_empty() => sleep_until(next).await,
            _ => std::future::pending().await,
        }
    }

    /// # Errors
    /// A disk grows although its writes have to wait.
    pub(super) async fn look(&mut self, qmp: &Qmp) -> Result<(), GrowthError> {
        let mut next = LONGEST;
        for disk in &mut self.disks {
            next = next.min(disk.look(qmp).await?);
        }
        self.next = Some(Instant::now() + next);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::fs::{FallocateFlags, fallocate};

    use super::*;
    use crate::qemu::qmp::tests::{GREETING, OK, qemu};

    #[tokio::test]
    async fn writes_wait_while_the_host_has_too_little_space() {
        let file = tempfile::tempfile().unwrap();
        let mut watch = GrowthWatch::default();
        watch.add(GrowingDisk::new("disk-1".into(), file.try_clone().unwrap(), DiskReserve::percent(1)));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let client = async {
            let (qmp, _events) = Qmp::connect(ours).await.unwrap();
            // Enough space: nothing is asked of QEMU.
            watch.look(&qmp).await.unwrap();
            assert!(watch.next.unwrap() <= Instant::now() + LONGEST);
            watch.disks[0].reserve = DiskReserve::percent(100);
            watch.look(&qmp).await.unwrap();
            assert!(watch.next.unwrap() <= Instant::now() + HELD);
            watch.disks[0].reserve = DiskReserve::percent(0);
            watch.look(&qmp).await.unwrap();
            watch.disks[0].reserve = DiskReserve::percent(100);
            watch.look(&qmp).await.unwrap();
            // A QEMU that was taken over writes on.
            fallocate(&file, FallocateFlags::empty(), 0, ON_THE_WAY + (1 << 20)).unwrap();
            let error = watch.look(&qmp).await.unwrap_err().to_string();
            assert!(error.starts_with("its disk disk-1 has grown by 257 MiB"), "{error}");
            watch.remove("disk-1");
            let idle = tokio::time::timeout(Duration::from_millis(1), watch.until_look());
            idle.await.expect_err("without disks nothing is looked at");
        };
        let ((), commands) = tokio::join!(client, qemu(theirs, GREETING, &[OK, OK, OK, OK]));
        let rates: Vec<_> = commands[1..]
            .iter()
            .map(|command| {
                assert_eq!(
                    (&command["execute"], &command["arguments"]["id"]),
                    (&"block_set_io_throttle".into(), &"disk-1".into())
                );
                command["arguments"]["bps_wr"].as_u64().unwrap()
            })
            .collect();
        assert_eq!(rates, [1, 0, 1]);
    }
}
