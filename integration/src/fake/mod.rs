//! A VMM without a machine: it takes QEMU's arguments and speaks QEMU's monitor protocol, and its guest is
//! the real agent as an ordinary process in namespaces of its own. A start takes a tenth of a second, and the
//! VMM misbehaves on demand.
//!
//! ```text
//!   shim ──exec──> fake-qemu (no privileges) ──monitor, console, channel, argv──> FakeVmm, in the test
//!                      └── lives as long as the VM <──exit code────────────────── │ one thread a VM
//!                                                                                 └── machinen-agent (root)
//! ```

mod hostile;
mod monitor;
mod vm;

use std::{
    fs::{self, File},
    os::{
        fd::OwnedFd,
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use nix::{
    sched::{CloneFlags, setns, unshare},
    unistd::Pid,
};

pub use hostile::Hostility;

use crate::{
    containerd::Containerd,
    inventory, paths,
    private_host::PrivateHost,
    setup::{Setup, Value},
};

/// The path of the test's socket, next to the program.
pub const SOCKET: &str = "vmm.sock";

/// Longest that VMs may take to end after their shims.
const DEADLINE: Duration = Duration::from_secs(20);

/// The behaviour of the VMs that start next.
#[derive(Debug, Clone, Copy)]
pub enum Behaviour {
    /// Behaves like QEMU, with the real agent in it.
    Well,
    /// Ends before the greeting, with these last words.
    Dies(&'static str),
    /// Greets as this major version of QEMU.
    GreetsAs(u32),
    /// Writes this to the monitor instead of a greeting.
    Babbles(&'static [u8]),
    /// Refuses this command of the monitor.
    Refuses(&'static str),
    /// Refuses this command of the monitor once: when it is given the command for the nth time.
    RefusesOnce(&'static str, usize),
    /// Ends when it is given this command.
    DiesOn(&'static str),
    /// Does not answer this command, nor any later one.
    HangsOn(&'static str),
    /// Stops its agent, and with it all of the agent's answers, when it is given this command.
    StopsAgentOn(&'static str),
    /// Has no agent in it.
    Silent,
    /// Has no agent; writes this to the channel instead.
    Speaks(&'static [u8]),
    /// Has an agent that lies to the host.
    Hostile(Hostility),
    /// Writes this number of bytes to its console, and has no agent in it.
    Floods(usize),
}

/// The service in the test that runs fake VMs.
#[derive(Debug)]
pub struct FakeVmm {
    dir: PathBuf,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    behaviour: Mutex<Behaviour>,
    running: Mutex<usize>,
    fewer: Condvar,
    ended: AtomicBool,
    /// The number of VMs that have come to the point where they hang.
    hanging: Mutex<usize>,
    more: Condvar,
    /// The outer processes of the running agents.
    agents: Mutex<Vec<u32>>,
}

impl Shared {
    fn hangs(&self) {
        *self.hanging.lock().expect("the lock is not poisoned") += 1;
        self.more.notify_all();
    }
}

impl FakeVmm {
    /// Waits for VMs of this containerd's shims; see [`FakeVmm::setup`].
    ///
    /// # Errors
    /// The files cannot be made, or a program is not built.
    pub fn start(containerd: &Containerd) -> Result<Self> {
        Self::start_in(containerd.root(), None)
    }

    /// Waits for VMs of a private host.
    ///
    /// # Errors
    /// The files cannot be made, or a program is not built.
    pub fn start_on(host: &PrivateHost) -> Result<Self> {
        let mounts = format!("/proc/{}/ns/mnt", host.server());
        let mounts = File::open(&mounts).with_context(|| format!("cannot open {mounts}"))?;
        Self::start_in(host.root(), Some(mounts))
    }

    /// `mounts`: the mount namespace in which the disks are.
    fn start_in(root: &Path, mounts: Option<File>) -> Result<Self> {
        let dir = root.join("fake");
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let program = dir.join("qemu-system-x86_64");
        fs::copy(paths::own_program("fake-qemu")?, &program).context("cannot copy fake-qemu")?;
        let agent = paths::agent()?;
        let listener = UnixListener::bind(dir.join(SOCKET)).context("cannot listen for VMs")?;
        // The user that QEMU runs as must be able to enter this directory.
        for (path, mode) in [(root, 0o711), (&dir, 0o711), (&program, 0o755), (&dir.join(SOCKET), 0o777)] {
            fs::set_permissions(path, fs::Permissions::from_mode(mode))
                .with_context(|| format!("cannot set the mode of {}", path.display()))?;
        }
        let shared = Arc::new(Shared {
            behaviour: Mutex::new(Behaviour::Well),
            running: Mutex::new(0),
            fewer: Condvar::new(),
            ended: AtomicBool::new(false),
            hanging: Mutex::new(0),
            more: Condvar::new(),
            agents: Mutex::default(),
        });
        let acceptor = std::thread::spawn({
            let (shared, dir) = (Arc::clone(&shared), dir.clone());
            let mounts = Arc::new(mounts);
            move || accept(&listener, &shared, &dir, &agent, &mounts)
        });
        Ok(Self { dir, shared, acceptor: Some(acceptor) })
    }

    /// A configuration whose QEMU is this VMM. Rootdisks are below the containerd's own directory.
    pub fn setup(&self) -> Setup {
        Setup::new()
            .set("vm", "qemu", Value::path(&self.dir.join("qemu-system-x86_64")))
            .set("vm", "qemu_files", Value::paths(&[&self.dir.join(SOCKET)]))
            .set("vm", "channel", Value::text("serial"))
            .set("template", "mode", Value::text("off"))
            .set("rootdisk", "dir", Value::path(&self.dir.join("rootdisk")))
    }

    /// Sets the behaviour of the VMs that start from now on.
    pub fn behaviour(&self, behaviour: Behaviour) {
        *self.shared.hanging.lock().expect("the lock is not poisoned") = 0;
        *self.shared.behaviour.lock().expect("the lock is not poisoned") = behaviour;
    }

    /// Waits until a VM has come to the point where its behaviour makes it hang.
    ///
    /// # Errors
    /// No VM has, after a deadline.
    pub fn wait_until_one_hangs(&self) -> Result<()> {
        let hanging = self.shared.hanging.lock().expect("the lock is not poisoned");
        let (hanging, _) = self
            .shared
            .more
            .wait_timeout_while(hanging, DEADLINE, |hanging| *hanging == 0)
            .expect("the lock is not poisoned");
        ensure!(*hanging > 0, "no fake VM has come to where it hangs after {DEADLINE:?}");
        Ok(())
    }

    /// The agents of the running VMs: each is pid 1 of its guest.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn agents(&self) -> Result<Vec<Pid>> {
        let outer = self.shared.agents.lock().expect("the lock is not poisoned").clone();
        let inner =
            |&pid: &u32| Ok(inventory::descendants(pid)?.first().map(|agent| agent.pid.cast_signed()));
        outer.iter().filter_map(|pid| inner(pid).transpose()).map(|pid| pid.map(Pid::from_raw)).collect()
    }

    /// The disks that are attached to the running VMs.
    ///
    /// # Errors
    /// A directory of disks cannot be read.
    pub fn disks(&self) -> Result<Vec<PathBuf>> {
        let mut disks = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("disks-")) {
                for disk in fs::read_dir(path)? {
                    disks.push(disk?.path());
                }
            }
        }
        Ok(disks)
    }

    /// Waits until no VM is left.
    ///
    /// # Errors
    /// A VM is left after a deadline.
    pub fn settle(&self) -> Result<()> {
        let running = self.shared.running.lock().expect("the lock is not poisoned");
        let (running, _) = self
            .shared
            .fewer
            .wait_timeout_while(running, DEADLINE, |running| *running > 0)
            .expect("the lock is not poisoned");
        ensure!(*running == 0, "{} fake VMs still run after {DEADLINE:?}", *running);
        Ok(())
    }
}

impl Drop for FakeVmm {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Wakes the acceptor up; an acceptor that has ended already needs no waking.
        let _wake = UnixStream::connect(self.dir.join(SOCKET));
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().expect("accepting does not panic");
        }
    }
}

/// A file can have a further name only in the mount namespace that it was opened in.
fn enter(mounts: Option<&File>) -> Result<()> {
    let Some(mounts) = mounts else { return Ok(()) };
    unshare(CloneFlags::CLONE_FS).context("cannot leave the root of the other threads")?;
    setns(mounts, CloneFlags::CLONE_NEWNS).context("cannot enter the host's mount namespace")
}

fn accept(
    listener: &UnixListener,
    shared: &Arc<Shared>,
    dir: &Path,
    agent: &Path,
    mounts: &Arc<Option<File>>,
) {
    for (number, connection) in listener.incoming().enumerate() {
        let Ok(connection) = connection else { return };
        if shared.ended.load(Ordering::Relaxed) {
            return;
        }
        let behaviour = *shared.behaviour.lock().expect("the lock is not poisoned");
        let mounts = Arc::clone(mounts);
        let (shared, agent, disks) =
            (Arc::clone(shared), agent.to_owned(), dir.join(format!("disks-{number}")));
        *shared.running.lock().expect("the lock is not poisoned") += 1;
        std::thread::spawn(move || {
            let ran = enter(mounts.as_ref().as_ref())
                .and_then(|()| vm::run(connection, behaviour, &agent, &disks, &shared));
            if let Err(error) = ran {
                eprintln!("fake VM {number}: {error:#}");
            }
            *shared.running.lock().expect("the lock is not poisoned") -= 1;
            shared.fewer.notify_all();
        });
    }
}

/// The message of fake-qemu.
#[derive(Debug)]
struct Handed {
    monitor: UnixStream,
    console: UnixStream,
    channel: OwnedFd,
}

/// Descriptor numbers of monitor, console and channel in QEMU's arguments.
///
/// # Errors
/// One of the three is missing.
pub fn inherited_sockets(args: &[String]) -> Result<[i32; 3]> {
    let number = |id: &str| -> Result<i32> {
        let prefix = format!("socket,id={id},fd=");
        let fd = args.iter().find_map(|arg| arg.strip_prefix(&prefix)?.parse().ok());
        fd.with_context(|| format!("QEMU's arguments have no `-chardev {prefix}`"))
    };
    Ok([number("qmp")?, number("console")?, number("channel")?])
}
