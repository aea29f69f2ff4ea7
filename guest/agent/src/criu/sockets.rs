//! Finds UNIX sockets whose file has another name than the one to which they were bound.
//!
//! CRIU 4.1 binds a restored socket to the name of its bind(2), and removes that name again if it was
//! removed. But a program may give the file of a socket another name: supervisord binds a temporary name,
//! links the final one to it and removes the temporary one; the JVM renames the file. Clients use the name of
//! the file, so they could not reach the restored socket.
//!
//! | the file, while the container is frozen | what is done |
//! |---|---|
//! | is where the socket was bound | nothing: CRIU does it |
//! | has no name any more | nothing: CRIU does it, and no client could reach the socket |
//! | has another name: it, or a directory above it, was renamed, or the process was in a chroot | the image is changed |
//! | the same, by a link in the directory where the socket was bound, whose first name was removed | the image is changed |
//! | has several names | the dump is refused, since CRIU binds one |
//! | has a name in another directory by a link, or one that is too long to bind | the dump is refused |
//! | is in a volume, and the dump is restored on trial while the container continues | the dump is refused, since the restored socket takes the place of the file |
//!
//! In a changed image the socket is bound to the present name of its file, which getsockname(2) in a restored
//! process then returns. Connections are not examined: they have the name of the socket that accepted them,
//! but CRIU does not bind them.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, File, Metadata, OpenOptions},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd},
        unix::{
            ffi::OsStrExt as _,
            fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    sys::socket::{SockType, UnixAddr, getpeername, getsockname, getsockopt, sockopt},
    unistd::Pid,
};
use procfs::process::{MountInfo, Process};
use rustix::{
    fs::{Mode, OFlags, ResolveFlags, openat2},
    process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use super::{CriuError, check::FrozenProcesses, files::MovedSocket, task::Task, volumes::VolumeDevice};
use crate::sys;

/// The kernel marks a path that does not lead to the file any more with this.
const REMOVED: &[u8] = b" (deleted)";
/// Bytes of an address (unix(7)), with its terminating NUL.
const MAX_NAME: usize = 108;

/// What a restore has to do with a socket, according to the present name of its file.
#[derive(Debug, PartialEq, Eq)]
enum SocketFile {
    /// CRIU binds it to the name that its file has.
    Bound,
    /// The image must bind it to another name.
    At(PathBuf),
    /// It cannot be restored, for this reason.
    Lost(String),
}

/// Finds the sockets of a container that CRIU would bind to a wrong name. All processes are frozen.
///
/// # Errors
/// A socket cannot be restored under all of its names, or cannot be examined.
pub(super) fn moved(processes: &FrozenProcesses) -> Result<Vec<MovedSocket>, CriuError> {
    let (mut seen, mut moved) = (HashSet::new(), Vec::new());
    let pids = processes.cgroup.pids()?;
    if serves_files(&pids, processes.volumes) {
        return Ok(moved);
    }
    let kept = processes.volumes.filter(|_| processes.is_tried);
    for pid in pids {
        // A process that has ended has no sockets.
        let Some(task) = Task::find(pid) else { continue };
        let places = match places(pid, kept, &mut seen) {
            Err(_) if Task::find(pid).is_none() => continue,
            places => places.map_err(|source| CriuError::Sockets { task: task.clone(), source })?,
        };
        for (inode, place) in places {
            match place {
                SocketFile::Bound => {}
                SocketFile::At(name) => moved.push(MovedSocket { inode, name }),
                SocketFile::Lost(why) => return Err(CriuError::Unrestorable { task, why }),
            }
        }
    }
    Ok(moved)
}

/// Whether one of the processes may serve a file system. The process is frozen, so examining a file there
/// would block. CRIU refuses such a mount.
fn serves_files(pids: &[Pid], volumes: Option<VolumeDevice>) -> bool {
    let mut seen = HashSet::new();
    let is_fuse = |mount: &MountInfo| {
        // The volumes are served by the host.
        mount.fs_type.starts_with("fuse")
            && mount.fs_type != "fusectl"
            && !volumes.is_some_and(|volumes| volumes.is_at(mount))
    };
    pids.iter().any(|pid| {
        let namespace = fs::read_link(format!("/proc/{pid}/ns/mnt"));
        namespace.is_ok_and(|namespace| seen.insert(namespace))
            && Process::new(pid.as_raw())
                .and_then(|process| process.mountinfo())
                .is_ok_and(|mounts| mounts.into_iter().any(|mount| is_fuse(&mount)))
    })
}

/// The sockets of a process that are bound to files, except those in `seen`. No socket may be bound in `kept`.
fn places(
    pid: Pid,
    kept: Option<VolumeDevice>,
    seen: &mut HashSet<u64>,
) -> io::Result<Vec<(u64, SocketFile)>> {
    let sockets: Vec<_> = sockets(pid)?.into_iter().filter(|(inode, _)| seen.insert(*inode)).collect();
    if sockets.is_empty() {
        // This includes a process that waits for its parent, which has no root any more.
        return Ok(Vec::new());
    }
    let process = rustix::process::Pid::from_raw(pid.as_raw()).ok_or(io::ErrorKind::InvalidInput)?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    let root = namespace_root(pid)?;
    let mut places = Vec::new();
    for (inode, number) in sockets {
        let socket = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?;
        if let Some(bound) = Bound::of(socket.as_fd())? {
            places.push((inode, bound.place(&root, kept)?));
        }
    }
    Ok(places)
}

/// The inodes and descriptors of all sockets that a process has open.
fn sockets(pid: Pid) -> io::Result<Vec<(u64, i32)>> {
    let mut sockets = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        if let Some(inode) = socket_inode(&fs::read_link(entry.path())?) {
            let number = entry.file_name().to_string_lossy().parse().map_err(io::Error::other)?;
            sockets.push((inode, number));
        }
    }
    Ok(sockets)
}

