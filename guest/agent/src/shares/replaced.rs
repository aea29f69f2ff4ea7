//! Volumes whose files the host replaces all at once by the link `..data`, as kubelet does with ConfigMaps and Secrets:
//! processes that watch such a volume (inotify(7)) are notified.
//!
//! ```text
//!   host: rename("..data_tmp", "..data"), remove(former directory)
//!     └──call──> agent ── rename(FROM, "..data") ──> kernel: LOOKUP FROM, RENAME ──/dev/fuse──> answered by the agent
//!                      │                               └── IN_MOVED_TO for those that watch the volume's directory
//!                      └── FUSE_NOTIFY_DELETE for each file of the former directory ── IN_DELETE_SELF
//! ```
//! The kernel has no message by which the server of a file system causes such events: they come from calls of processes. So
//! the agent makes such a call, and answers the kernel's requests about it itself: nothing is changed on the host, and the
//! container's mount may be read-only. Events of a file need the name that the kernel has cached, which is kept by
//! a descriptor ([`Former`]).
//!
//! The kernel may wait for the agent's main thread, which passes requests on. So another thread does all this.

use std::{
    ffi::{CStr, OsStr, OsString},
    fs, io,
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Component, Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError, Weak},
};

use machinen_protocol::{
    fuse::{RequestHeader, opcode, refusal},
    shares::{DATA_LINK, ShareEntry},
};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, openat, renameat},
    io::{Errno, write},
};
use tokio::io::unix::AsyncFd;

use super::sockets::messages::{Entry, acknowledgement, deletion};
use crate::sys;

/// The name of the file that the agent renames, which does not exist on the host.
const FROM: &CStr = c"..data_machinen";
/// Nodes of the agent's own; those of `sockets` come before.
const FIRST_NODE: u64 = (1 << 63) + 1;
/// Bytes before the names in a request to rename (fuse_rename_in).
const RENAME_HEADER: usize = 8;
/// Files of a volume that are kept for their events. Each takes a descriptor, here and in the host's server.
const MAX_FILES: usize = 4096;

/// The renaming that the agent makes the kernel do.
#[derive(Debug)]
pub(super) struct Renaming(Mutex<RenamingState>);

#[derive(Debug)]
struct RenamingState {
    /// The node of the volume's directory, while there is a renaming.
    directory: Option<u64>,
    next_node: u64,
}

impl Default for Renaming {
    fn default() -> Self {
        Self(Mutex::new(RenamingState { directory: None, next_node: FIRST_NODE }))
    }
}

impl Renaming {
    /// Answers a request that is about the renaming. Nothing is sent for an empty answer.
    pub(super) fn answer(&self, request: RequestHeader, body: &[u8]) -> Option<Vec<u8>> {
        let name = |from: usize| CStr::from_bytes_until_nul(body.get(from..).unwrap_or_default()).ok();
        let mut state = self.state();
        match request.opcode {
            opcode::FORGET if request.node >= FIRST_NODE => Some(Vec::new()),
            // The file of an earlier renaming: the kernel looks the name up again.
            _ if request.node >= FIRST_NODE => Some(refusal(request.unique, libc::ESTALE).to_vec()),
            opcode::LOOKUP if state.directory == Some(request.node) && name(0) == Some(FROM) => {
                // A node of its own: the kernel does nothing if both names are the same file.
                let node = state.next_node;
                state.next_node += 1;
                Some(Entry::link(node).reply(request.unique))
            }
            opcode::RENAME if state.directory == Some(request.node) && name(RENAME_HEADER) == Some(FROM) => {
                Some(acknowledgement(request.unique))
            }
            _ => None,
        }
    }

    /// Has the kernel rename a file to `..data` in this directory. Blocks.
    fn rename(&self, directory: &OwnedFd) -> io::Result<()> {
        self.state().directory = Some(sys::fuse_node(directory.as_fd())?);
        let renamed = renameat(directory, FROM, directory, DATA_LINK);
        self.state().directory = None;
        Ok(renamed?)
    }

