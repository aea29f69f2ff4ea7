//! One fake VM, from the transfer of its sockets to the end of its agent.

use std::{
    fs,
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use command_fds::{CommandFdExt, FdMapping};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{Signal, kill},
        socket::{Shutdown, shutdown},
    },
    unistd::Pid,
};

use super::{Behaviour, DEADLINE, Handed, Shared, hostile, monitor::Monitor};
use crate::{inventory, sys};

/// The agent finds its channel under this number.
const CHANNEL_FD: i32 = 3;

/// Runs a VM until it ends: by its agent, by its monitor, or because fake-qemu was killed.
pub(super) fn run(
    mut qemu: UnixStream,
    behaviour: Behaviour,
    agent: &Path,
    disks: &Path,
    shared: &Arc<Shared>,
) -> Result<()> {
    let Handed { monitor, mut console, channel } = receive(&qemu)?;
    match behaviour {
        Behaviour::Dies(words) => return end(&mut qemu, 1, words),
        Behaviour::Babbles(bytes) => {
            (&monitor).write_all(bytes)?;
            return until_killed(&qemu);
        }
        _ => {}
    }
    fs::create_dir(disks).with_context(|| format!("cannot make {}", disks.display()))?;
    let monitor = Arc::new(Monitor::new(monitor, behaviour, disks.to_owned(), Arc::clone(shared))?);
    let guest = match behaviour {
        Behaviour::Silent => {
            shared.hangs();
            Guest::NoAgent(channel)
        }
        Behaviour::Speaks(bytes) => {
            let mut channel = UnixStream::from(channel);
            channel.write_all(bytes)?;
            Guest::NoAgent(channel.into())
        }
        Behaviour::Hostile(hostility) => {
            hostile::serve(channel.try_clone()?, hostility);
            Guest::NoAgent(channel)
        }
        Behaviour::Floods(bytes) => {
            // A reader that has closed its end needs no more bytes.
            let _closed = console.write_all(&vec![b'#'; bytes]);
            Guest::NoAgent(channel)
        }
        _ => Guest::Agent(Arc::new(Mutex::new(start(agent, channel, &console, disks)?))),
    };
    drop(console);
    let agent = guest.pid();
    shared.agents.lock().expect("the lock is not poisoned").extend(agent);
    let watcher = std::thread::spawn({
        let (guest, qemu, monitor) = (guest.clone()?, qemu.try_clone()?, Arc::clone(&monitor));
        move || {
            let dead = until_killed(&qemu);
            // A killed process writes no last words.
            monitor.hang_up();
            guest.kill()?;
            dead
        }
    });
    let served = monitor.serve(&guest);
    shared.agents.lock().expect("the lock is not poisoned").retain(|&pid| Some(pid) != agent);
    let (code, words) = served?;
    guest.kill()?;
    end(&mut qemu, code, words)?;
    watcher.join().expect("waiting does not panic")?;
    fs::remove_dir_all(disks).with_context(|| format!("cannot remove {}", disks.display()))
}

/// The content of the VM.
#[derive(Debug)]
pub(super) enum Guest {
    Agent(Arc<Mutex<Child>>),
    /// Keeps the channel open.
    NoAgent(OwnedFd),
}

impl Guest {
    fn clone(&self) -> Result<Self> {
        Ok(match self {
            Self::Agent(child) => Self::Agent(Arc::clone(child)),
            Self::NoAgent(channel) => Self::NoAgent(channel.try_clone()?),
        })
    }

    /// The agent's outer process.
    fn pid(&self) -> Option<u32> {
        let Self::Agent(child) = self else { return None };
        Some(child.lock().expect("the lock is not poisoned").id())
    }

    /// Stops the agent, as if it hung; the agent's containers continue to run.
    ///
    /// # Errors
    /// The VM has no agent.
    pub(super) fn stop(&self) -> Result<()> {
        let outer = self.pid().context("no agent to stop")?;
        let inner = inventory::descendants(outer)?.first().map_or(outer, |process| process.pid);
        kill(Pid::from_raw(inner.cast_signed()), Signal::SIGSTOP).context("cannot stop an agent")
    }

