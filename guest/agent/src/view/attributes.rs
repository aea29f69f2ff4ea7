//! Converts the attributes of files between the guest's kernel and the host's.

use std::{
    io,
    time::{Duration, SystemTime},
};

use fuser::{FileAttr, INodeNo, TimeOrNow};
use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, Statx, StatxTimestamp, Timespec, Timestamps, UTIME_NOW,
        UTIME_OMIT, Uid, chmod, chownat, ftruncate, utimensat,
    },
    io::Errno,
};

use super::tree::LocatedFile;

/// A change of attributes (setattr).
#[derive(Debug, Default)]
pub(super) struct AttributeChange {
    pub(super) mode: Option<u32>,
    pub(super) owner: Option<u32>,
    pub(super) group: Option<u32>,
    pub(super) size: Option<u64>,
    pub(super) accessed: Option<TimeOrNow>,
    pub(super) modified: Option<TimeOrNow>,
}

pub(super) fn of(number: INodeNo, status: &Statx) -> FileAttr {
    let mode = u32::from(status.stx_mode);
    FileAttr {
        ino: number,
        size: status.stx_size,
        blocks: status.stx_blocks,
        atime: time(status.stx_atime),
        mtime: time(status.stx_mtime),
        ctime: time(status.stx_ctime),
        crtime: time(status.stx_btime),
        kind: kind(FileType::from_raw_mode(mode)),
        perm: (mode & 0o7777) as u16,
        nlink: status.stx_nlink,
        uid: status.stx_uid,
        gid: status.stx_gid,
        rdev: device(status.stx_rdev_major, status.stx_rdev_minor),
        blksize: status.stx_blksize,
        flags: 0,
    }
}

pub(super) fn kind(kind: FileType) -> fuser::FileType {
    match kind {
        FileType::Directory => fuser::FileType::Directory,
        FileType::Symlink => fuser::FileType::Symlink,
        FileType::Fifo => fuser::FileType::NamedPipe,
        FileType::Socket => fuser::FileType::Socket,
        FileType::CharacterDevice => fuser::FileType::CharDevice,
        FileType::BlockDevice => fuser::FileType::BlockDevice,
        FileType::RegularFile | FileType::Unknown => fuser::FileType::RegularFile,
    }
}

/// Encodes a device number as new_encode_dev() of linux/kdev_t.h does.
fn device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Major and minor number of a [`device`].
pub(super) fn device_numbers(device: u32) -> (u32, u32) {
    ((device >> 8) & 0xfff, (device & 0xff) | ((device >> 12) & 0xf_ff00))
}

fn time(stamp: StatxTimestamp) -> SystemTime {
    let nanoseconds = Duration::from_nanos(stamp.tv_nsec.into());
    let seconds = Duration::from_secs(stamp.tv_sec.unsigned_abs());
    let whole = match stamp.tv_sec {
        0.. => SystemTime::UNIX_EPOCH.checked_add(seconds),
        _ => SystemTime::UNIX_EPOCH.checked_sub(seconds),
    };
    whole.and_then(|whole| whole.checked_add(nanoseconds)).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn stamp(time: Option<TimeOrNow>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(TimeOrNow::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(TimeOrNow::SpecificTime(time)) => match time.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(since) => {
                Timespec { tv_sec: since.as_secs().cast_signed(), tv_nsec: since.subsec_nanos().into() }
            }
            Err(before) => {
                // Nanoseconds count forward from the preceding full second.
                let before = before.duration();
                let back = i64::from(before.subsec_nanos() > 0);
                let nanoseconds = i64::from((1_000_000_000 - before.subsec_nanos()) % 1_000_000_000);
                Timespec { tv_sec: -before.as_secs().cast_signed() - back, tv_nsec: nanoseconds }
            }
        },
    }
}

impl AttributeChange {
    /// Applies the change. Times come last, since every other change sets some of them.
    pub(super) fn apply(self, file: &LocatedFile) -> io::Result<()> {
        if self.owner.is_some() || self.group.is_some() {
            let (owner, group) = (self.owner.map(Uid::from_raw), self.group.map(Gid::from_raw));
            chownat(file, "", owner, group, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)?;
        }
        // After the owner, since a change of the owner clears set-user-id bits.
        if let Some(mode) = self.mode {
            if file.kind() == FileType::Symlink {
                return Err(Errno::OPNOTSUPP.into());
            }
            chmod(file.path(), Mode::from_bits_truncate(mode & 0o7777))?;
        }
        if let Some(size) = self.size {
            ftruncate(file.open(OFlags::WRONLY)?, size)?;
        }
        if self.accessed.is_some() || self.modified.is_some() {
            let times =
                Timestamps { last_access: stamp(self.accessed), last_modification: stamp(self.modified) };
            utimensat(file, "", &times, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive() {
        for (major, minor) in [(0, 0), (1, 3), (8, 255), (259, 70_000), (4095, 0xf_ffff)] {
            assert_eq!(device_numbers(device(major, minor)), (major, minor));
        }
        assert_eq!(device(259, 0x12345), 0x1230_0000 | (259 << 8) | 0x45);
    }

    #[test]
    fn times_before_the_epoch_survive() {
        let epoch = SystemTime::UNIX_EPOCH;
        let half = Duration::from_millis(500);
        for (time, seconds, nanoseconds) in [
            (epoch + half, 0, 500_000_000),
            (epoch - half, -1, 500_000_000),
            (epoch - Duration::from_secs(3), -3, 0),
        ] {
            let stamp = stamp(Some(TimeOrNow::SpecificTime(time)));
            assert_eq!((stamp.tv_sec, stamp.tv_nsec), (seconds, nanoseconds));
        }
    }
}
