//! Network namespaces: a namespace is entered by a thread of its own, so that no other work gets into it.

use std::{
    fs::File,
    io,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::Path,
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};

/// The type of the file system of namespaces (linux/magic.h, NSFS_MAGIC).
const NSFS: rustix::fs::FsWord = 0x6e73_6673;
/// The namespace of the calling thread.
const OWN: &str = "/proc/thread-self/ns/net";

/// Names a namespace as long as it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetnsId {
    device: u64,
    inode: u64,
}

/// Opens a network namespace by its path. Blocks for as long as the file system of the path does.
///
/// # Errors
/// The errors of open(2), or the path is not that of a namespace.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    // The open of a fifo would wait for another process.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if rustix::fs::fstatfs(&file)?.f_type != NSFS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a namespace"));
    }
    Ok(file.into())
}

/// The identity of an open namespace.
///
/// # Errors
/// The errors of fstat(2).
pub fn id(namespace: &OwnedFd) -> io::Result<NetnsId> {
    let stat = rustix::fs::fstat(namespace)?;
    Ok(NetnsId { device: stat.st_dev, inode: stat.st_ino })
}

/// The identity of this process's own namespace.
///
/// # Errors
/// /proc is not mounted.
pub fn own_id() -> io::Result<NetnsId> {
    let stat = std::fs::metadata("/proc/self/ns/net")?;
    Ok(NetnsId { device: stat.dev(), inode: stat.ino() })
}

/// Calls `work` in an open namespace, and waits for it.
///
/// # Errors
/// The errors of setns(2), or of `work`.
pub fn inside<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    on_a_thread(|| {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        work()
    })
}

/// Makes a network namespace, and calls `work` inside. The namespace exists for as long as something refers to it.
///
/// # Errors
/// The errors of unshare(2), or of `work`.
pub fn inside_new<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<(OwnedFd, T)> {
    on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let namespace = File::open(OWN)?;
        Ok((namespace.into(), work()?))
    })
}

fn on_a_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, work)?;
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn only_a_namespace_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (fifo, file) = (dir.path().join("fifo"), dir.path().join("file"));
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::write(&file, "").unwrap();
        for path in [&*fifo, &file, Path::new("/dev/null")] {
            assert_eq!(open(path).unwrap_err().to_string(), "it is not a namespace", "{}", path.display());
        }
        assert_eq!(id(&open(Path::new("/proc/self/ns/net")).unwrap()).unwrap(), own_id().unwrap());
    }

    #[test]
    fn work_is_done_inside_and_this_thread_stays_outside() {
        let here = own_id().unwrap();
        let inside_id = || id(&open(Path::new(OWN))?);
        let (made, seen) = inside_new(inside_id).unwrap();
        assert_eq!(seen, id(&made).unwrap());
        assert_ne!(seen, here);
        assert_eq!(inside(made.as_fd(), inside_id).unwrap(), seen);
        assert_eq!(inside_id().unwrap(), here);
    }
}
