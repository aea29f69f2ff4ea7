//! Directories that CRIU creates in /tmp, and leaves there if it is killed.

use std::{fs, io, path::Path};

use super::CriuError;

const TMP: &str = "/tmp";

/// Removes these directories, unless a running CRIU may need its own; a later call removes them then.
///
/// # Errors
/// Those of the file system.
pub(super) fn clear() -> Result<(), CriuError> {
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| CriuError::File { what, path, source }
    };
    let mut processes = procfs::process::all_processes().map_err(CriuError::Inspect)?;
    let is_criu = |stat: procfs::process::Stat| stat.comm == "criu" && stat.state != 'Z';
    if processes.any(|process| process.and_then(|process| process.stat()).is_ok_and(is_criu)) {
        return Ok(());
    }
    for entry in fs::read_dir(TMP).map_err(failed("read", TMP.as_ref()))? {
        let entry = entry.map_err(failed("read", TMP.as_ref()))?;
        if entry.file_name().to_string_lossy().starts_with(".criu.") {
            fs::remove_dir(entry.path()).map_err(failed("remove", &entry.path()))?;
        }
    }
    Ok(())
}
