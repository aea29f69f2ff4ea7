//! What the standard library leaves to its callers about files: private directories, locks, removal, and one error that
//! names the file.

use std::{
    fs::{self, DirBuilder, File, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::mpsc::{self, SendError},
    thread,
    time::Duration,
};

use crate::error::{ErrorKind, HasKind};

/// A failed operation on a file or directory.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct FileError {
    /// A verb that fits "cannot ... PATH", such as `open`.
    pub action: &'static str,
    /// The file or directory.
    pub path: PathBuf,
    /// What the system answered.
    pub source: io::Error,
}

impl FileError {
    /// The failure of `action` on `path`.
    pub fn new(action: &'static str, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> Self {
        Self { action, path: path.into(), source: source.into() }
    }

    /// For [`Result::map_err`]: `fs::read(path).map_err(FileError::at("read", path))`.
    pub fn at(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self { action, path, source }
    }
}

impl HasKind for FileError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::of_io(&self.source)
    }
}

/// Creates one directory that only its owner may enter (mode 0700). False: the name exists already.
///
/// # Errors
/// Those of mkdir(2), but for EEXIST.
pub fn create_private_dir(path: &Path) -> io::Result<bool> {
    match create_new_private_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// As [`create_private_dir`], but it is an error if the name exists already.
///
/// # Errors
/// Those of mkdir(2).
pub fn create_new_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

/// Creates a directory and its missing parents, all of them with mode 0700.
///
/// # Errors
/// Those of mkdir(2), but for EEXIST.
pub fn create_private_dirs(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Whether a symbolic link may stand in the place of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// The file that the link leads to is opened.
    Follow,
    /// A link is an error.
    Refuse,
}

/// Opens a regular file for reading. A fifo, device or directory in its place is an error, and the open never waits for
/// another process as that of a fifo does.
///
/// # Errors
/// Those of open(2), or the file is not a regular one.
pub fn open_regular(path: &Path, links: Links) -> io::Result<File> {
    let no_follow = if links == Links::Refuse { libc::O_NOFOLLOW } else { 0 };
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY | no_follow)
        .open(path);
    let odd = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what);
    match opened {
        Ok(file) if file.metadata()?.is_file() => Ok(file),
        Ok(_) => Err(odd("it is not a regular file")),
        Err(error) if links == Links::Refuse && error.raw_os_error() == Some(libc::ELOOP) => {
            Err(odd("it is a symbolic link"))
        }
        // A socket, or a fifo or device without a driver.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Err(odd("it is not a regular file")),
        Err(error) => Err(error),
    }
}

/// None if the file does not exist: `if_exists(fs::read(path))`.
///
/// # Errors
/// Any other error of `result`.
pub fn if_exists<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes a file. False: it did not exist.
///
/// # Errors
/// Those of unlink(2), but for ENOENT.
pub fn remove_if_exists(path: &Path) -> io::Result<bool> {
    if_exists(fs::remove_file(path)).map(|removed| removed.is_some())
}

/// Removes a directory with everything in it; links are not followed. False: it did not exist.
///
/// # Errors
/// Those of unlinkat(2), but for ENOENT.
pub fn remove_dir_if_exists(path: &Path) -> io::Result<bool> {
    if_exists(fs::remove_dir_all(path)).map(|removed| removed.is_some())
}

/// How long [`lock`] and [`lock_shared`] wait. Their holders read and write a few small files, or make a file system.
const LOCK_DEADLINE: Duration = Duration::from_secs(60);

/// Waits until no other open file description holds a lock on the file, and takes it exclusively (flock(2)). A signal
/// does not end the wait. The lock is released when the last duplicate of the descriptor is closed; a child process has
/// one until it executes its program.
///
/// # Errors
/// Those of flock(2), but for EINTR; `TimedOut` if the lock has not become free within a minute.
pub fn lock(file: &File) -> io::Result<()> {
    lock_within(file, LOCK_DEADLINE)
}

/// As [`lock`], shared with others that lock the file so.
///
/// # Errors
/// Those of [`lock`].
pub fn lock_shared(file: &File) -> io::Result<()> {
    if try_lock_shared(file)? { Ok(()) } else { wait_for(file, File::lock_shared, LOCK_DEADLINE) }
}

/// As [`lock`], with another deadline.
///
/// # Errors
/// Those of [`lock`].
pub fn lock_within(file: &File, deadline: Duration) -> io::Result<()> {
    if try_lock(file)? { Ok(()) } else { wait_for(file, File::lock, deadline) }
}

