//! Lists and drains the members of all pools, for users.

use std::{
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use machinen_base::{fs::FileError, process::tree_pss};

use super::{
    PoolError, entries,
    slot::{MemberRecord, MemberStage, PoolSlot},
};

/// How long members may take to end. A member that is making its clone finishes that step first.
const PATIENCE: Duration = Duration::from_secs(60);

/// A member of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedMember {
    /// The directory of the member's pool.
    pub pool: PathBuf,
    /// None until the member's process has written it.
    pub record: Option<MemberRecord>,
    /// The member's share of the host's memory, including its VM, bytes.
    pub memory: u64,
}

/// All members below `dir`, of any configuration, the oldest first.
///
/// # Errors
/// The directory cannot be read.
pub fn list(dir: &Path) -> Result<Vec<ListedMember>, PoolError> {
    let mut members = Vec::new();
    for pool in entries(dir).map_err(FileError::at("read", dir))? {
        for slot in PoolSlot::occupied(&pool)? {
            let record = slot.read()?.filter(|record| record.stage != MemberStage::Taken);
            let memory = record.as_ref().map_or(0, |record| tree_pss(record.pid));
            members.push(ListedMember { pool: pool.clone(), record, memory });
        }
    }
    members.sort_by_key(|member| member.record.as_ref().map(|record| (record.created, record.pid)));
    Ok(members)
}

/// Ends all members below `dir`, of any configuration, including those that are still starting; returns how
/// many. A member that a start takes meanwhile belongs to that container and stays.
///
/// # Errors
/// The directory cannot be read, or a member does not end.
pub fn drain(dir: &Path) -> Result<usize, PoolError> {
    let mut slots = Vec::new();
    for pool in entries(dir).map_err(FileError::at("read", dir))? {
        slots.append(&mut PoolSlot::occupied(&pool)?);
    }
    slots.iter().try_for_each(PoolSlot::dismiss)?;
    let end = Instant::now() + PATIENCE;
    let mut ended = 0;
    for slot in slots {
        ended += usize::from(wait(slot, end)?);
    }
    Ok(ended)
}

/// Waits until a slot is free. Returns true if its member has ended, and false if the member was taken by a
/// container.
fn wait(slot: PoolSlot, end: Instant) -> Result<bool, PoolError> {
    let record = slot.read()?;
    let (sender, waited) = mpsc::channel();
    // A lock by fcntl(2) has no deadline. After the deadline the thread ends with the program, or with the
    // member.
    thread::spawn(move || {
        let waited = slot.wait().map(|()| slot);
        // The receiver is gone if the deadline has passed.
        let _ = sender.send(waited);
    });
    let pid = record.map_or(0, |record| record.pid);
    match waited.recv_timeout(end.saturating_duration_since(Instant::now())) {
        Ok(waited) => {
            let slot = waited.map_err(PoolError::Wait)?;
            Ok(slot.read()?.is_none_or(|record| record.stage != MemberStage::Taken))
        }
        Err(_) => Err(PoolError::Stays { pid, seconds: PATIENCE.as_secs() }),
    }
}