    fn state(&self) -> MutexGuard<'_, RenamingState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What `..data` of a volume leads to.
#[derive(Debug)]
pub(super) struct Data {
    target: OsString,
    files: Vec<Former>,
}

/// A file that will be removed with the directory that `..data` leads to.
#[derive(Debug)]
struct Former {
    /// Without it the kernel might not keep the name of a file that is watched and not open.
    _kept: OwnedFd,
    node: u64,
    parent: u64,
    name: OsString,
}

impl Data {
    /// Notifies the processes that watch the volume that its data are replaced, and finds the new data. `former`: what
    /// was there before; None if the volume is new. Blocks.
    ///
    /// # Errors
    /// The kernel refuses something. The other notifications were sent nevertheless.
    pub(super) fn replace(
        volume: ShareEntry,
        target: OsString,
        former: Option<Self>,
        renaming: &Renaming,
        device: &Weak<AsyncFd<OwnedFd>>,
    ) -> (Self, io::Result<()>) {
        let former = match former {
            Some(former) if former.target == target => return (former, Ok(())),
            former => former,
        };
        let mut files = Vec::new();
        let done = open(CWD, &volume.path()).and_then(|directory| {
            let notified =
                former.map_or(Ok(()), |former| renaming.rename(&directory).and(former.remove(device)));
            find(&directory, &target, &mut files)?;
            notified
        });
        (Self { target, files }, done)
    }

    /// Tells the kernel that the files are removed. The device may be closed at any other moment, so that a request of this
    /// thread fails when nothing answers any more.
    fn remove(self, device: &Weak<AsyncFd<OwnedFd>>) -> io::Result<()> {
        // What is in a directory comes after it.
        for file in self.files.iter().rev() {
            let device = device.upgrade().ok_or(io::ErrorKind::NotConnected)?;
            match write(device.get_ref(), &deletion(file.parent, file.node, file.name.as_bytes())) {
                // The kernel has found out by itself.
                Ok(_) | Err(Errno::NOENT | Errno::NOTEMPTY) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

/// Finds a directory in the volume, and what is in it. One that was replaced meanwhile has nothing: the host
/// says so next.
fn find(volume: &OwnedFd, target: &OsStr, files: &mut Vec<Former>) -> io::Result<()> {
    let mut components = Path::new(target).components();
    let (Some(Component::Normal(name)), None) = (components.next(), components.next()) else {
        return Ok(());
    };
    let mut pending = vec![(sys::fuse_node(volume.as_fd())?, PathBuf::from(name))];
    while let Some((parent, path)) = pending.pop() {
        if files.len() == MAX_FILES {
            break;
        }
        let found = open(volume, &path).and_then(|file| Ok((sys::fuse_node(file.as_fd())?, file)));
        let (node, file) = match found {
            Err(error) if is_gone(&error) => continue,
            found => found?,
        };
        let name = path.file_name().unwrap_or_default().to_owned();
        let at = format!("/proc/self/fd/{}", file.as_raw_fd());
        let is_dir = FileType::from_raw_mode(fstat(&file)?.st_mode).is_dir();
        files.push(Former { _kept: file, node, parent, name });
        if !is_dir {
            continue;
        }
        match fs::read_dir(at).and_then(Iterator::collect::<io::Result<Vec<_>>>) {
            Err(error) if is_gone(&error) => {}
            entries => {
                pending.extend(entries?.into_iter().map(|entry| (node, path.join(entry.file_name()))));
            }
        }
    }
    Ok(())
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE))
}

fn open(dir: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    Ok(openat(dir, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use machinen_protocol::fuse::REQUEST_HEADER;

    use super::*;

    fn request(opcode: u32, node: u64) -> RequestHeader {
        RequestHeader { length: REQUEST_HEADER, opcode, unique: 5, node }
    }

    #[test]
    fn only_the_agents_own_renaming_is_answered() {
        let renaming = Renaming::default();
        let lookup = |node| renaming.answer(request(opcode::LOOKUP, node), b"..data_machinen\0");
        let rename = |node, names: &[u8]| {
            renaming.answer(request(opcode::RENAME, node), &[&[0; RENAME_HEADER][..], names].concat())
        };
        assert!(lookup(7).is_none() && rename(7, b"..data_machinen\0..data\0").is_none());
        renaming.state().directory = Some(7);
        let first = Entry::of_reply(&lookup(7).unwrap()).unwrap();
        let second = Entry::of_reply(&lookup(7).unwrap()).unwrap();
        assert_eq!((first.node(), second.node()), (FIRST_NODE, FIRST_NODE + 1));
        assert_eq!(rename(7, b"..data_machinen\0..data\0"), Some(refusal(5, 0).to_vec()));
        assert!(lookup(8).is_none() && rename(7, b"..data_tmp\0..data\0").is_none());
        assert!(renaming.answer(request(opcode::LOOKUP, 7), b"..data\0").is_none());
        assert_eq!(renaming.answer(request(opcode::FORGET, FIRST_NODE), &[]), Some(Vec::new()));
        assert_eq!(
            renaming.answer(request(opcode::GETATTR, FIRST_NODE), &[]),
            Some(refusal(5, libc::ESTALE).to_vec())
        );
    }
}
