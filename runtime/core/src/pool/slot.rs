//! A slot of the pool, for one member: a file that the member keeps locked and that holds the member's
//! record.
//!
//! ```text
//!   refill   locks slot-N.lock, starts the member with the locked descriptor
//!   member   keeps it locked until it has ended, or has been handed to a container
//!   drain    unlinks the file, which the member receives as an event, and waits for the lock
//! ```
//! A slot is thus locked from before its member starts until after the member has ended. The lock belongs to
//! the open file description (fcntl(2), F_OFD_SETLK), so it can be inherited, and can be queried without
//! being taken.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use machinen_base::fs::{FileError, if_exists, remove_if_exists};
use machinen_vm::VmSpec;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
};
use serde::{Deserialize, Serialize};

use super::PoolError;

/// The progress of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemberStage {
    /// The process starts.
    Starting,
    /// The clone is being made.
    Cloning,
    /// The clone creates a container once.
    WarmingUp,
    /// The member waits for a start.
    Ready,
    /// The member serves a container as its shim.
    Taken,
}

impl MemberStage {
    /// The name that users see.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Cloning => "cloning",
            Self::WarmingUp => "warming up",
            Self::Ready => "ready",
            Self::Taken => "taken",
        }
    }
}

/// The content of a slot's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// 0 until the member's process has written its pid.
    pub pid: u32,
    /// Seconds since 1970.
    pub created: u64,
    /// Ceiling of the VM's memory, MiB.
    pub memory_mib: u32,
    /// Number of the VM's virtual CPUs.
    pub vcpus: u32,
    /// The file of the member's configuration. Empty: a version of machinen before this field has written the record.
    #[serde(default)]
    pub config: PathBuf,
    /// The member's progress.
    pub stage: MemberStage,
}

impl MemberRecord {
    pub(super) fn new(spec: &VmSpec, config: PathBuf) -> Self {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let (memory_mib, vcpus) = (spec.memory_mib, spec.vcpus);
        Self { pid: 0, created, memory_mib, vcpus, config, stage: MemberStage::Starting }
    }
}

/// Extension of the slots' files.
const EXTENSION: &str = "lock";

/// Size limit of a record, bytes.
const MAX_RECORD: usize = 4096;

/// A slot that this process holds or inspects.
#[derive(Debug)]
pub(super) struct PoolSlot {
    path: PathBuf,
    file: File,
}

impl PoolSlot {
    pub(super) fn path(dir: &Path, number: u32) -> PathBuf {
        dir.join(format!("slot-{number}")).with_extension(EXTENSION)
    }

    /// Takes a free slot. Returns None if the slot has a member.
    pub(super) fn take(path: &Path) -> Result<Option<Self>, PoolError> {
        loop {
            let open =
                File::options().create(true).truncate(false).read(true).write(true).mode(0o600).open(path);
            let slot = Self { path: path.to_owned(), file: open.map_err(FileError::at("open", path))? };
            match slot.lock(false) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                locked => locked.map_err(FileError::at("lock", path))?,
            }
            // A drain may have removed the file's name just before it was locked.
            if slot.has_name()? {
                return Ok(Some(slot));
            }
        }
    }

    /// The slot that this process has inherited. Returns None if the member is no longer needed.
    pub(super) fn inherited(path: PathBuf, fd: OwnedFd) -> Result<Option<Self>, PoolError> {
        let slot = Self { path, file: fd.into() };
        Ok(slot.has_name()?.then_some(slot))
    }

    /// All slots of a pool that have a member now.
    pub(super) fn occupied(dir: &Path) -> Result<Vec<Self>, PoolError> {
        let mut slots = Vec::new();
        for path in super::entries(dir).map_err(FileError::at("read", dir))? {
            if path.extension().is_none_or(|extension| extension != EXTENSION) {
                continue;
            }
            let opened = if_exists(File::options().read(true).write(true).open(&path));
            // Another drain may have removed the file meanwhile.
            let Some(file) = opened.map_err(FileError::at("open", &path))? else { continue };
            let slot = Self { path, file };
            if slot.is_locked().map_err(FileError::at("look at the lock of", &slot.path))? {
                slots.push(slot);
            }
        }
        Ok(slots)
    }

    /// Returns a descriptor of the same open file description, for the member.
    pub(super) fn share(&self) -> Result<OwnedFd, PoolError> {
        Ok(self.file.try_clone().map_err(FileError::at("share", &self.path))?.into())
    }

    /// A path of the open file that remains valid when its name is removed.
    pub(super) fn open_path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }

    /// Whether the slot's path still names the open file.
    pub(super) fn has_name(&self) -> Result<bool, PoolError> {
        let ours = self.file.metadata().map_err(FileError::at("look at", &self.path))?;
        let named = if_exists(fs::metadata(&self.path)).map_err(FileError::at("look at", &self.path))?;
        Ok(named.is_some_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino())))
    }

    /// Asks the member to end, by removing the file's name, which the member watches. The next member uses a
    /// new file.
    pub(super) fn dismiss(&self) -> Result<(), PoolError> {
        remove_if_exists(&self.path).map_err(FileError::at("remove", &self.path))?;
        Ok(())
    }

    /// Waits until the slot has no member. Blocks.
    pub(super) fn wait(&self) -> io::Result<()> {
        loop {
            match self.lock(true) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                locked => return locked,
            }
        }
    }

    pub(super) fn write(&self, record: &MemberRecord) -> Result<(), PoolError> {
        let text = serde_json::to_vec(record).expect("plain data");
        let written = self.file.write_all_at(&text, 0).and_then(|()| self.file.set_len(text.len() as u64));
        written.map_err(FileError::at("write", &self.path))?;
        Ok(())
    }

    /// Reads the record. Returns None while the member is writing it.
    pub(super) fn read(&self) -> Result<Option<MemberRecord>, PoolError> {
        let mut text = vec![0; MAX_RECORD];
        let length = self.file.read_at(&mut text, 0).map_err(FileError::at("read", &self.path))?;
        // The rest of a longer, earlier record may follow.
        Ok(serde_json::Deserializer::from_slice(&text[..length]).into_iter().next().and_then(Result::ok))
    }

    fn lock(&self, wait: bool) -> io::Result<()> {
        let whole = whole();
        let how = if wait { FcntlArg::F_OFD_SETLKW(&whole) } else { FcntlArg::F_OFD_SETLK(&whole) };
        match fcntl(&self.file, how) {
            Err(Errno::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
            locked => Ok(locked.map(drop)?),
        }
    }

    fn is_locked(&self) -> io::Result<bool> {
        let mut found = whole();
        fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut found))?;
        Ok(i32::from(found.l_type) != libc::F_UNLCK)
    }
}

