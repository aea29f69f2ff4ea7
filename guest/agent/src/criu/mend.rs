//! What CRIU leaves behind in a container that it was dumping when it was killed, and how that is made good.
//!
//! It holds the processes by ptrace, runs code of its own in one after the other, and has locked and holds their
//! connections where it may save them. The kernel lets go of what a tracer held, and CRIU's code gives a process
//! back when nobody speaks to it any more. Connections and the freezer are left to this. One thing cannot be made
//! good: while CRIU has a process make a single system call, some bytes of its program and its registers are CRIU's. Most
//! often it dies of that at once (SIGTRAP), which its parent is told as of any crash. If that was the init, or one is found
//! alive with such a program, the container ends as a whole.

use std::{fs, os::unix::fs::FileExt as _, path::Path};

use nix::{
    sys::socket::{setsockopt, sockopt::TcpRepair},
    unistd::Pid,
};
use procfs::process::{MMPermissions, MMapPath, Process};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::{CriuError, network, source::DumpSource};
use crate::console;

/// What CRIU puts at the start of executable memory to make a system call (`code_syscall` of its compel/arch/x86): the
/// call, and breakpoints.
const CALL: [u8; 8] = [0x0f, 0x05, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc];
/// What it puts behind that while the call makes the memory for the rest of its code (`MEMFD_FNAME`).
const NAME: &[u8; 8] = b"CRIUMFD\0";

/// Makes good what can be, after CRIU has died in a dump that has written `log`, and returns what there is to tell of it.
/// The processes are left frozen, or running.
pub(super) async fn mend(
    source: &DumpSource<'_>,
    frozen: bool,
    tcp: bool,
    log: &Path,
    died: CriuError,
) -> CriuError {
    // The failure to tell is CRIU's.
    let say = |err: &dyn std::error::Error| console::report(err);
    if let Some(run) = run(log)
        && let Err(err) = network::unlock(&run)
    {
        say(&err);
    }
    let pids = source.cgroup.pids().unwrap_or_else(|err| {
        say(&err);
        Vec::new()
    });
    if tcp {
        pids.iter().for_each(|pid| release_connections(*pid));
    }
    let harmed = pids.iter().any(|pid| has_foreign_code(*pid));
    let left = if frozen { source.cgroup.freeze().await } else { source.cgroup.thaw() };
    if let Err(err) = left {
        say(&err);
    }
    if harmed || is_ending(source.init.pid()) { CriuError::Corrupted { died: Box::new(died) } } else { died }
}

/// What CRIU calls itself in its log: "(00.001) CRIU run id = 0b7b3f0c-...".
fn run(log: &Path) -> Option<String> {
    let log = fs::read_to_string(log).ok()?;
    log.lines().find_map(|line| line.split_once("CRIU run id = ")).map(|(_, id)| id.trim().to_owned())
}

/// Takes the connections of a process out of the state in which CRIU reads them and nothing moves.
fn release_connections(pid: Pid) {
    let Some(process) = rustix::process::Pid::from_raw(pid.as_raw()) else { return };
    let Ok(process) = pidfd_open(process, PidfdFlags::empty()) else { return };
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        let is_socket =
            fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"));
        let number = entry.file_name().to_string_lossy().parse();
        if is_socket
            && let Ok(number) = number
            && let Ok(socket) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())
        {
            // One that is no connection says so.
            let _ = setsockopt(&socket, TcpRepair, &0);
        }
    }
}

/// A process is there for a while after it has begun to end, the first of a namespace until all others are gone.
fn is_ending(pid: Pid) -> bool {
    /// Of the kernel's include/linux/sched.h, in /proc/PID/stat.
    const PF_EXITING: u32 = 4;
    Process::new(pid.as_raw())
        .and_then(|process| process.stat())
        .map_or(true, |stat| stat.flags & PF_EXITING != 0)
}

/// Whether there are bytes of CRIU's where the program of a process should be. One that has ended has none.
fn has_foreign_code(pid: Pid) -> bool {
    let Ok(process) = Process::new(pid.as_raw()) else { return false };
    let (Ok(maps), Ok(memory)) = (process.maps(), process.mem()) else { return false };
    maps.into_iter()
        .filter(|map| map.perms.contains(MMPermissions::EXECUTE) && map.pathname != MMapPath::Vsyscall)
        .any(|map| {
            let mut start = [0; 16];
            memory.read_exact_at(&mut start, map.address.0).is_ok()
                && (start.starts_with(&CALL) || start.ends_with(NAME))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_its_own_code_only() {
        assert!(!has_foreign_code(nix::unistd::getpid()));
    }

    #[test]
    fn the_run_has_a_name() {
        let log = tempfile::NamedTempFile::new().unwrap();
        fs::write(log.path(), "(00.000) Version: 4.1.1\n(00.001) CRIU run id = 12-ab\n(00.002) x\n").unwrap();
        assert_eq!(run(log.path()).as_deref(), Some("12-ab"));
        assert_eq!(run(Path::new("/nowhere")), None);
    }
}
