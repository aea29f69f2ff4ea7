//! A container's resource usage, as its cgroup in the guest accounts for it.
//!
//! The guest sends the cgroup's files unchanged, and the host parses them here as untrusted text: values that
//! are not numbers are ignored, and the number of rows is bounded.

use std::{collections::HashMap, str::FromStr};

use machinen_netlink::InterfaceCounters;
use machinen_protocol::api::CgroupFile;

use super::{ContainerId, Pod, PodError};

/// The cgroup files to read.
pub const FILES: &[&str] = &[
    "cpu.stat",
    "cpu.pressure",
    "memory.current",
    "memory.max",
    "memory.peak",
    "memory.stat",
    "memory.events",
    "memory.swap.current",
    "memory.swap.max",
    "memory.pressure",
    "pids.current",
    "pids.max",
    "io.stat",
    "io.pressure",
];

/// An upper bound: a VM has fewer block devices.
const MAX_DEVICES: usize = 512;

/// The usage of one container. Fields are named as in the kernel's files (admin-guide/cgroup-v2.rst).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    /// CPU time, from `cpu.stat` and `cpu.pressure`.
    pub cpu: CpuStats,
    /// Memory, from the files `memory.*`.
    pub memory: MemoryStats,
    /// Processes, from the files `pids.*`.
    pub pids: PidsStats,
    /// Counts of each block device, from `io.stat`.
    pub io: Vec<IoStats>,
    /// Stalls by I/O, from `io.pressure`.
    pub io_pressure: Option<Pressure>,
    /// The network interfaces of the pod, by their names in the container.
    pub network: Vec<(String, InterfaceCounters)>,
}

/// Times in microseconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CpuStats {
    /// CPU time in total, microseconds.
    pub usage_usec: u64,
    /// CPU time in user mode, microseconds.
    pub user_usec: u64,
    /// CPU time in the kernel, microseconds.
    pub system_usec: u64,
    /// Number of periods of the quota that have passed.
    pub nr_periods: u64,
    /// Number of periods in which the quota was used up.
    pub nr_throttled: u64,
    /// Time for which the quota held processes back, microseconds.
    pub throttled_usec: u64,
    /// Stalls by a lack of CPU time, from `cpu.pressure`.
    pub pressure: Option<Pressure>,
}

/// Bytes, except the counts of events.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MemoryStats {
    /// Memory that is used now, bytes.
    pub current: u64,
    /// `u64::MAX` means no limit.
    pub max: u64,
    /// Most memory that was used at once, bytes.
    pub peak: u64,
    /// Swap that is used now, bytes.
    pub swap_current: u64,
    /// `u64::MAX` means no limit.
    pub swap_max: u64,
    /// The rows of `memory.stat`.
    pub stat: FlatKeyedFile,
    /// The rows of `memory.events`.
    pub events: FlatKeyedFile,
    /// Stalls by a lack of memory, from `memory.pressure`.
    pub pressure: Option<Pressure>,
}

/// Number of processes and threads, from the files `pids.*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PidsStats {
    /// Number of processes and threads now.
    pub current: u64,
    /// None means no limit.
    pub max: Option<u64>,
}

/// Traffic of one block device of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IoStats {
    /// The device's major number.
    pub major: u64,
    /// The device's minor number.
    pub minor: u64,
    /// Bytes that were read.
    pub rbytes: u64,
    /// Bytes that were written.
    pub wbytes: u64,
    /// Number of reads.
    pub rios: u64,
    /// Number of writes.
    pub wios: u64,
}

/// Time lost to waiting (Documentation/accounting/psi.rst).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pressure {
    /// Time in which at least one task was stalled.
    pub some: Stall,
    /// Time in which all tasks were stalled at once.
    pub full: Stall,
}

/// Shares in percent, the total in microseconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stall {
    /// Share of the last 10 seconds, percent.
    pub avg10: f64,
    /// Share of the last 60 seconds, percent.
    pub avg60: f64,
    /// Share of the last 300 seconds, percent.
    pub avg300: f64,
    /// Time in total, microseconds.
    pub total: u64,
}

/// A file with lines of the form `name number`; a name that is missing has the value 0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FlatKeyedFile(HashMap<String, u64>);

impl Pod {
    /// Returns a container's usage so far.
    ///
    /// # Errors
    /// The container does not exist, is still being created or has left the guest, or the agent does not answer.
    pub async fn stats(&self, id: &ContainerId) -> Result<Stats, PodError> {
        let container = self.container(id).map_err(|error| match error {
            // Clients ask for all containers at a time. One that does not exist yet is no error for them.
            PodError::BeingCreated { id } => PodError::NoContainer { id },
            other => other,
        })?;
        let files = self.agent(id).await?.read_cgroup(id, FILES).await;
        let files = files.map_err(|source| PodError::guest("count the resources of", id, source))?;
        let network = match &container.network {
            Some(network) => network.counters().await.map_err(PodError::Network)?,
            None => Vec::new(),
        };
        Ok(Stats { network, ..Stats::read(&files) })
    }
}

