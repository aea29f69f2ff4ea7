//! Repairs a container after CRIU was killed while it dumped the container.
//!
//! CRIU holds the processes by ptrace and runs code of its own in one after the other. If it may save
//! connections, it has locked and holds them. The kernel releases what a tracer held, and CRIU's code
//! restores its process when the connection to CRIU is closed. Connections and the freezer are repaired here.
//! One thing cannot be repaired: while CRIU makes a process execute a single system call, some bytes of the
//! process's program and its registers are CRIU's. Most often the process dies of that at once (SIGTRAP),
//! which its parent sees like any crash. If that process was the init, or a process with such a program is
//! found alive, the whole container ends.

use std::{fs, os::unix::fs::FileExt as _, path::Path};

use nix::{
    sys::socket::{setsockopt, sockopt::TcpRepair},
    unistd::Pid,
};
use procfs::process::{MMPermissions, MMapPath, Process};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use tokio::task::spawn_blocking;

use super::{CriuError, dump::DumpSource, network};
use crate::console;

/// CRIU writes this at the start of executable memory to make a system call (`code_syscall` of its
/// compel/arch/x86): the call, and breakpoints.
const CALL: [u8; 8] = [0x0f, 0x05, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc];
/// CRIU writes this behind the call while the call allocates memory for the rest of its code (`MEMFD_FNAME`).
const NAME: &[u8; 8] = b"CRIUMFD\0";

/// Repairs the container after CRIU has died in a dump that has written `log`, and returns the error to
/// report. The processes are left frozen, or running.
pub(super) async fn recover(
    source: &DumpSource<'_>,
    frozen: bool,
    tcp: bool,
    log: &Path,
    died: CriuError,
) -> CriuError {
    // CRIU's failure is the error to return.
    if let Some(run) = run(log)
        && let Err(err) = network::unlock(&run)
    {
        console::report(&err);
    }
    let pids = source.cgroup.pids().unwrap_or_else(|err| {
        console::report(&err);
        Vec::new()
    });
    if tcp {
        pids.iter().for_each(|pid| release_connections(*pid));
    }
    // A program may be a file of a volume, and the agent's main thread passes on what reads it.
    let corrupted = spawn_blocking(move || pids.iter().any(|pid| has_criu_code(*pid))).await;
    let corrupted = corrupted.unwrap_or(true);
    let left = if frozen { source.cgroup.freeze().await } else { source.cgroup.thaw() };
    if let Err(err) = left {
        console::report(&err);
    }
    if corrupted || is_ending(source.init.pid()) {
        CriuError::Corrupted { died: Box::new(died) }
    } else {
        died
    }
}

/// CRIU's run id in its log: "(00.001) CRIU run id = 0b7b3f0c-...".
fn run(log: &Path) -> Option<String> {
    let log = fs::read_to_string(log).ok()?;
    log.lines().find_map(|line| line.split_once("CRIU run id = ")).map(|(_, id)| id.trim().to_owned())
}

/// Ends the repair mode of a process's connections, in which CRIU reads them and no data moves.
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
            // A socket that is not a connection refuses this.
            let _ = setsockopt(&socket, TcpRepair, &0);
        }
    }
}

/// Whether a process is ending: it exists for a while then, the first one of a namespace until all others are
/// gone.
fn is_ending(pid: Pid) -> bool {
    /// A flag of the kernel's include/linux/sched.h, in /proc/PID/stat.
    const PF_EXITING: u32 = 4;
    Process::new(pid.as_raw())
        .and_then(|process| process.stat())
        .map_or(true, |stat| stat.flags & PF_EXITING != 0)
}

/// Whether CRIU's bytes are where a process's program should be. A process that has ended has none.
fn has_criu_code(pid: Pid) -> bool {
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
        assert!(!has_criu_code(nix::unistd::getpid()));
    }

    #[test]
    fn the_run_id_is_found() {
        let log = tempfile::NamedTempFile::new().unwrap();
        fs::write(log.path(), "(00.000) Version: 4.1.1\n(00.001) CRIU run id = 12-ab\n(00.002) x\n").unwrap();
        assert_eq!(run(log.path()).as_deref(), Some("12-ab"));
        assert_eq!(run(Path::new("/nowhere")), None);
    }
}
