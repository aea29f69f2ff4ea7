//! Processor time of processes, running and ended.
//!
//! The clock of a running process is read in nanoseconds. The time of an ended process is in its parent's
//! account of the children that the parent has waited for, which the kernel keeps exactly and shows in
//! hundredths of a second. The keeper waits for every orphan, so nothing is lost.

use std::{fs, time::Duration};

use anyhow::{Context, Result};
use machinen_integration::containerd::Containerd;
use nix::{
    sys::resource::{UsageWho, getrusage},
    time::{clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};

/// USER_HZ, the unit of times in /proc (proc_pid_stat(5)).
const HZ: u64 = 100;

/// The processor time of a running process itself.
pub(crate) fn own(pid: u32) -> Result<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?))
        .with_context(|| format!("no clock of process {pid}"))?;
    Ok(clock_gettime(clock).with_context(|| format!("cannot read the clock of process {pid}"))?.into())
}

/// The processor time of the children that a process has waited for, and of their children.
pub(crate) fn ended_children(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let (_, tail) = stat.rsplit_once(')').with_context(|| format!("odd {path}"))?;
    // cutime and cstime are fields 16 and 17; the tail begins with field 3.
    let ticks = tail.split_whitespace().skip(13).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    Ok(Duration::from_millis(ticks * 1000 / HZ))
}

/// The cost so far of containers that have been removed: containerd, shims, VMs, `ctr`.
pub(crate) fn total(containerd: &Containerd) -> Result<Duration> {
    let clients = getrusage(UsageWho::RUSAGE_CHILDREN).context("cannot ask for the use of children")?;
    let seconds = |time: nix::sys::time::TimeVal| {
        Duration::new(time.tv_sec().unsigned_abs(), 0) + Duration::from_micros(time.tv_usec().unsigned_abs())
    };
    let clients = seconds(clients.user_time()) + seconds(clients.system_time());
    let served = own(containerd.pid())? + ended_children(containerd.pid())?;
    Ok(clients + served + ended_children(containerd.keeper_pid())?)
}
