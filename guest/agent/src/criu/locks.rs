//! Record locks that a restore would lose.
//!
//! CRIU 4.1 takes a process's POSIX record locks (fcntl(2), F_SETLK) before it maps the process's files, and
//! opens a file once more for each mapping. Closing any descriptor of a file releases all record locks of the
//! process on that file (fcntl_locking(2)), so a lock on a mapped file is lost. SQLite in WAL mode has such a
//! file (`-shm`): without the lock, the next process that opens the database truncates the file under the
//! mapping.

use std::{collections::HashSet, fs, path::PathBuf};

use nix::unistd::Pid;
use procfs::process::{MMapPath, Process};

/// Describes the first such lock of a process. A process that has ended has none.
pub(super) fn lost_by_a_restore(pid: Pid) -> Option<String> {
    let locked = locked_files(pid);
    if locked.is_empty() {
        return None;
    }
    let maps = Process::new(pid.as_raw()).and_then(|process| process.maps()).ok()?;
    let mapped: HashSet<PathBuf> = maps
        .into_iter()
        .filter_map(|map| match map.pathname {
            MMapPath::Path(path) => Some(path),
            _ => None,
        })
        .collect();
    let path = locked.into_iter().find(|path| mapped.contains(path))?;
    let path = path.display().to_string().escape_debug().to_string();
    Some(format!("holds a record lock on {path}, which it has also mapped"))
}

/// The open files on which the process holds a record lock.
fn locked_files(pid: Pid) -> Vec<PathBuf> {
    let Ok(open) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else { return Vec::new() };
    open.flatten()
        .filter(|entry| fs::read_to_string(entry.path()).is_ok_and(|info| info.lines().any(is_record_lock)))
        .filter_map(|entry| {
            let number = entry.file_name();
            fs::read_link(format!("/proc/{pid}/fd/{}", number.to_string_lossy())).ok()
        })
        .collect()
}

/// A line of /proc/PID/fdinfo, such as `lock: 1: POSIX  ADVISORY  READ 42 08:10:1234 128 128`
/// (proc_pid_fdinfo(5)).
fn is_record_lock(line: &str) -> bool {
    line.strip_prefix("lock:").is_some_and(|lock| lock.split_whitespace().nth(1) == Some("POSIX"))
}

#[cfg(test)]
mod tests {
    use nix::fcntl::{FcntlArg, fcntl};

    use super::*;

    #[test]
    fn the_kernels_words_for_locks() {
        assert!(is_record_lock("lock:\t1: POSIX  ADVISORY  READ 42 08:10:1234 128 128"));
        assert!(!is_record_lock("lock:\t1: FLOCK  ADVISORY  WRITE 42 08:10:1234 0 EOF"));
        assert!(!is_record_lock("lock:\t1: OFDLCK ADVISORY  WRITE -1 08:10:1234 0 EOF"));
        assert!(!is_record_lock("pos:\t0"));
    }

    #[test]
    fn a_lock_on_a_mapped_file_is_found_and_one_on_another_is_not() {
        let pid = nix::unistd::getpid();
        let lock = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 1,
            l_pid: 0,
        };
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(fcntl(&file, FcntlArg::F_SETLK(&lock)).map(drop), Ok(()));
        assert_eq!(locked_files(pid), [file.path()]);
        assert_eq!(lost_by_a_restore(pid), None);
    }
}
