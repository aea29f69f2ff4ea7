//! Gives processes the terminal itself in the place of `/dev/tty`, before CRIU looks at them.
//!
//! Opening `/dev/tty` opens the controlling terminal (tty(4)), so a descriptor of the terminal is as good. CRIU 4.1
//! saves an open `/dev/tty` only if the first terminal of the same session that it finds is one of the same process, and
//! if the session's leader is in the foreground (`tty_verify_ctty` in criu/tty.c). It refuses others ("ctty
//! inheritance detected"): dash and busybox, which keep `/dev/tty` open, while they run a program in the foreground, and
//! in a terminal whose master another process of the container has (tmux, script, expect).

use std::{fs, os::unix::fs::MetadataExt as _};

use nix::unistd::Pid;
use rustix::fs::{major, makedev};

use super::{
    CriuError,
    duplicate::{self, Duplicate},
    rpc,
};
use crate::{cgroup::Cgroup, console, reaper::Reaper, sys};

/// Major numbers of the slaves of pseudoterminals (the kernel's Documentation/admin-guide/devices.txt).
const SLAVES: std::ops::RangeInclusive<u32> = 136..=143;
/// Major number of `/dev/tty`, whose minor number is 0.
const TTYAUX: u32 = 5;
/// The status flags that descriptors of one open file share, other than the access mode.
const SHARED: i32 = libc::O_APPEND | libc::O_ASYNC | libc::O_NONBLOCK;

/// A descriptor of a process.
#[derive(Debug)]
struct Open {
    number: i32,
    device: u64,
    /// As in /proc/PID/fdinfo (proc_pid_fdinfo(5)).
    flags: i32,
}

/// The descriptors for `/dev/tty` of a frozen process, and that of the same terminal that can be in the place of each.
/// A process that has ended has none.
pub(super) fn replaceable(pid: Pid) -> Vec<Duplicate> {
    let open = open_devices(pid);
    let (ttys, others): (Vec<_>, Vec<_>) =
        open.into_iter().partition(|open| open.device == makedev(TTYAUX, 0));
    let slaves: Vec<_> = others.into_iter().filter(|open| SLAVES.contains(&major(open.device))).collect();
    if ttys.is_empty() || slaves.is_empty() {
        return Vec::new();
    }
    let Ok(process) = sys::open_process(pid) else { return Vec::new() };
    let terminal = |open: &Open| sys::terminal::device_of_process(&process, open.number).ok();
    let stands_for = |slave: &&Open, tty: &Open| {
        let terminal_of_tty = terminal(tty);
        is_usable_as(slave.flags, tty.flags)
            && terminal_of_tty.is_some()
            && terminal(slave) == terminal_of_tty
    };
    ttys.iter()
        .filter_map(|tty| {
            let slave = slaves.iter().find(|slave| stands_for(slave, tty))?;
            let closed_on_exec = tty.flags & libc::O_CLOEXEC != 0;
            Some(Duplicate { pid, from: slave.number, to: tty.number, closed_on_exec })
        })
        .collect()
}

/// Replaces descriptors in a frozen container. Its processes are frozen afterwards; nothing of them has run. What could
/// not be replaced is left to CRIU, which may refuse it.
///
/// # Errors
/// The program that does it cannot be started, or the container cannot be frozen again.
pub(super) async fn replace(reaper: &Reaper, cgroup: &Cgroup, wanted: &[Duplicate]) -> Result<(), CriuError> {
    if wanted.is_empty() {
        return Ok(());
    }
    let (_, exit) = rpc::spawn_own(reaper, duplicate::NAME, &duplicate::arguments(cgroup, wanted))?;
    let exit = exit.await.ok();
    // Where the program has failed or was killed, the container may run.
    cgroup.freeze().await?;
    if exit.is_none_or(|status| status.code() != 0) {
        console::say(&format!("a terminal was not replaced: the program {}", rpc::how(exit)));
    }
    Ok(())
}

/// Whether a descriptor can be in the place of another one with other flags.
fn is_usable_as(flags: i32, wanted: i32) -> bool {
    let mode = flags & libc::O_ACCMODE;
    flags & SHARED == wanted & SHARED && (mode == libc::O_RDWR || mode == wanted & libc::O_ACCMODE)
}

fn open_devices(pid: Pid) -> Vec<Open> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let open = entries.flatten().filter_map(|entry| {
        // Files of other file systems, whose servers may be frozen, are not asked.
        if !fs::read_link(entry.path()).ok()?.starts_with("/dev") {
            return None;
        }
        let number = entry.file_name().to_str()?.parse().ok()?;
        let device = fs::metadata(entry.path()).ok()?.rdev();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok()?;
        Some(Open { number, device, flags: flags_of(&info)? })
    });
    open.collect()
}

fn flags_of(info: &str) -> Option<i32> {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    i32::from_str_radix(flags.trim(), 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_of_a_descriptor() {
        assert_eq!(
            flags_of("pos:\t0\nflags:\t02100002\nmnt_id:\t25\n"),
            Some(libc::O_RDWR | libc::O_CLOEXEC | 0o100_000)
        );
        assert_eq!(flags_of("pos:\t0\n"), None);
    }

    #[test]
    fn a_descriptor_is_usable_as_one_that_can_do_less() {
        assert!(is_usable_as(libc::O_RDWR, libc::O_RDWR | libc::O_CLOEXEC));
        assert!(is_usable_as(libc::O_RDWR, libc::O_RDONLY));
        assert!(is_usable_as(libc::O_WRONLY, libc::O_WRONLY));
        assert!(!is_usable_as(libc::O_RDONLY, libc::O_RDWR));
        assert!(!is_usable_as(libc::O_RDWR | libc::O_NONBLOCK, libc::O_RDWR));
    }

    #[test]
    fn a_process_without_such_descriptors_has_none_to_replace() {
        assert_eq!(replaceable(nix::unistd::getpid()), []);
        assert_eq!(replaceable(Pid::from_raw(i32::MAX)), []);
    }
}
