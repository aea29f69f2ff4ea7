//! Keeps the sparse disks of a VM from filling the host's file systems.
//!
//! As long as a file system has less free space than it has to keep, the guest's writes to its disks wait in QEMU, and
//! continue when there is space again. An error instead would make the guest's file system read-only.
//!
//! The kernel reports no event when a file system fills up. A look is due when the disks could have taken what is left,
//! at the speed of fast storage, so with much free space there is next to none. With little free space the writes are
//! slowed, so that what is left lasts until the next look.

use std::{fs::File, io, time::Duration};

use machinen_base::space::{DiskReserve, FreeSpace};
use nix::sys::stat::fstat;
use serde_json::json;
use tokio::time::{Instant, sleep_until};

use super::qmp::{Qmp, QmpError};

/// How fast disks can take space, bytes a second.
const FASTEST: u64 = 1 << 30;
const SHORTEST: Duration = Duration::from_millis(250);
/// With less usable space than fast storage takes in half a second, writes are slowed. Bytes.
const SLOWED_BELOW: u64 = FASTEST / 2;
/// The slowest pace of writes that do not wait, bytes a second.
const SLOWEST: u64 = 4 << 20;
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
    pace: Pace,
}

/// How fast the guest may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    Unlimited,
    /// At most so many bytes a second.
    Slowed(u64),
    /// Not at all since the file took so many bytes.
    Held(u64),
}

impl Pace {
    /// The pace at which the usable space lasts for a second at least: there may be several disks on the file system.
    /// It is a power of two, so that it seldom changes.
    fn for_usable(usable: u64) -> Self {
        if usable < SLOWED_BELOW {
            Self::Slowed((1 << usable.max(1).ilog2()).max(SLOWEST))
        } else {
            Self::Unlimited
        }
    }

    /// For QEMU, in bytes a second; 0 stands for no limit. No write is small enough for one byte a second.
    fn limit(self) -> u64 {
        match self {
            Self::Unlimited => 0,
            Self::Slowed(rate) => rate,
            Self::Held(_) => 1,
        }
    }
}

impl GrowingDisk {
    pub(super) fn new(name: String, file: File, reserve: DiskReserve) -> Self {
        Self { name, file, reserve, pace: Pace::Unlimited }
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
        let pace = match self.pace {
            Pace::Held(then) if taken > then + ON_THE_WAY => {
                return Err(GrowthError { disk: self.name.clone(), grown: taken - then, space });
            }
            // With some distance, so that the writes do not stop again at once.
            Pace::Held(then) if space.usable() <= space.kept / 8 => Pace::Held(then),
            Pace::Held(_) => {
                tracing::info!(disk = self.name, "the guest's writes continue");
                Pace::for_usable(space.usable())
            }
            Pace::Unlimited | Pace::Slowed(_) if space.usable() == 0 => {
                let (free, kept) = (space.free >> 20, space.kept >> 20);
                tracing::warn!(
                    disk = self.name,
                    "the guest's writes wait: the host's file system has {free} MiB free, of which {kept} MiB are kept free \
                     (rootdisk.disk_reserve_percent)"
                );
                Pace::Held(taken)
            }
            Pace::Unlimited | Pace::Slowed(_) => Pace::for_usable(space.usable()),
        };
        if pace.limit() != self.pace.limit() {
            self.limit(qmp, pace.limit()).await;
        }
        self.pace = pace;
        Ok(match pace {
            Pace::Held(_) => HELD,
            Pace::Slowed(_) => SHORTEST,
            Pace::Unlimited => {
                let quick = space.usable().saturating_sub(SLOWED_BELOW / 2);
                Duration::from_millis(quick.saturating_mul(1000) / FASTEST).clamp(SHORTEST, LONGEST)
            }
        })
    }

    /// Lets QEMU pass on the guest's writes at so many bytes a second, or with 0 at any speed.
    async fn limit(&self, qmp: &Qmp, rate: u64) {
        let arguments = json!({
            "id": self.name, "bps": 0, "bps_rd": 0, "bps_wr": rate, "iops": 0, "iops_rd": 0, "iops_wr": 0,
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

    /// Until the next look the disks take half of the usable space at most.
    #[test]
    fn writes_are_slowed_before_the_space_ends() {
        let slowed = |usable: u64| match Pace::for_usable(usable) {
            Pace::Slowed(rate) => Some(rate),
            Pace::Unlimited | Pace::Held(_) => None,
        };
        assert_eq!(slowed(SLOWED_BELOW), None);
        assert_eq!(slowed(SLOWED_BELOW - 1), Some(256 << 20));
        assert_eq!(slowed(200 << 20), Some(128 << 20));
        assert_eq!((slowed(5 << 20), slowed(1)), (Some(SLOWEST), Some(SLOWEST)));
        assert_eq!((Pace::Unlimited.limit(), Pace::Held(9).limit()), (0, 1));
    }

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