/// The inode in a link such as "socket:[4711]".
fn socket_inode(link: &Path) -> Option<u64> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// The root of the mount namespace of a process, which is above the root of a process in a chroot.
fn namespace_root(pid: Pid) -> io::Result<File> {
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let below = fs::read_link(&root)?;
    let up: PathBuf = below.components().skip(1).map(|_| "..").collect();
    OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(root.join(up))
}

/// A socket that is bound to a file which clients could use.
#[derive(Debug)]
struct Bound {
    /// The name of its bind(2).
    name: PathBuf,
    file: File,
}

impl Bound {
    /// Examines a socket; None for one that is not bound to a file.
    fn of(socket: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let fd = socket.as_raw_fd();
        let Ok(address) = getsockname::<UnixAddr>(fd) else { return Ok(None) };
        let Some(name) = address.path() else { return Ok(None) };
        let is_connection = getsockopt(&socket, sockopt::SockType)? != SockType::Datagram
            && getpeername::<UnixAddr>(fd).is_ok();
        if is_connection {
            return Ok(None);
        }
        let file = File::from(sys::file_of_socket(socket)?);
        Ok(Some(Self { name: name.to_owned(), file }))
    }

    fn place(&self, root: &File, kept: Option<VolumeDevice>) -> io::Result<SocketFile> {
        let status = self.file.metadata()?;
        if kept.is_some_and(|kept| kept.is_device(status.dev())) {
            return Ok(
                self.lost("is in a volume, where a trial restore (checkpoint.verify) would replace it")
            );
        }
        match status.nlink() {
            0 => return Ok(SocketFile::Bound),
            1 => {}
            _ => return Ok(self.lost("has other hard links")),
        }
        let path = fs::read_link(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
        // The first name, if it was removed. A name that only looks like a removed one still leads to the
        // file.
        let removed =
            path.as_os_str().as_bytes().strip_suffix(REMOVED).map(|path| Path::new(OsStr::from_bytes(path)));
        let removed = removed.filter(|_| !is_at(root, &path, &status));
        // CRIU finds the directory of a relative name by the path, which must end with the name.
        if self.name.is_relative() && !ends_with(removed.unwrap_or(&path), &self.name) {
            return Ok(self.lost(&format!("is now {}", shown(&path))));
        }
        let name = match removed {
            Some(removed) => match sibling(root, removed, &status)? {
                Some(name) => name,
                None => return Ok(self.lost("was linked into another directory and removed")),
            },
            None if self.name.is_relative() || self.name == path || is_at(root, &self.name, &status) => {
                return Ok(SocketFile::Bound);
            }
            None => path,
        };
        match name.as_os_str().len() < MAX_NAME {
            true => Ok(SocketFile::At(name)),
            false => Ok(self.lost("has a name that is too long for an address")),
        }
    }

    fn lost(&self, why: &str) -> SocketFile {
        SocketFile::Lost(format!(
            "has a UNIX socket that was bound to {} and whose file {why}",
            shown(&self.name)
        ))
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string().escape_debug().to_string()
}

/// Whether a path below `root` leads to that file, without a symbolic link at its end.
fn is_at(root: &File, path: &Path, file: &Metadata) -> bool {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
        .is_ok_and(|found| File::from(found).metadata().is_ok_and(|found| is_same(&found, file)))
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// The path of a socket's file in the directory of `removed`.
fn sibling(root: &File, removed: &Path, file: &Metadata) -> io::Result<Option<PathBuf>> {
    let Some(dir) = removed.parent() else { return Ok(None) };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(open) = openat2(root, dir, flags, Mode::empty(), ResolveFlags::IN_ROOT) else { return Ok(None) };
    for entry in fs::read_dir(format!("/proc/self/fd/{}", open.as_raw_fd()))? {
        let entry = entry?;
        if entry.file_type()?.is_socket() && is_same(&entry.metadata()?, file) {
            return Ok(Some(dir.join(entry.file_name())));
        }
    }
    Ok(None)
}

/// Compares a path with a relative name as CRIU does.
fn ends_with(path: &Path, name: &Path) -> bool {
    let name = name.as_os_str().as_bytes();
    let name = name.strip_prefix(b"./").unwrap_or(name);
    path.as_os_str().as_bytes().strip_suffix(name).is_some_and(|dir| dir.ends_with(b"/"))
}

#[cfg(test)]
mod tests {
    use std::os::{
        fd::AsFd,
        unix::{
            fs::symlink,
            net::{UnixDatagram, UnixListener, UnixStream},
        },
    };

    use super::*;

    fn place(socket: &impl AsFd) -> Option<SocketFile> {
        let root = namespace_root(nix::unistd::getpid()).unwrap();
        Bound::of(socket.as_fd()).unwrap().map(|bound| bound.place(&root, None).unwrap())
    }

    fn words(place: Option<SocketFile>) -> String {
        let Some(SocketFile::Lost(why)) = place else { panic!("{place:?}") };
        why.rsplit(" and whose file ").next().unwrap().to_owned()
    }

    #[test]
    fn a_socket_is_where_it_was_bound() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let listener = UnixListener::bind(at("a (deleted)")).unwrap();
        assert_eq!(place(&listener), Some(SocketFile::Bound));
        // The directory has another path.
        symlink(dir.path(), at("link")).unwrap();
        let datagrams = UnixDatagram::bind(at("link/b")).unwrap();
        assert_eq!(place(&datagrams), Some(SocketFile::Bound));
        // A connection has the name of its listener.
        let client = UnixStream::connect(at("a (deleted)")).unwrap();
        let (server, _) = listener.accept().unwrap();
        assert_eq!((place(&client), place(&server)), (None, None));
        fs::remove_file(at("a (deleted)")).unwrap();
        fs::remove_file(at("b")).unwrap();
        assert_eq!((place(&listener), place(&datagrams)), (Some(SocketFile::Bound), Some(SocketFile::Bound)));
        assert_eq!(place(&File::open("/dev/null").unwrap()), None);
    }

    #[test]
    fn a_socket_is_found_by_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("sub")).unwrap();
        let listener = UnixListener::bind(at("a")).unwrap();
        let is_at = |name: &str| assert_eq!(place(&listener), Some(SocketFile::At(at(name))));
        fs::rename(at("a"), at("sub/b")).unwrap();
        is_at("sub/b");
        fs::rename(at("sub"), at("other")).unwrap();
        is_at("other/b");
        // A link with the name that it was bound to is not followed.
        symlink(at("other/b"), at("a")).unwrap();
        is_at("other/b");
        fs::remove_file(at("a")).unwrap();
        // Another socket has the name that it was bound to.
        let other = UnixListener::bind(at("a")).unwrap();
        is_at("other/b");
        assert_eq!(place(&other), Some(SocketFile::Bound));
        fs::remove_file(at("a")).unwrap();
        // Its first name is removed, even if another one becomes the same.
        fs::hard_link(at("other/b"), at("other/c")).unwrap();
        assert_eq!(words(place(&listener)), "has other hard links");
        fs::remove_file(at("other/b")).unwrap();
        is_at("other/c");
        fs::rename(at("other/c"), at("other/b")).unwrap();
        is_at("other/b");
        fs::rename(at("other/b"), at("a")).unwrap();
        assert_eq!(words(place(&listener)), "was linked into another directory and removed");
        fs::remove_file(at("a")).unwrap();
        assert_eq!(place(&listener), Some(SocketFile::Bound));
    }

    #[test]
    fn a_name_has_to_fit_into_an_address() {
        let dir = tempfile::tempdir().unwrap();
        let room = MAX_NAME - dir.path().as_os_str().len() - 1;
        let at = |length: usize| dir.path().join("x".repeat(length));
        let datagrams = UnixDatagram::bind(at(1)).unwrap();
        fs::rename(at(1), at(room - 1)).unwrap();
        assert_eq!(place(&datagrams), Some(SocketFile::At(at(room - 1))));
        fs::rename(at(room - 1), at(room)).unwrap();
        assert_eq!(words(place(&datagrams)), "has a name that is too long for an address");
    }

    #[test]
    fn a_relative_name_is_the_end_of_a_path() {
        for (path, name, fits) in [
            ("/tmp/a", "a", true),
            ("/tmp/a", "./a", true),
            ("/a", "a", true),
            ("/tmp/x/a", "x/a", true),
            ("/tmp/xa", "a", false),
            ("/tmp/b", "a", false),
            ("/tmp/a", "../tmp/a", false),
        ] {
            assert_eq!(ends_with(Path::new(path), Path::new(name)), fits, "{path} {name}");
        }
    }
}
