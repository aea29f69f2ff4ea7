//! The processes of this host, as /proc shows them.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use machinen::fs::FileError;

/// A process of this host with a command line.
#[derive(Debug, Clone)]
pub(super) struct ListedProcess {
    pub(super) pid: u32,
    /// The file name of its program.
    pub(super) program: String,
    pub(super) args: Vec<String>,
}

/// Memory of a process on the host, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct MemoryUse {
    /// Resident.
    pub(crate) rss: u64,
    /// Resident, each shared page in equal parts among those that share it.
    pub(crate) pss: u64,
}

/// All processes of this host. One that ends meanwhile is left out.
///
/// # Errors
/// /proc cannot be listed.
pub(super) fn all() -> Result<Vec<ListedProcess>, FileError> {
    let entries = fs::read_dir("/proc").map_err(FileError::at("list", "/proc"))?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    Ok(pids.filter_map(read).collect())
}

fn read(pid: u32) -> Option<ListedProcess> {
    let exe = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let program = exe.file_name()?.to_string_lossy();
    let program = program.strip_suffix(" (deleted)").unwrap_or(&program).to_owned();
    Some(ListedProcess { pid, program, args: arguments(pid) })
}

/// The arguments of a process; none if it has ended.
pub(super) fn arguments(pid: u32) -> Vec<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = line.strip_suffix(&[0]).unwrap_or(&line).split(|byte| *byte == 0);
    words.map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// The parent of a process.
pub(super) fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// The directory in which a process works.
pub(super) fn directory(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/cwd")).ok().filter(|path| path != Path::new("/"))
}

/// How long a process exists; None if it has ended.
pub(crate) fn age_of(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let now: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    // The second field is the name, which may contain anything. The third field follows its last parenthesis.
    let ticks: f64 = stat.rsplit_once(')')?.1.split_whitespace().nth(22 - 3)?.parse().ok()?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    Duration::try_from_secs_f64((now - ticks / per_second as f64).max(0.0)).ok()
}

/// The memory of a process; None if it has ended or its memory may not be read.
pub(crate) fn memory_of(pid: u32) -> Option<MemoryUse> {
    parse(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?)
}

/// From proc_pid_smaps_rollup(5), whose values are in kB of 1024 bytes.
fn parse(rollup: &str) -> Option<MemoryUse> {
    let bytes = |name: &str| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? << 10)
    };
    Some(MemoryUse { rss: bytes("Rss:")?, pss: bytes("Pss:")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_process_is_found() {
        let pid = std::process::id();
        let all = all().unwrap();
        let own = all.iter().find(|process| process.pid == pid).unwrap();
        assert!(!own.args.is_empty() && !own.program.is_empty());
        assert_eq!(parent(pid), Some(std::os::unix::process::parent_id()));
        assert!(age_of(pid).is_some());
        assert!(memory_of(pid).is_some_and(|memory| memory.rss >= memory.pss && memory.pss > 0));
    }

    #[test]
    fn what_is_not_there_is_none() {
        assert_eq!((memory_of(u32::MAX), age_of(u32::MAX), parent(u32::MAX)), (None, None, None));
        assert_eq!(parse("Rss: x kB\n"), None);
        let rollup =
            "00-ff ---p 00000000 00:00 0 [rollup]\nRss:      12 kB\nPss:       7 kB\nPss_Dirty: 1 kB\n";
        assert_eq!(parse(rollup), Some(MemoryUse { rss: 12 << 10, pss: 7 << 10 }));
    }
}