impl Stats {
    /// Adds what another container of the pod uses. Limits, stalls and the network stay, which are the pod's.
    pub(super) fn add(&mut self, other: Self) {
        let sums = [
            (&mut self.cpu.usage_usec, other.cpu.usage_usec),
            (&mut self.cpu.user_usec, other.cpu.user_usec),
            (&mut self.cpu.system_usec, other.cpu.system_usec),
            (&mut self.memory.current, other.memory.current),
            (&mut self.memory.swap_current, other.memory.swap_current),
            (&mut self.pids.current, other.pids.current),
        ];
        add_each(sums);
        self.memory.stat.add(other.memory.stat);
        self.memory.events.add(other.memory.events);
        for device in other.io {
            match self.io.iter_mut().find(|known| (known.major, known.minor) == (device.major, device.minor))
            {
                Some(known) => known.add(&device),
                None => self.io.push(device),
            }
        }
    }

    /// Parses the files. Any content is accepted; values that cannot be parsed become 0.
    pub fn read(files: &[CgroupFile]) -> Self {
        let text =
            |name: &str| files.iter().find(|file| file.name == name).map_or("", |file| file.content.as_str());
        let limit = |name| number(text(name)).unwrap_or(u64::MAX);
        let count = |name| number(text(name)).unwrap_or(0);
        let cpu = FlatKeyedFile::read(text("cpu.stat"));
        Self {
            cpu: CpuStats {
                usage_usec: cpu.get("usage_usec"),
                user_usec: cpu.get("user_usec"),
                system_usec: cpu.get("system_usec"),
                nr_periods: cpu.get("nr_periods"),
                nr_throttled: cpu.get("nr_throttled"),
                throttled_usec: cpu.get("throttled_usec"),
                pressure: Pressure::read(text("cpu.pressure")),
            },
            memory: MemoryStats {
                current: count("memory.current"),
                max: limit("memory.max"),
                peak: count("memory.peak"),
                swap_current: count("memory.swap.current"),
                swap_max: limit("memory.swap.max"),
                stat: FlatKeyedFile::read(text("memory.stat")),
                events: FlatKeyedFile::read(text("memory.events")),
                pressure: Pressure::read(text("memory.pressure")),
            },
            pids: PidsStats { current: count("pids.current"), max: number(text("pids.max")) },
            io: text("io.stat").lines().filter_map(IoStats::read).take(MAX_DEVICES).collect(),
            io_pressure: Pressure::read(text("io.pressure")),
            network: Vec::new(),
        }
    }
}

impl FlatKeyedFile {
    /// An upper bound: no such file of the kernel has as many rows.
    const MAX_ROWS: usize = 512;

    fn read(text: &str) -> Self {
        let rows = text.lines().filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), number(value)?))
        });
        Self(rows.take(Self::MAX_ROWS).collect())
    }

    fn add(&mut self, other: Self) {
        for (name, value) in other.0 {
            add_each([(self.0.entry(name).or_default(), value)]);
        }
    }

    /// The value of the row `name`; 0 if there is no such row.
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// The saturating sum of several rows.
    pub fn sum(&self, names: &[&str]) -> u64 {
        names.iter().fold(0, |sum, name| sum.saturating_add(self.get(name)))
    }
}

/// The numbers are the guest's, and may be of any size.
fn add_each<'a>(sums: impl IntoIterator<Item = (&'a mut u64, u64)>) {
    for (sum, value) in sums {
        *sum = sum.saturating_add(value);
    }
}

impl IoStats {
    fn add(&mut self, other: &Self) {
        add_each([
            (&mut self.rbytes, other.rbytes),
            (&mut self.wbytes, other.wbytes),
            (&mut self.rios, other.rios),
            (&mut self.wios, other.wios),
        ]);
    }

    fn read(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut io = Self { major: number(major)?, minor: number(minor)?, ..Self::default() };
        for word in words {
            let Some((name, value)) = word.split_once('=') else { continue };
            let place = match name {
                "rbytes" => &mut io.rbytes,
                "wbytes" => &mut io.wbytes,
                "rios" => &mut io.rios,
                "wios" => &mut io.wios,
                _ => continue,
            };
            *place = number(value)?;
        }
        Some(io)
    }
}

impl Pressure {
    fn read(text: &str) -> Option<Self> {
        let stall = |kind: &str| text.lines().find_map(|line| Stall::read(line.strip_prefix(kind)?));
        // The pressure file of the root cgroup has no "full" line for CPUs.
        Some(Self { some: stall("some ")?, full: stall("full ").unwrap_or_default() })
    }
}

