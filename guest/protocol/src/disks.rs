//! Which disks make up a container's root file system.
//!
//! The message [`Rootfs`] has two fields, and which of them are set says how the disks are used. Both sides
//! use the enum of this file instead, so that a disk cannot be in the wrong field.

use protobuf::MessageField;

use crate::api::{Disk, Rootfs};

/// How many disks a template has, at the first SCSI targets. In a clone the base disk can be in the first one's place and
/// the writable disk in the second one's.
pub const TEMPLATE_DISKS: u32 = 2;

/// The disks of a root file system. `T` is what is known of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootDisks<T> {
    /// A disk that many containers share, which is only read, and one for what this container writes.
    Overlay {
        /// The disk that is shared.
        base: T,
        /// The disk that is written.
        writable: T,
    },
    /// One disk with everything, which is only read.
    ReadOnly(T),
    /// One disk with everything, which is read and written.
    Whole(T),
}

impl<T> RootDisks<T> {
    /// Converts each disk.
    pub fn map<U>(self, mut with: impl FnMut(T) -> U) -> RootDisks<U> {
        match self {
            Self::Overlay { base, writable } => {
                RootDisks::Overlay { base: with(base), writable: with(writable) }
            }
            Self::ReadOnly(disk) => RootDisks::ReadOnly(with(disk)),
            Self::Whole(disk) => RootDisks::Whole(with(disk)),
        }
    }

    /// Converts each disk. `with` gets the disk and whether it is only read.
    ///
    /// # Errors
    /// The first error of `with`.
    pub fn try_map<U, E>(self, mut with: impl FnMut(T, bool) -> Result<U, E>) -> Result<RootDisks<U>, E> {
        Ok(match self {
            Self::Overlay { base, writable } => {
                RootDisks::Overlay { base: with(base, true)?, writable: with(writable, false)? }
            }
            Self::ReadOnly(disk) => RootDisks::ReadOnly(with(disk, true)?),
            Self::Whole(disk) => RootDisks::Whole(with(disk, false)?),
        })
    }

    /// The disk that belongs to this container alone.
    pub fn into_own(self) -> T {
        match self {
            Self::Overlay { writable: disk, .. } | Self::ReadOnly(disk) | Self::Whole(disk) => disk,
        }
    }
}

impl RootDisks<Disk> {
    /// The disks that a message names; None if it names no disk.
    pub fn of_message(rootfs: Rootfs) -> Option<Self> {
        match (rootfs.base.into_option(), rootfs.writable.into_option()) {
            (Some(base), Some(writable)) => Some(Self::Overlay { base, writable }),
            (Some(disk), None) => Some(Self::ReadOnly(disk)),
            (None, Some(disk)) => Some(Self::Whole(disk)),
            (None, None) => None,
        }
    }

    /// The message that names these disks.
    pub fn into_message(self) -> Rootfs {
        let (base, writable) = match self {
            Self::Overlay { base, writable } => (Some(base), Some(writable)),
            Self::ReadOnly(disk) => (Some(disk), None),
            Self::Whole(disk) => (None, Some(disk)),
        };
        let [base, writable] = [base, writable].map(MessageField::from_option);
        Rootfs { base, writable, ..Default::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_holds_the_disks_and_their_use() {
        let disk = |target| Disk { target, ..Default::default() };
        for disks in [
            RootDisks::Overlay { base: disk(1), writable: disk(2) },
            RootDisks::ReadOnly(disk(3)),
            RootDisks::Whole(disk(4)),
        ] {
            assert_eq!(RootDisks::of_message(disks.clone().into_message()), Some(disks));
        }
        assert_eq!(RootDisks::of_message(Rootfs::default()), None);
    }

    #[test]
    fn only_the_written_disk_is_not_read_only() {
        let used = |disks: RootDisks<u32>| {
            let mut used = Vec::new();
            disks
                .try_map(|disk, read_only| {
                    used.push((disk, read_only));
                    Ok::<_, ()>(())
                })
                .unwrap();
            used
        };
        assert_eq!(used(RootDisks::Overlay { base: 1, writable: 2 }), [(1, true), (2, false)]);
        assert_eq!(used(RootDisks::ReadOnly(1)), [(1, true)]);
        assert_eq!(used(RootDisks::Whole(1)), [(1, false)]);
    }
}
