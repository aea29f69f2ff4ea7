//! The proof that nothing was left: the resources of a containerd, now and after all of them had time to
//! disappear.

use std::{
    fs,
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};
use sha2::{Digest, Sha256};

use crate::{
    containerd::Containerd,
    cri,
    image::hex,
    inventory::{Inventory, SHIM_SOCKETS, Scope},
    sys,
};

/// Longest that leftovers may take to disappear.
const DEADLINE: Duration = Duration::from_secs(30);

impl Containerd {
    /// The resources of this containerd now, except itself.
    ///
    /// # Errors
    /// `/proc` or a directory cannot be read.
    pub fn inventory(&self) -> Result<Inventory> {
        let mut inventory = Inventory::take(&self.scope())?;
        inventory.processes.retain(|process| process.pid != self.pid());
        Ok(inventory)
    }

    fn scope(&self) -> Scope {
        let dirs = ["s/io.containerd.runtime.v2.task", "fifo", "tmp"];
        let dirs = dirs.into_iter().chain(cri::DIRS);
        Scope {
            keeper: self.keeper_pid(),
            root: self.root().to_owned(),
            dirs: dirs.map(|dir| self.root().join(dir)).collect(),
            sockets: self.socket_names(),
            namespace: self.name().to_owned(),
        }
    }

    /// Shims, runc's and machinen's, name their sockets by a hash of values that are unique to the container.
    fn socket_names(&self) -> Vec<String> {
        let name = |id: &String| format!("{}/{}/{id}", self.socket().display(), self.namespace());
        self.ids().iter().map(|id| hex(&Sha256::digest(name(id))[..16])).collect()
    }

    /// Waits until there is nothing that was not there `before`.
    ///
    /// Woken by the end of each process, a change of the mount table and removals in the bundles' directory.
    ///
    /// # Errors
    /// Something was left after the deadline; it is listed.
    pub fn settle(&self, before: &Inventory) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        let mounts = fs::File::open("/proc/self/mountinfo").context("cannot open the mount table")?;
        let bundles = Inotify::init(InitFlags::IN_CLOEXEC).context("cannot use inotify")?;
        let removals = AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM;
        for dir in self.scope().dirs.into_iter().chain([self.bundle(""), SHIM_SOCKETS.into()]) {
            match bundles.add_watch(&dir, removals) {
                Ok(_) | Err(Errno::ENOENT) => {}
                Err(error) => return Err(error).with_context(|| format!("cannot watch {}", dir.display())),
            }
        }
        loop {
            let left = self.inventory()?.since(before);
            let time = end.saturating_duration_since(Instant::now());
            // The namespace's own directory stays with containerd, empty.
            let left = Inventory {
                files: left.files.into_iter().filter(|file| !self.is_frame(file)).collect(),
                ..left
            };
            if left.is_empty() {
                return Ok(());
            }
            if time.is_zero() {
                bail!("left behind after {DEADLINE:?}:\n{left}");
            }
            let ends: Vec<_> = left.processes.iter().filter_map(|it| sys::pidfd_open(it.pid).ok()).collect();
            // One has ended meanwhile, of which there would be no event.
            if ends.len() < left.processes.len() {
                continue;
            }
            let mut fds: Vec<_> = ends.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
            fds.push(PollFd::new(mounts.as_fd(), PollFlags::POLLPRI));
            fds.push(PollFd::new(bundles.as_fd(), PollFlags::POLLIN));
            let timeout = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
            poll(&mut fds, timeout).context("cannot wait for things to go")?;
            if fds.last().and_then(PollFd::any).unwrap_or(false) {
                bundles.read_events().context("cannot read inotify events")?;
            }
        }
    }

    fn is_frame(&self, file: &str) -> bool {
        let frames: Vec<_> = cri::FRAMES.iter().map(|dir| self.root().join(dir)).collect();
        file.strip_prefix("d ")
            .map(Path::new)
            .is_some_and(|dir| dir == self.bundle("") || frames.iter().any(|frame| frame == dir))
    }
}
