//! The record of a container's poststop hooks, by which each runs once, also after the shim was killed.
//!
//! ```text
//!   POD'S BUNDLE/poststop/ID:   {"version":1,"bundle":...,"state":...,"hooks":[...]} LF, and a byte for each hook that has begun
//! ```
//! The file appears whole before the first hook of the container runs (rename(2)), and a hook begins only after its byte
//! was appended. Whoever runs the hooks holds a lock on the file and removes it at the end: the Task API's Delete, a
//! creation that has failed, or the shim's `delete`. All containers of a pod have their records in the pod's bundle,
//! since containerd runs `delete` for that bundle only.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Instant,
};

use machinen_base::fs::{FileError, create_private_dir, if_exists, remove_if_exists, try_lock};
use oci_spec::runtime::Hook;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{HookError, HookStage, execute::HookPlace, run};

/// The version of the format.
const VERSION: u32 = 1;

/// A larger record is refused, bytes. A configuration with its hooks and annotations is smaller.
const MAX_RECORD: u64 = 16 << 20;

/// What a hook that has begun adds to the file.
const BEGUN: &[u8] = b".";

#[derive(Debug, Serialize, Deserialize)]
struct Content {
    version: u32,
    /// The bundle of the container, in which the hooks run.
    bundle: PathBuf,
    /// What the hooks read on their stdin.
    state: Value,
    hooks: Vec<Hook>,
}

/// The poststop hooks of one container, which no other process runs meanwhile.
#[derive(Debug)]
pub struct PoststopRecord {
    path: PathBuf,
    /// Open for reading and appending, and locked.
    file: File,
    content: Content,
    begun: usize,
}

/// Records the poststop hooks of the container `id` in the directory `dir`, which is made if it is missing.
pub(super) fn write(
    dir: &Path,
    id: &str,
    bundle: &Path,
    state: &[u8],
    hooks: Vec<Hook>,
) -> Result<(), HookError> {
    let path = dir.join(id);
    let state = serde_json::from_slice(state).map_err(HookError::Encode)?;
    let content = Content { version: VERSION, bundle: bundle.to_owned(), state, hooks };
    let mut line = serde_json::to_vec(&content).map_err(HookError::Encode)?;
    line.push(b'\n');
    let written = || -> io::Result<()> {
        create_private_dir(dir)?;
        // Not in `dir`, where every file is a record.
        let mut file = tempfile::Builder::new().prefix("poststop-").tempfile_in(dir.join(".."))?;
        file.write_all(&line)?;
        file.persist(&path)?;
        Ok(())
    };
    written().map_err(FileError::at("write", &path))?;
    Ok(())
}

/// The ids of the containers whose poststop hooks are recorded in `dir`.
///
/// # Errors
/// The directory cannot be read.
pub fn recorded(dir: &Path) -> Result<Vec<OsString>, HookError> {
    let names = if_exists(fs::read_dir(dir))
        .and_then(|entries| entries.into_iter().flatten().map(|entry| Ok(entry?.file_name())).collect());
    Ok(names.map_err(FileError::at("list", dir))?)
}

impl PoststopRecord {
    /// Opens the record of the container `id`. None if the container has no poststop hooks, or all of them have run.
    ///
    /// # Errors
    /// Another process runs the hooks, or the file is not a record.
    pub fn open(dir: &Path, id: impl AsRef<Path>) -> Result<Option<Self>, HookError> {
        let path = dir.join(id);
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let opened = File::options().read(true).append(true).custom_flags(flags).open(&path);
        let Some(file) = if_exists(opened).map_err(FileError::at("open", &path))? else { return Ok(None) };
        if !try_lock(&file).map_err(FileError::at("lock", &path))? {
            return Err(HookError::Busy { path });
        }
        let mut text = Vec::new();
        (&file).take(MAX_RECORD).read_to_end(&mut text).map_err(FileError::at("read", &path))?;
        let odd = |problem: String| HookError::OddRecord { path: path.clone(), problem };
        let end =
            text.iter().position(|byte| *byte == b'\n').ok_or_else(|| odd("it has no end".to_owned()))?;
        let content: Content =
            serde_json::from_slice(&text[..end]).map_err(|error| odd(error.to_string()))?;
        if content.version != VERSION {
            return Err(odd(format!("it has the version {}", content.version)));
        }
        let begun = text.len() - end - 1;
        Ok(Some(Self { path, file, content, begun }))
    }

    /// Runs the hooks that have not begun, none of them beyond `until`, and removes the record. Returns the failures,
    /// each of which leaves the other hooks alone.
    ///
    /// # Errors
    /// The record cannot be written or removed.
    pub async fn run(
        mut self,
        cgroups: &[PathBuf],
        until: Option<Instant>,
    ) -> Result<Vec<HookError>, HookError> {
        let Content { bundle, state, hooks, .. } = &self.content;
        let state = serde_json::to_vec(state).map_err(HookError::Encode)?;
        let place = HookPlace { dir: bundle, cgroups, namespaces_of: None };
        let mut failures = Vec::new();
        for (number, hook) in hooks.iter().enumerate().skip(self.begun) {
            self.file.write_all(BEGUN).map_err(FileError::at("write", &self.path))?;
            let ended = run(HookStage::Poststop, number, hook, &place, &state, until).await;
            failures.extend(ended.err());
        }
        remove_if_exists(&self.path).map_err(FileError::at("remove", &self.path))?;
        // Fails while other containers of the pod have records.
        let _ = self.path.parent().map(fs::remove_dir);
        Ok(failures)
    }
}
