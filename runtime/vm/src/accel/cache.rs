//! The results of measurements of the host, kept until it boots again; those that may be wrong, for a short while.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use machinen_base::fs::{FileError, if_exists};
use serde::{Deserialize, Serialize};

use super::AccelError;

/// Raised when the meaning of the facts changes.
const VERSION: u32 = 2;

/// How long a doubtful result is kept: not every start shall pay for the attempt.
const DOUBT: Duration = Duration::from_secs(60);

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Facts {
    pub(super) version: u32,
    pub(super) tsc_khz: Option<u32>,
    /// None if KVM has not been tried.
    pub(super) kvm: Option<Tried>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Tried {
    Works,
    Broken(String),
    /// It did not work, for a reason that may pass.
    Doubtful {
        reason: String,
        /// Seconds since the host has booted.
        at: u64,
    },
}

impl Tried {
    /// Whether this holds at a time, in seconds since the host has booted.
    pub(super) fn holds(&self, now: u64) -> bool {
        match self {
            Self::Works | Self::Broken(_) => true,
            Self::Doubtful { at, .. } => now.abs_diff(*at) < DOUBT.as_secs(),
        }
    }
}

/// Reads the stored facts. None if there are none, or if this version cannot read them.
pub(super) fn load(run_dir: &Path) -> Result<Option<Facts>, AccelError> {
    let path = path(run_dir)?;
    let bytes = if_exists(fs::read(&path)).map_err(FileError::at("read", path))?;
    let facts = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    Ok(facts.filter(|facts: &Facts| facts.version == VERSION))
}

/// Stores the facts atomically. If two processes write at once, either file is right.
pub(super) fn store(run_dir: &Path, facts: Facts) -> Result<(), AccelError> {
    let path = path(run_dir)?;
    let write = || -> io::Result<()> {
        fs::create_dir_all(run_dir)?;
        let mut file = tempfile::NamedTempFile::new_in(run_dir)?;
        file.write_all(&serde_json::to_vec(&Facts { version: VERSION, ..facts })?)?;
        file.persist(&path).map_err(|error| error.error)?;
        Ok(())
    };
    Ok(write().map_err(FileError::at("write", &path))?)
}

/// `<run_dir>/accel-<boot id>.json`.
fn path(run_dir: &Path) -> Result<PathBuf, AccelError> {
    const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
    let boot_id = fs::read_to_string(BOOT_ID).map_err(FileError::at("read", BOOT_ID))?;
    Ok(run_dir.join(format!("accel-{}.json", boot_id.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_come_back_and_noise_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("a/b");
        assert_eq!(load(&run_dir).unwrap(), None);
        let doubtful = Tried::Doubtful { reason: "late".into(), at: 7 };
        for kvm in [None, Some(doubtful), Some(Tried::Works), Some(Tried::Broken("slow".into()))] {
            let facts = || Facts { version: VERSION, tsc_khz: Some(3), kvm: kvm.clone() };
            store(&run_dir, facts()).unwrap();
            assert_eq!(load(&run_dir).unwrap(), Some(facts()));
        }
        let file = fs::read_dir(&run_dir).unwrap().next().unwrap().unwrap().path();
        let stored = fs::read_to_string(&file).unwrap();
        assert_eq!(stored, r#"{"version":2,"tsc_khz":3,"kvm":{"broken":"slow"}}"#);
        for noise in ["", "{", &stored.replace(":2,", ":1,")] {
            fs::write(&file, noise).unwrap();
            assert_eq!(load(&run_dir).unwrap(), None);
        }
    }

    #[test]
    fn doubt_passes() {
        let doubtful = Tried::Doubtful { reason: "late".into(), at: 100 };
        assert!(doubtful.holds(100) && doubtful.holds(159) && !doubtful.holds(160));
        assert!(Tried::Broken("no".into()).holds(u64::MAX));
    }
}
