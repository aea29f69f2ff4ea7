//! Waits for changes of files, by inotify(7).

use std::{io, os::fd::AsFd as _, path::Path};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::{slow_close::SlowlyClosed, sys};

/// A set of watched files and directories.
#[derive(Debug)]
pub struct FileWatch {
    inotify: Inotify,
    /// The last descriptor of the same.
    events: SlowlyClosed,
}

impl FileWatch {
    /// Creates an empty set.
    ///
    /// # Errors
    /// The errors of inotify_init(2), or there is no event loop.
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let events = sys::async_fd(inotify.as_fd().try_clone_to_owned()?)?;
        Ok(Self { inotify, events: events.into() })
    }

    /// Watches the content, the attributes and the name of a file.
    ///
    /// # Errors
    /// The errors of inotify_add_watch(2).
    pub fn file(&self, path: &Path) -> io::Result<()> {
        self.add(path, AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_MOVE_SELF | AddWatchFlags::IN_DELETE_SELF)
    }

    /// Watches the attributes of a file, which include its number of names.
    ///
    /// # Errors
    /// The errors of inotify_add_watch(2).
    pub fn attributes(&self, path: &Path) -> io::Result<()> {
        self.add(path, AddWatchFlags::IN_DELETE_SELF)
    }

    /// Watches a directory for new names, and for sockets in it on which a process starts to listen (it then
    /// sets a mode).
    ///
    /// # Errors
    /// The errors of inotify_add_watch(2).
    pub fn names(&self, dir: &Path) -> io::Result<()> {
        self.add(dir, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)
    }

    fn add(&self, path: &Path, flags: AddWatchFlags) -> io::Result<()> {
        self.inotify.add_watch(path, flags | AddWatchFlags::IN_ATTRIB)?;
        Ok(())
    }

    /// Returns after at least one event since the last call. The event itself is not reported.
    ///
    /// # Errors
    /// The events cannot be read.
    pub async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.events.readable().await?;
            match self.inotify.read_events() {
                Ok(_) => return Ok(()),
                Err(nix::Error::EAGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::net::UnixListener, time::Duration};

    use tokio::time::timeout;

    use super::*;

    async fn is_quiet(watch: &FileWatch) -> bool {
        timeout(Duration::from_millis(20), watch.changed()).await.is_err()
    }

    #[tokio::test]
    async fn a_change_is_reported_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let (content, names, attributes) =
            (FileWatch::new().unwrap(), FileWatch::new().unwrap(), FileWatch::new().unwrap());
        content.file(&file).unwrap();
        names.names(dir.path()).unwrap();
        attributes.attributes(&file).unwrap();
        assert!(is_quiet(&content).await && is_quiet(&names).await);
        fs::write(&file, "x").unwrap();
        content.changed().await.unwrap();
        assert!(is_quiet(&content).await && is_quiet(&names).await && is_quiet(&attributes).await);
        let _listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        names.changed().await.unwrap();
        fs::remove_file(&file).unwrap();
        attributes.changed().await.unwrap();
        content.changed().await.unwrap();
    }

    #[tokio::test]
    async fn a_file_without_a_name_can_be_watched_by_its_descriptor() {
        use std::os::fd::AsRawFd as _;
        let file = tempfile::NamedTempFile::new().unwrap();
        let (file, path) = file.into_parts();
        let watch = FileWatch::new().unwrap();
        watch.attributes(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd()))).unwrap();
        path.close().unwrap();
        watch.changed().await.unwrap();
    }
}