    /// Kills all processes of the guest at once, and waits for them.
    ///
    /// # Errors
    /// A part of the guest is left.
    pub(super) fn kill(&self) -> Result<()> {
        let child = match self {
            Self::Agent(child) => child,
            Self::NoAgent(channel) => {
                // A hostile agent has a descriptor of its own. The channel may be closed already.
                let _closed = shutdown(channel.as_raw_fd(), Shutdown::Both);
                return Ok(());
            }
        };
        let mut child = child.lock().expect("the lock is not poisoned");
        if child.try_wait().context("cannot wait for an agent")?.is_none() {
            // The end of pid 1 of the guest ends all of the guest, and then the outer process that waits for
            // it.
            let inner = inventory::descendants(child.id())?;
            let pid = inner.first().map_or(child.id(), |process| process.pid);
            let _gone = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
            // The outer process may be stopped.
            let _gone = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGCONT);
            child.wait().context("cannot wait for an agent")?;
        }
        // An agent that was killed during its start could not do this itself.
        clear_cgroups(&format!("machinen-agent-{}", child.id()))
    }
}

/// Removes control groups when the last process has left them: a process that was being forked may still
/// appear and end.
fn clear_cgroups(name: &str) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    for group in inventory::cgroups(name) {
        // The hierarchies of v1 have no such file, and no process of the guest.
        let Ok(events) = fs::File::open(group.join("cgroup.events")) else { continue };
        let _gone = fs::write(group.join("cgroup.kill"), "1");
        while fs::read_to_string(group.join("cgroup.events")).is_ok_and(|text| text.contains("populated 1")) {
            let left = PollTimeout::try_from(end.saturating_duration_since(Instant::now()))?;
            let mut changed = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
            let polled = poll(&mut changed, left).context("cannot watch a control group")?;
            ensure!(polled > 0, "{} has processes after {DEADLINE:?}", group.display());
        }
    }
    inventory::remove_cgroups(name)
}

fn receive(qemu: &UnixStream) -> Result<Handed> {
    let mut byte = [0];
    let (_, fds) = sys::receive_with_fds(qemu, &mut byte).context("cannot receive a VM's sockets")?;
    let [monitor, console, channel] = <[OwnedFd; 3]>::try_from(fds).ok().context("not three sockets")?;
    let mut arguments = Vec::new();
    (&*qemu).read_to_end(&mut arguments).context("cannot receive a VM's arguments")?;
    Ok(Handed { monitor: monitor.into(), console: console.into(), channel })
}

/// Sends fake-qemu its exit code and last words.
fn end(qemu: &mut UnixStream, code: u8, words: &str) -> Result<()> {
    // fake-qemu may have been killed in the meantime.
    let _killed = qemu.write_all(&[code]).and_then(|()| qemu.write_all(words.as_bytes()));
    qemu.shutdown(std::net::Shutdown::Write).or_else(|error| match error.kind() {
        std::io::ErrorKind::NotConnected => Ok(()),
        _ => Err(error).context("cannot end a VM"),
    })
}

/// Returns when fake-qemu has ended, for any reason.
fn until_killed(qemu: &UnixStream) -> Result<()> {
    let mut fds = [PollFd::new(qemu.as_fd(), PollFlags::empty())];
    // fake-qemu has shut its half down before, so a read returns at once; the hang-up comes with its end.
    poll(&mut fds, PollTimeout::NONE).context("cannot watch a VM")?;
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "a fake VM supervises its own agent")]
fn start(agent: &Path, channel: OwnedFd, console: &UnixStream, disks: &Path) -> Result<Child> {
    let mut command = Command::new(agent);
    command.args(["--serial-fd", &CHANNEL_FD.to_string(), "--disk-dir"]).arg(disks).env_clear();
    let console = || -> Result<Stdio> { Ok(OwnedFd::from(console.try_clone()?).into()) };
    command.stdin(Stdio::null()).stdout(console()?).stderr(console()?);
    let mapping = FdMapping { parent_fd: channel, child_fd: CHANNEL_FD };
    command.fd_mappings(vec![mapping]).context("cannot pass the channel on")?;
    command.spawn().with_context(|| format!("cannot run {}", agent.display()))
}