/// Waits for a lock on a thread of its own, because flock(2) has no deadline. A thread that is given up ends when the
/// holder of the lock does, and releases the lock then.
fn wait_for(file: &File, lock: fn(&File) -> io::Result<()>, deadline: Duration) -> io::Result<()> {
    let waiting = file.try_clone()?;
    // The sender learns whether its message was received: nothing is kept in the channel.
    let (sender, locked) = mpsc::sync_channel(0);
    let wait = move || {
        let result = uninterrupted(|| lock(&waiting));
        if let Err(SendError(Ok(()))) = sender.send(result)
            && let Err(error) = waiting.unlock()
        {
            tracing::warn!("cannot release a lock that came too late: {error}");
        }
    };
    thread::Builder::new().name("lock".to_owned()).spawn(wait)?;
    locked.recv_timeout(deadline).unwrap_or_else(|_| {
        let text = format!("another process has held the lock for {} s", deadline.as_secs());
        Err(io::Error::new(io::ErrorKind::TimedOut, text))
    })
}

/// As [`lock`], without waiting. False: another open file description holds a lock.
///
/// # Errors
/// Those of flock(2), but for EWOULDBLOCK.
pub fn try_lock(file: &File) -> io::Result<bool> {
    taken(file.try_lock())
}

/// As [`lock_shared`], without waiting. False: another open file description holds an exclusive lock.
///
/// # Errors
/// Those of flock(2), but for EWOULDBLOCK.
pub fn try_lock_shared(file: &File) -> io::Result<bool> {
    taken(file.try_lock_shared())
}

fn uninterrupted(lock: impl Fn() -> io::Result<()>) -> io::Result<()> {
    loop {
        match lock() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn taken(result: Result<(), TryLockError>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Lower-case hexadecimal digits, two a byte.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a String takes any text");
        text
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn directories_are_their_owners() {
        let dir = tempfile::tempdir().unwrap();
        let (one, deep) = (dir.path().join("one"), dir.path().join("a/b"));
        assert!(create_private_dir(&one).unwrap() && !create_private_dir(&one).unwrap());
        assert_eq!(
            create_private_dir(&dir.path().join("no/parent")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        assert_eq!(create_new_private_dir(&one).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        create_private_dirs(&deep).unwrap();
        create_private_dirs(&deep).unwrap();
        for path in [&one, &deep, &dir.path().join("a")] {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o700);
        }
        assert!(remove_dir_if_exists(&one).unwrap() && !remove_dir_if_exists(&one).unwrap());
    }

    #[test]
    fn a_missing_file_is_no_error_where_that_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        assert_eq!(if_exists(fs::read(&path)).unwrap(), None);
        fs::write(&path, "x").unwrap();
        assert_eq!(if_exists(fs::read(&path)).unwrap(), Some(b"x".to_vec()));
        assert!(remove_if_exists(&path).unwrap() && !remove_if_exists(&path).unwrap());
        assert!(remove_if_exists(dir.path()).is_err());
    }

    #[test]
    fn only_regular_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("file"), "x").unwrap();
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        assert!(open_regular(&path("file"), Links::Refuse).is_ok());
        assert!(open_regular(&path("link"), Links::Follow).is_ok());
        let error = |name: &str, links| open_regular(&path(name), links).unwrap_err();
        assert_eq!(error("link", Links::Refuse).to_string(), "it is a symbolic link");
        // The open of a fifo without a writer would wait.
        for name in ["fifo", "socket", "."] {
            assert_eq!(error(name, Links::Follow).to_string(), "it is not a regular file", "{name}");
        }
        assert_eq!(error("missing", Links::Refuse).kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn locks_belong_to_the_open_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let open = || File::options().create(true).append(true).open(&path).unwrap();
        let (one, two, three) = (open(), open(), open());
        lock_shared(&one).unwrap();
        assert!(try_lock_shared(&two).unwrap() && !try_lock(&three).unwrap());
        drop(two);
        assert!(!try_lock(&three).unwrap());
        drop(one);
        assert!(try_lock(&three).unwrap() && !try_lock_shared(&open()).unwrap());
        drop(three);
        lock(&open()).unwrap();
    }

    #[test]
    fn a_lock_that_stays_held_is_not_waited_for_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let open = || File::options().create(true).append(true).open(&path).unwrap();
        let (holder, late) = (open(), open());
        lock(&holder).unwrap();
        let error = lock_within(&late, Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let (sender, locked) = mpsc::channel();
        let other = open();
        thread::spawn(move || sender.send(lock_shared(&other).map(|()| other)).unwrap());
        drop(holder);
        // The abandoned wait gets the lock at some time, and releases it although `late` is still open.
        locked.recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
    }

    #[test]
    fn errors_name_the_file() {
        let error = fs::read("/no/file").map_err(FileError::at("read", "/no/file")).unwrap_err();
        assert_eq!(error.to_string(), "cannot read /no/file");
        assert_eq!(hex(&[0, 0x1f, 0xff]), "001fff");
    }
}
