//! The members of all pools, as users see them: listed and ended.

use std::{
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use super::{
    PoolError, entries, file,
    slot::{Record, Slot, Stage},
};
use crate::process::tree_pss;

/// Longest wait for members to end. One that makes its clone finishes that step first.
const PATIENCE: Duration = Duration::from_secs(60);

/// A member of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The directory of its pool.
    pub pool: PathBuf,
    /// None: its process has not said anything yet.
    pub record: Option<Record>,
    /// Its share of the host's memory, with that of its VM, bytes.
    pub takes: u64,
}

/// All members below `dir`, whatever their configuration, the oldest first.
///
/// # Errors
/// The directory cannot be read.
pub fn list(dir: &Path) -> Result<Vec<Listed>, PoolError> {
    let mut members = Vec::new();
    for pool in entries(dir).map_err(file("read", dir))? {
        for slot in Slot::occupied(&pool)? {
            let record = slot.read()?.filter(|record| record.stage != Stage::Taken);
            let takes = record.as_ref().map_or(0, |record| tree_pss(record.pid));
            members.push(Listed { pool: pool.clone(), record, takes });
        }
    }
    members.sort_by_key(|member| member.record.as_ref().map(|record| (record.created, record.pid)));
    Ok(members)
}

/// Ends all members below `dir`, whatever their configuration, those that are in the making too; returns how many. A member that
/// is taken by a start meanwhile is that container's and stays.
///
/// # Errors
/// The directory cannot be read, or a member does not end.
pub fn drain(dir: &Path) -> Result<usize, PoolError> {
    let mut slots = Vec::new();
    for pool in entries(dir).map_err(file("read", dir))? {
        slots.append(&mut Slot::occupied(&pool)?);
    }
    slots.iter().try_for_each(Slot::dismiss)?;
    let end = Instant::now() + PATIENCE;
    let mut ended = 0;
    for slot in slots {
        ended += usize::from(wait(slot, end)?);
    }
    Ok(ended)
}

/// Whether the member of a slot has ended, and was not taken.
fn wait(slot: Slot, end: Instant) -> Result<bool, PoolError> {
    let record = slot.read()?;
    let (sender, waited) = mpsc::channel();
    // fcntl(2) knows no deadline. Where it passes, the thread ends with the program, or with the member.
    thread::spawn(move || {
        let waited = slot.wait().map(|()| slot);
        // The deadline has passed.
        let _ = sender.send(waited);
    });
    let pid = record.map_or(0, |record| record.pid);
    match waited.recv_timeout(end.saturating_duration_since(Instant::now())) {
        Ok(waited) => {
            let slot = waited.map_err(PoolError::Wait)?;
            Ok(slot.read()?.is_none_or(|record| record.stage != Stage::Taken))
        }
        Err(_) => Err(PoolError::Stays { pid, seconds: PATIENCE.as_secs() }),
    }
}