impl Stall {
    fn read(fields: &str) -> Option<Self> {
        let mut stall = Self::default();
        for field in fields.split_ascii_whitespace() {
            match field.split_once('=')? {
                ("avg10", value) => stall.avg10 = percent(value)?,
                ("avg60", value) => stall.avg60 = percent(value)?,
                ("avg300", value) => stall.avg300 = percent(value)?,
                ("total", value) => stall.total = number(value)?,
                _ => {}
            }
        }
        Some(stall)
    }
}

fn number<T: FromStr>(text: &str) -> Option<T> {
    text.trim_end().parse().ok()
}

fn percent(text: &str) -> Option<f64> {
    number(text).filter(|share: &f64| (0.0..=100.0).contains(share))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(name: &str, content: &str) -> CgroupFile {
        CgroupFile { name: name.to_owned(), content: content.to_owned(), ..Default::default() }
    }

    #[test]
    fn the_kernels_own_files_are_read() {
        let stats = Stats::read(&[
            file(
                "cpu.stat",
                "usage_usec 1234\nuser_usec 1000\nsystem_usec 234\nnr_periods 9\nnr_throttled 4\nthrottled_usec 77\n",
            ),
            file("memory.current", "4096\n"),
            file("memory.max", "max\n"),
            file("memory.peak", "8192\n"),
            file("memory.stat", "anon 10\nfile 20\nworkingset_refault_anon 1\nworkingset_refault_file 2\n"),
            file("memory.events", "low 0\nhigh 0\nmax 12\noom 3\noom_kill 1\noom_group_kill 0\n"),
            file("pids.current", "3\n"),
            file("pids.max", "100\n"),
            file("io.stat", "8:0 rbytes=512 wbytes=1024 rios=1 wios=2 dbytes=0 dios=0\n8:16 \n7:x\n"),
            file(
                "io.pressure",
                "some avg10=1.50 avg60=0.20 avg300=0.00 total=99\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n",
            ),
        ]);
        assert_eq!((stats.cpu.usage_usec, stats.cpu.nr_throttled, stats.cpu.throttled_usec), (1234, 4, 77));
        assert_eq!((stats.memory.current, stats.memory.max, stats.memory.peak), (4096, u64::MAX, 8192));
        assert_eq!(stats.memory.stat.sum(&["workingset_refault_anon", "workingset_refault_file"]), 3);
        assert_eq!(stats.memory.events.get("oom_kill"), 1);
        assert_eq!(stats.pids, PidsStats { current: 3, max: Some(100) });
        assert_eq!(
            stats.io[0],
            IoStats { major: 8, rbytes: 512, wbytes: 1024, rios: 1, wios: 2, ..IoStats::default() }
        );
        assert_eq!(stats.io.len(), 2);
        let pressure = stats.io_pressure.unwrap();
        assert_eq!((pressure.some.avg10, pressure.full.total), (1.5, 5));
    }

    #[test]
    fn the_containers_of_a_pod_are_added_up() {
        let one = [
            file("memory.current", "4096"),
            file("memory.max", "9"),
            file("memory.stat", "anon 10\nfile 1\n"),
            file("io.stat", "8:0 rbytes=1\n"),
        ];
        let other = [
            file("memory.current", "18446744073709551615"),
            file("memory.max", "7"),
            file("memory.stat", "anon 5\n"),
            file("io.stat", "8:0 rbytes=2\n8:16 wios=3\n"),
        ];
        let mut sum = Stats::read(&one);
        sum.add(Stats::read(&other));
        assert_eq!((sum.memory.current, sum.memory.max, sum.memory.stat.get("anon")), (u64::MAX, 9, 15));
        assert_eq!((sum.io.len(), sum.io[0].rbytes, sum.io[1].wios), (2, 3, 3));
    }

    #[test]
    fn long_files_are_truncated() {
        let rows: String = (0..100_000).map(|row| format!("{row}:0 rbytes=1\n")).collect();
        assert_eq!(Stats::read(&[file("io.stat", &rows)]).io.len(), MAX_DEVICES);
        let table = FlatKeyedFile(HashMap::from([("a".to_owned(), u64::MAX), ("b".to_owned(), 1)]));
        assert_eq!(table.sum(&["a", "b"]), u64::MAX);
    }

    proptest! {
        #[test]
        fn any_text_is_taken(text in "[ -~\n]{0,200}", which in 0..FILES.len()) {
            let stats = Stats::read(&[file(FILES[which], &text)]);
            if let Some(pressure) = stats.cpu.pressure {
                prop_assert!(pressure.some.avg10 <= 100.0);
            }
        }
    }
}
