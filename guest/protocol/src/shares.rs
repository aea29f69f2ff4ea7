//! The volumes of a pod: files of the host that its containers see, as one FUSE file system in the guest.
//!
//! ```text
//!   container ──> guest's kernel ──/dev/fuse──> agent ──[`QUEUES`] raw streams──> host's share server ──> volumes
//! ```
//! A message of linux/fuse.h begins with its own length, so it travels without another frame. A stream carries
//! one request and then its reply; the agent sends a request on a stream that waits for no reply, so a request
//! that takes long holds up only its own stream. The root of the file system has one [`ShareEntry`] for each
//! volume and nothing else.
//!
//! The messages differ from those of a kernel in this:
//!
//! - RELEASE and RELEASEDIR have no reply. The process that has closed the file does not wait for one either.
//! - The reply to OPEN and CREATE may say that the file has no capabilities ([`FOPEN_NO_CAPABILITIES`]), for which the
//!   kernel asks otherwise before the first write.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use crate::fuse::opcode;

/// How many streams a pod's file system has.
pub const QUEUES: usize = 4;
/// Most bytes that one request reads or writes.
pub const MAX_DATA: usize = 1 << 20;
/// Longest message in either direction: the data, and a page for what precedes it.
pub const MAX_MESSAGE: usize = MAX_DATA + 4096;
/// How long the guest may use what it knows of a name or of attributes. A change on the host is seen after that.
pub const FRESH: Duration = Duration::from_secs(1);
/// What the kernel may do with an open file (fuse_open_out): know that it has no attribute `security.capability`. A flag of
/// the guest's kernel (`config/kernel-patches/fuse-fewer-questions.patch`); others ignore it.
pub const FOPEN_NO_CAPABILITIES: u32 = 1 << 31;
/// Where the agent mounts the file system. No container sees this path.
pub const MOUNT_POINT: &str = "/run/machinen-shares";

/// The name of the link by which kubelet replaces all files of a ConfigMap's volume at once: it leads to a directory in the
/// volume, and all other names of the volume are links through it (Kubernetes, pkg/volume/util/atomic_writer.go).
pub const DATA_LINK: &str = "..data";

/// Whether a request with this opcode has a reply.
pub fn is_answered(opcode: u32) -> bool {
    !matches!(opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::RELEASE | opcode::RELEASEDIR)
}

/// The name of a volume in the root of the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ShareEntry {
    /// Unique in the pod's VM.
    pub number: u32,
    /// The volume is a single file, not a directory.
    pub is_file: bool,
}

impl ShareEntry {
    /// The name in the root directory.
    pub fn name(self) -> String {
        let kind = if self.is_file { FILE } else { DIRECTORY };
        format!("{kind}{}", self.number)
    }

    /// The path in the guest.
    pub fn path(self) -> PathBuf {
        Path::new(MOUNT_POINT).join(self.name())
    }

    /// The entry with this path in the guest, if it is the path of one.
    pub fn of_path(path: &Path) -> Option<Self> {
        Self::of_name(path.strip_prefix(MOUNT_POINT).ok()?.to_str()?)
    }

    /// The entry with this name, if it is the name of one.
    pub fn of_name(name: &str) -> Option<Self> {
        let number = |kind: &str| name.strip_prefix(kind).and_then(|number| number.parse().ok());
        let directory = number(DIRECTORY).map(|number| Self { number, is_file: false });
        directory.or_else(|| number(FILE).map(|number| Self { number, is_file: true }))
    }
}

const DIRECTORY: &str = "dir-";
const FILE: &str = "file-";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_known_by_its_path() {
        for entry in [ShareEntry { number: 0, is_file: false }, ShareEntry { number: 17, is_file: true }] {
            assert_eq!(ShareEntry::of_path(&entry.path()), Some(entry));
        }
        for path in
            ["/run/machinen-shares", "/run/machinen-shares/x-1", "/run/dir-1", "/run/machinen-shares/dir-"]
        {
            assert_eq!(ShareEntry::of_path(Path::new(path)), None, "{path}");
        }
        assert_eq!(ShareEntry { number: 3, is_file: true }.path(), Path::new("/run/machinen-shares/file-3"));
    }
}
