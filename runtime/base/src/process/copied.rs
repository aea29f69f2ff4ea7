//! The pages of a file that a process has copies of, and the same copies made ahead of time.
//!
//! A page of a private mapping is copied when it is first written to, each by a fault of its own. A process that is known to write
//! to many pages has them copied by few calls instead (madvise(2), MADV_POPULATE_WRITE). It has to make these calls itself, so one
//! of its threads is made to (ptrace(2)). The content of the pages does not change, and the other threads run meanwhile.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
};

use nix::sys::ptrace::Options;
use serde::{Deserialize, Serialize};

use super::twin::memory::{Mapping, mappings, syscall};
use crate::sys::ptrace::Tracee;

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Bytes that the kernel says of a page (`/proc/PID/pagemap`, the kernel's admin-guide/mm/pagemap.rst).
const ENTRY: usize = 8;
/// The page is in memory.
const PRESENT: u64 = 1 << 63;
/// The page is one of the file, and no copy.
const OF_FILE: u64 = 1 << 61;
/// How much is read at once, bytes.
const CHUNK: usize = 64 << 10;

/// Pages of a file that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRange {
    /// The number of the first page; pages have 4096 bytes.
    pub first: u64,
    /// How many pages there are.
    pub count: u64,
}

impl PageRange {
    fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }
}

/// The pages that the process `pid` has copies of, of the file behind its descriptor `number`, in order. Pages between two of them
/// are included if there are no more than `gap`.
///
/// # Errors
/// The process has ended, or this one may not read its memory.
pub fn copied_pages(pid: u32, number: i32, gap: u64) -> io::Result<Vec<PageRange>> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut ranges: Vec<PageRange> = Vec::new();
    let mut parts = mappings(pid.cast_signed(), number)?;
    parts.sort_by_key(|mapping| mapping.offset);
    for Mapping { start, length, offset, .. } in parts {
        let mut entries = vec![0; CHUNK];
        let (from, pages) = (start / PAGE, length / PAGE);
        let mut done = 0;
        while done < pages {
            let wanted = usize::try_from(pages - done).unwrap_or(CHUNK).saturating_mul(ENTRY).min(CHUNK);
            pagemap.read_exact_at(&mut entries[..wanted], (from + done) * ENTRY as u64)?;
            for (entry, page) in entries[..wanted].as_chunks().0.iter().zip(offset / PAGE + done..) {
                let entry = u64::from_ne_bytes(*entry);
                if entry & PRESENT == 0 || entry & OF_FILE != 0 {
                    continue;
                }
                match ranges.last_mut() {
                    Some(last) if page <= last.end() + gap => last.count = page + 1 - last.first,
                    _ => ranges.push(PageRange { first: page, count: 1 }),
                }
            }
            done += (wanted / ENTRY) as u64;
        }
    }
    Ok(ranges)
}

/// Has the process `pid` make copies of pages of the file behind its descriptor `number`, as far as it has them mapped. Blocks until
/// they are made.
///
/// # Errors
/// The process has ended, cannot be traced, has no memory for the copies, or its kernel is older than 5.14. It runs on as before.
pub fn copy_ahead(pid: u32, number: i32, ranges: &[PageRange]) -> io::Result<()> {
    let pid = pid.cast_signed();
    let (parts, syscall) = (mappings(pid, number)?, syscall(pid)?);
    let thread = Tracee::seize(thread(pid)?, Options::PTRACE_O_TRACESYSGOOD)?;
    let state = match thread.interrupted() {
        Ok(state) => state,
        Err(error) => {
            thread.detach()?;
            return Err(error);
        }
    };
    let calls = ranges.iter().flat_map(|range| parts.iter().filter_map(|part| overlap(part, *range)));
    let mut made = calls.map(|(start, length)| {
        let arguments = [start, length, libc::MADV_POPULATE_WRITE as u64, 0, 0, 0];
        thread.call(syscall, libc::SYS_madvise, arguments).map(drop)
    });
    let made = made.try_for_each(|made| made);
    let restored = thread.go_on(&state).and(thread.detach());
    made.and(restored)
}

/// Where the pages are in the process's memory, and how many bytes they take there.
fn overlap(part: &Mapping, range: PageRange) -> Option<(u64, u64)> {
    let (first, end) = (part.offset / PAGE, (part.offset + part.length) / PAGE);
    let (from, to) = (range.first.max(first), range.end().min(end));
    (from < to).then(|| (part.start + (from - first) * PAGE, (to - from) * PAGE))
}

/// A thread that is not the one that the process began with, if there is another.
fn thread(pid: i32) -> io::Result<i32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))?;
    let threads = threads.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(threads.filter(|thread| *thread != pid).min().unwrap_or(pid))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};

    use super::*;
    use crate::{
        memfd,
        process::{Spawn, Stdio},
    };

    /// Maps descriptor 9 privately, writes to one page, and prints how many pages it has and its faults, for each line that it reads.
    const PROGRAM: &str = r#"
import mmap, resource, sys
memory = mmap.mmap(9, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
memory[7 * 4096] = 1
print("ready", flush=True)
for line in sys.stdin:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for page in range(16, 272): memory[page * 4096 + 1] = memory[page * 4096]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    print(after - before, sum(memory[page * 4096] for page in range(16, 272)), flush=True)
"#;

    #[tokio::test]
    async fn pages_are_copied_ahead() {
        let file = File::from(memfd::sparse(2 << 20).unwrap());
        for page in 0..512 {
            file.write_all_at(&[3; 4096], page * PAGE).unwrap();
        }
        let (stdin, mut to_child) = io::pipe().unwrap();
        let (from_child, stdout) = io::pipe().unwrap();
        let child = Spawn::new("python3")
            .args(["-c", PROGRAM])
            .fd(file.try_clone().unwrap().into(), 9)
            .stdin(Stdio::Fd(stdin.into()))
            .stdout(Stdio::Fd(stdout.into()))
            .start()
            .unwrap();
        let mut lines = BufReader::new(from_child).lines().map(Result::unwrap);
        assert_eq!(lines.next().unwrap(), "ready");
        let one = [PageRange { first: 7, count: 1 }];
        assert_eq!(copied_pages(child.pid(), 9, 0).unwrap(), one);

        let wanted = [PageRange { first: 16, count: 256 }, PageRange { first: 500, count: 1 << 40 }];
        // On a thread, as where it is used: it belongs to none that the program waits for.
        let pid = child.pid();
        std::thread::spawn(move || copy_ahead(pid, 9, &wanted)).join().unwrap().unwrap();
        let copied = [one[0], PageRange { first: 16, count: 256 }, PageRange { first: 500, count: 12 }];
        assert_eq!(copied_pages(pid, 9, 0).unwrap(), copied);
        assert_eq!(copied_pages(pid, 9, 8).unwrap(), [PageRange { first: 7, count: 265 }, copied[2]]);
        to_child.write_all(b"go\n").unwrap();
        let line = lines.next().unwrap();
        let (faults, sum) = line.split_once(' ').unwrap();
        assert!(faults.parse::<u64>().unwrap() < 20, "{line}");
        assert_eq!(sum, "768", "the content has changed");
        child.kill().await.unwrap();
        assert!(copy_ahead(pid, 9, &one).is_err());
    }
}
