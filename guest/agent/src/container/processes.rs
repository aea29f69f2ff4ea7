//! The processes of a container, as the kernel describes them in /proc.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use machinen_protocol::{
    MAX_COMMAND, MAX_LISTED_PROCESSES,
    api::{GuestProcess, ListProcessesResponse},
};
use nix::unistd::{SysconfVar, sysconf};

use super::{Container, ContainerError};

/// Most bytes that are read of a file of /proc besides a command. A process has some kilobytes of status.
const MAX_FILE: u64 = 16 << 10;

impl Container {
    /// Lists the processes, in the order of their pids.
    ///
    /// # Errors
    /// The container has ended, or its cgroup cannot be read.
    pub(crate) fn processes(&self) -> Result<ListProcessesResponse, ContainerError> {
        let pids = self.running_cgroup()?.pids()?;
        let clock = Clock::read();
        let read = pids.iter().take(MAX_LISTED_PROCESSES);
        let mut all: Vec<Listed> = read.filter_map(|pid| Listed::read(pid.as_raw(), &clock)).collect();
        let inner: Vec<(i32, u32)> = all.iter().map(|listed| (listed.pid, listed.process.pid)).collect();
        for listed in &mut all {
            let parent = inner.iter().find(|(pid, _)| *pid == listed.parent);
            listed.process.parent_pid = parent.map_or(0, |(_, inner)| *inner);
        }
        let mut processes: Vec<GuestProcess> = all.into_iter().map(|listed| listed.process).collect();
        processes.sort_by_key(|process| process.pid);
        let total = u32::try_from(pids.len()).unwrap_or(u32::MAX);
        Ok(ListProcessesResponse { processes, total, ..Default::default() })
    }
}

/// The units of /proc, and the present time.
#[derive(Debug, Clone, Copy)]
struct Clock {
    ticks: u64,
    page: u64,
    /// Microseconds since the boot.
    now: u64,
}

impl Clock {
    fn read() -> Self {
        let value = |name, default| {
            sysconf(name).ok().flatten().and_then(|value| u64::try_from(value).ok()).unwrap_or(default).max(1)
        };
        let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
        let seconds = uptime.split_whitespace().next().and_then(|text| text.parse::<f64>().ok());
        Self {
            ticks: value(SysconfVar::CLK_TCK, 100),
            page: value(SysconfVar::PAGE_SIZE, 4096),
            now: (seconds.unwrap_or(0.0) * 1e6) as u64,
        }
    }

    fn micros(&self, ticks: u64) -> u64 {
        ticks.saturating_mul(1_000_000 / self.ticks)
    }
}

/// A process, and its pid and that of its parent as the agent sees them.
#[derive(Debug, PartialEq)]
struct Listed {
    pid: i32,
    parent: i32,
    process: GuestProcess,
}

impl Listed {
    /// None if the process has ended.
    fn read(pid: i32, clock: &Clock) -> Option<Self> {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let file = |name: &str, most| read_start(&dir.join(name), most).ok();
        let (stat, status) = (file("stat", MAX_FILE)?, file("status", MAX_FILE)?);
        // One byte more shows whether there is more.
        let command = file("cmdline", MAX_COMMAND as u64 + 1).unwrap_or_default();
        Self::parse(pid, &String::from_utf8_lossy(&stat), &String::from_utf8_lossy(&status), &command, clock)
    }

    /// From the files `stat`, `status` and `cmdline` of proc(5).
    fn parse(pid: i32, stat: &str, status: &str, command: &[u8], clock: &Clock) -> Option<Self> {
        // The name is in parentheses and may contain anything.
        let (start, rest) = stat.rsplit_once(')')?;
        let name = start.split_once('(').map_or("", |(_, name)| name);
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // Counted as in proc(5), where the state is the third field.
        let field = |number: usize| fields.get(number - 3).copied().unwrap_or_default();
        let number = |at: usize| field(at).parse::<u64>().unwrap_or(0);
        let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let inner = line("NSpid:").and_then(|pids| pids.split_whitespace().last()?.parse().ok());
        let uid = line("Uid:").and_then(|uids| uids.split_whitespace().nth(1)?.parse().ok());
        let process = GuestProcess {
            pid: inner.unwrap_or(pid.cast_unsigned()),
            uid: uid.unwrap_or(u32::MAX),
            state: field(3).chars().take(1).collect(),
            cpu_micros: clock.micros(number(14).saturating_add(number(15))),
            rss_bytes: number(24).saturating_mul(clock.page),
            age_micros: clock.now.saturating_sub(clock.micros(number(22))),
            command: shown(command, name),
            threads: u32::try_from(number(20)).unwrap_or(u32::MAX),
            ..Default::default()
        };
        Some(Self { pid, parent: field(4).parse().unwrap_or(0), process })
    }
}

/// The arguments in one line, or the name of a process without arguments.
fn shown(command: &[u8], name: &str) -> String {
    let mut text = match command.iter().all(|byte| *byte == 0) {
        true => format!("[{name}]"),
        false => {
            let words: Vec<_> =
                command.strip_suffix(&[0]).unwrap_or(command).split(|byte| *byte == 0).collect();
            String::from_utf8_lossy(&words.join(&b' ')).into_owned()
        }
    };
    let mut end = text.len().min(MAX_COMMAND);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

fn read_start(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOCK: Clock = Clock { ticks: 100, page: 4096, now: 50_000_000 };

    #[test]
    fn a_process_is_read_from_its_files() {
        let stat = "77 (a) b) S 70 77 77 0 -1 0 0 0 0 0 250 50 0 0 20 0 3 0 2000 9999 12 0";
        let status = "Name:\ta) b\nUid:\t5\t1000\t5\t5\nNSpid:\t77\t8\n";
        let listed = Listed::parse(77, stat, status, b"sh\0-c\0x y\0", &CLOCK).unwrap();
        let process = &listed.process;
        assert_eq!((listed.pid, listed.parent, process.pid, process.uid), (77, 70, 8, 1000));
        assert_eq!((process.state.as_str(), process.command.as_str()), ("S", "sh -c x y"));
        assert_eq!((process.cpu_micros, process.rss_bytes), (3_000_000, 12 * 4096));
        assert_eq!((process.age_micros, process.threads), (30_000_000, 3));
    }

    #[test]
    fn a_process_without_arguments_has_its_name_and_a_long_command_is_cut() {
        assert_eq!(shown(b"", "kworker"), "[kworker]");
        assert_eq!(shown(b"\0\0", "x"), "[x]");
        assert_eq!(shown(&"ä".repeat(MAX_COMMAND).into_bytes(), "x").len(), MAX_COMMAND);
        assert!(shown(&[0xff; 4 * MAX_COMMAND], "x").len() <= MAX_COMMAND);
    }

    #[test]
    fn odd_files_are_no_process_or_have_zeros() {
        assert_eq!(Listed::parse(1, "", "", b"", &CLOCK), None);
        let listed = Listed::parse(1, "1 (x)", "", b"", &CLOCK).unwrap();
        assert_eq!((listed.process.pid, listed.process.cpu_micros), (1, 0));
    }

    #[test]
    fn the_own_process_is_listed() {
        let pid = std::process::id().cast_signed();
        let listed = Listed::read(pid, &Clock::read()).unwrap();
        assert!(listed.process.rss_bytes > 0 && !listed.process.command.is_empty());
    }
}