/// A lock for writing on the whole file.
fn whole() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(stage: MemberStage) -> MemberRecord {
        MemberRecord { pid: 7, created: 1, memory_mib: 512, vcpus: 2, config: "/etc/m.toml".into(), stage }
    }

    #[test]
    fn one_member_has_a_slot_until_all_that_share_its_file_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = PoolSlot::path(dir.path(), 0);
        let slot = PoolSlot::take(&path).unwrap().unwrap();
        assert!(PoolSlot::take(&path).unwrap().is_none());
        let member = slot.share().unwrap();
        drop(slot);
        assert!(PoolSlot::take(&path).unwrap().is_none());
        let member = PoolSlot::inherited(path.clone(), member).unwrap().unwrap();
        assert_eq!(PoolSlot::occupied(dir.path()).unwrap().len(), 1);
        // Querying the locks does not disturb them.
        assert!(PoolSlot::take(&path).unwrap().is_none());
        drop(member);
        assert_eq!(PoolSlot::occupied(dir.path()).unwrap().len(), 0);
        assert!(PoolSlot::take(&path).unwrap().is_some());
    }

    #[test]
    fn a_drained_slot_is_not_inherited_and_is_free_for_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = PoolSlot::path(dir.path(), 0);
        let slot = PoolSlot::take(&path).unwrap().unwrap();
        let [found] = &PoolSlot::occupied(dir.path()).unwrap()[..] else { panic!("not one") };
        found.dismiss().unwrap();
        assert!(!slot.has_name().unwrap());
        let other = PoolSlot::take(&path).unwrap().unwrap();
        // The slot has a new file, which is not that member's.
        assert!(PoolSlot::inherited(path, slot.share().unwrap()).unwrap().is_none());
        assert!(other.has_name().unwrap());
        drop(slot);
        found.wait().unwrap();
    }

    #[test]
    fn records_are_read_as_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let slot = PoolSlot::take(&PoolSlot::path(dir.path(), 0)).unwrap().unwrap();
        assert_eq!(slot.read().unwrap(), None);
        for stage in [MemberStage::WarmingUp, MemberStage::Ready] {
            slot.write(&record(stage)).unwrap();
            assert_eq!(slot.read().unwrap(), Some(record(stage)));
        }
        // The content between the two steps of a write.
        slot.file.write_all_at(&serde_json::to_vec(&record(MemberStage::WarmingUp)).unwrap(), 0).unwrap();
        slot.file.write_all_at(&serde_json::to_vec(&record(MemberStage::Ready)).unwrap(), 0).unwrap();
        assert_eq!(slot.read().unwrap(), Some(record(MemberStage::Ready)));
    }
}
