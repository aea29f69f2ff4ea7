//! Memory of the original and of its twin.

use std::{
    cell::Cell,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::{FileExt as _, MetadataExt as _},
};

use crate::sys::ptrace::Tracee;

/// The memory of a stopped process (`/proc/PID/mem`).
#[derive(Debug)]
pub(super) struct Memory(File);

/// A part of a twin's memory for the arguments of calls.
#[derive(Debug)]
pub(super) struct Scratch<'a> {
    thread: Tracee,
    syscall: u64,
    memory: &'a Memory,
    start: u64,
    used: Cell<u64>,
}

/// Enough for the filters of system calls and the descriptors, bytes.
const SIZE: u64 = 256 << 10;
/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

impl Memory {
    pub(super) fn of(pid: i32) -> io::Result<Self> {
        File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).map(Self)
    }

    pub(super) fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(bytes, address)
    }

    pub(super) fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, address)
    }

    /// Changes the arguments with which a process is listed, in the place where they are (proc_pid_cmdline(5)). What becomes too long
    /// for the place is cut off.
    pub(super) fn rename_arguments(&self, pid: i32, (from, to): &(String, String)) -> io::Result<()> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // Fields 48 and 49 are where the arguments begin and end; the name, which comes second, may have anything in it.
        let mut fields = stat.rsplit_once(')').unwrap_or_default().1.split_ascii_whitespace().skip(45);
        let mut field = || fields.next().and_then(|field| field.parse::<u64>().ok());
        let (Some(start), Some(end)) = (field(), field()) else {
            return Err(io::Error::other("the arguments of a process are at an unknown place"));
        };
        let mut bytes = vec![0; usize::try_from(end.saturating_sub(start)).unwrap_or_default()];
        self.read(start, &mut bytes)?;
        let length = bytes.len();
        let mut renamed = String::from_utf8_lossy(&bytes).replace(from, to).into_bytes();
        renamed.resize(length, 0);
        if let Some(last) = renamed.last_mut() {
            *last = 0;
        }
        self.write(start, &renamed)
    }

    pub(super) fn read_number(&self, address: u64) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }
}

/// A hexadecimal number in the status of a process (proc_pid_status(5)).
pub(super) fn number_of_status(pid: i32, name: &str) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    u64::from_str_radix(value.trim(), 16).map_err(io::Error::other)
}

/// A part of a process's memory that is mapped from a file.
#[derive(Debug)]
pub(in crate::process) struct Mapping {
    pub(in crate::process) start: u64,
    pub(in crate::process) length: u64,
    /// PROT_*.
    pub(super) protection: u64,
    /// Where in the file it begins, bytes.
    pub(in crate::process) offset: u64,
}

/// What a process has mapped of the file behind one of its descriptors.
pub(in crate::process) fn mappings(pid: i32, number: i32) -> io::Result<Vec<Mapping>> {
    let inode = fs::metadata(format!("/proc/{pid}/fd/{number}"))?.ino().to_string();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mapping = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (range, modes, offset) = (fields.next()?, fields.next()?, fields.next()?);
        // All files of the kernel's own in-memory file system, which memfds are of, have numbers of their own there.
        if fields.nth(1)? != inode || !fields.next()?.starts_with("/memfd:") {
            return None;
        }
        let number = |text| u64::from_str_radix(text, 16).ok();
        let (start, end) = range.split_once('-')?;
        let (start, end, offset) = (number(start)?, number(end)?, number(offset)?);
        let kinds = [('r', libc::PROT_READ), ('w', libc::PROT_WRITE), ('x', libc::PROT_EXEC)];
        let protection =
            kinds.iter().filter(|(mode, _)| modes.contains(*mode)).fold(0, |all, (_, one)| all | one);
        Some(Mapping { start, length: end - start, protection: protection as u64, offset })
    };
    Ok(maps.lines().filter_map(mapping).collect())
}

/// The numbers of a process's descriptors that lead to the same file as `number`.
pub(super) fn same_file(pid: i32, number: i32) -> io::Result<Vec<i32>> {
    let identity = |number: i32| {
        let file = fs::metadata(format!("/proc/{pid}/fd/{number}"))?;
        Ok::<_, io::Error>((file.dev(), file.ino()))
    };
    let wanted = identity(number)?;
    let numbers = fs::read_dir(format!("/proc/{pid}/fd"))?;
    let numbers = numbers.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(numbers.filter(|number| identity(*number).is_ok_and(|file| file == wanted)).collect())
}

/// The address of an instruction `syscall` of a process, in the code that the kernel gives to all processes (vdso(7)).
pub(in crate::process) fn syscall(pid: i32) -> io::Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let missing =
        || io::Error::other("the process has no instruction that calls the kernel where all have one");
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).ok_or_else(missing)?;
    let (start, rest) = line.split_once('-').ok_or_else(missing)?;
    let end = rest.split(' ').next().unwrap_or_default();
    let number = |text| u64::from_str_radix(text, 16).map_err(io::Error::other);
    let (start, end) = (number(start)?, number(end)?);
    let mut code = vec![0; usize::try_from(end - start).unwrap_or_default()];
    let mut memory = File::open(format!("/proc/{pid}/mem"))?;
    memory.seek(SeekFrom::Start(start))?;
    memory.read_exact(&mut code)?;
    let at = code.windows(SYSCALL.len()).position(|bytes| bytes == SYSCALL).ok_or_else(missing)?;
    Ok(start + at as u64)
}

impl<'a> Scratch<'a> {
    pub(super) fn map(thread: Tracee, syscall: u64, memory: &'a Memory) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let arguments = [0, SIZE, protection as u64, kind as u64, u64::MAX, 0];
        let start = thread.call(syscall, libc::SYS_mmap, arguments)?;
        Ok(Self { thread, syscall, memory, start, used: Cell::new(0) })
    }

    /// Copies bytes to the twin, and returns their address there.
    pub(super) fn put(&self, bytes: &[u8]) -> io::Result<u64> {
        let place = self.used.get();
        if bytes.len() as u64 > SIZE - place {
            return Err(io::Error::other("the arguments of a twin's calls take too much memory"));
        }
        self.used.set((place + bytes.len() as u64).next_multiple_of(16));
        self.memory.write(self.start + place, bytes)?;
        Ok(self.start + place)
    }

    pub(super) fn memory(&self) -> &Memory {
        self.memory
    }

    pub(super) fn unmap(self) -> io::Result<()> {
        self.thread.call(self.syscall, libc::SYS_munmap, [self.start, SIZE, 0, 0, 0, 0]).map(drop)
    }
}
