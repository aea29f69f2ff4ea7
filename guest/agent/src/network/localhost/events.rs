//! When TCP sockets begin and cease to listen, and when UDP sockets are bound, by tracing of the kernel
//! (Documentation/trace/events.rst, kprobetrace.rst).
//!
//! The kernel has no other event for listen(2), and none at all for bind(2), so the second one is a probe at the function
//! that gives a socket a port which a program has asked for. The end of a UDP socket is seen with the next event. The content of an event is not used: it only shows when to look. An
//! instance of the tracing file system has buffers and settings of its own, so other users of tracing are not disturbed, and it
//! is used through a descriptor of a mount that is not attached anywhere.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{Mode, OFlags, mkdirat, openat},
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
    thread::{MembarrierCommand, membarrier},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::spawn_blocking,
};

use crate::sys;

const INSTANCE: &str = "instances/machinen";
/// The probe. The second argument of the function is the port.
const PROBE: &str = "p:machinen/udp_bind udp_lib_get_port port=%si:u16\n";
/// Settings of the instance, in this order. 10 is the number of the state of a socket that listens (TCP_LISTEN).
const SETTINGS: [(&str, &str); 6] = [
    ("buffer_size_kb", "4"),
    // A reader is woken by the first event.
    ("buffer_percent", "0"),
    ("events/sock/inet_sock_set_state/filter", "oldstate == 10 || newstate == 10"),
    ("events/sock/inet_sock_set_state/enable", "1"),
    ("events/machinen/udp_bind/filter", "port != 0"),
    ("events/machinen/udp_bind/enable", "1"),
];

#[derive(Debug)]
pub(super) struct SocketEvents {
    pipe: AsyncFd<OwnedFd>,
}

impl SocketEvents {
    /// # Errors
    /// The kernel has no such tracepoint, or the file system of the tracing cannot be used.
    pub(super) fn subscribe() -> io::Result<Self> {
        let configuration = fsopen("tracefs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&configuration)?;
        let root = fsmount(&configuration, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        let mut probes = File::from(open(root.as_fd(), "kprobe_events", OFlags::WRONLY | OFlags::APPEND)?);
        match probes.write_all(PROBE.as_bytes()) {
            // It is there since an earlier subscription.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            added => added?,
        }
        match mkdirat(&root, INSTANCE, Mode::RWXU) {
            Err(Errno::EXIST) => {}
            made => made?,
        }
        let instance = open(root.as_fd(), INSTANCE, OFlags::PATH | OFlags::DIRECTORY)?;
        for (name, value) in SETTINGS {
            let mut setting = File::from(open(instance.as_fd(), name, OFlags::WRONLY)?);
            setting.write_all(value.as_bytes())?;
        }
        let pipe = open(instance.as_fd(), "trace_pipe", OFlags::RDONLY | OFlags::NONBLOCK)?;
        Ok(Self { pipe: sys::register(pipe, Interest::READABLE)? })
    }

    /// Waits for at least one event, and takes all that have arrived.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) async fn changed(&self) -> io::Result<()> {
        let mut seen = false;
        loop {
            let mut ready = self.pipe.readable().await?;
            let taken = ready.try_io(|pipe| take_all(pipe.get_ref()));
            match taken {
                Ok(any) => seen |= any?,
                Err(_) if seen => break,
                Err(_) => {}
            }
        }
        // The event comes before the socket is in the tables of those that listen. The kernel does not sleep between the
        // two, and is not preempted, so a grace period of RCU is enough (membarrier(2)).
        let waited = spawn_blocking(|| membarrier(MembarrierCommand::Global)).await;
        Ok(waited.map_err(io::Error::other)??)
    }
}

fn open(dir: BorrowedFd<'_>, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    openat(dir, path, flags | OFlags::CLOEXEC, Mode::empty())
}

/// Whether there were events. WouldBlock: no more.
fn take_all(pipe: &OwnedFd) -> io::Result<bool> {
    Ok(rustix::io::read(pipe, &mut [0; 4096])? > 0)
}
