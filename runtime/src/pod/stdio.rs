//! A process's standard streams on the host: the caller's fifos and files on one side, raw streams to the guest on
//! the other.
//!
//! Where a stream ends is said by the control channel in bytes (see machinen-protocol), so nothing here guesses from
//! a closed connection. A fifo is opened such that it neither blocks us when its reader is late nor ends when its
//! reader comes and goes, as containerd's clients do when they detach and attach again.

use std::{
    fs::OpenOptions,
    io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
    pin::pin,
    sync::Mutex,
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::unix::pipe,
    sync::watch,
    task::JoinHandle,
    time::timeout,
};

use crate::error::{ErrorKind, Kind};

/// How long a reader may take nothing of the output of a process that has ended before the rest is dropped.
const READER_GRACE: Duration = Duration::from_secs(10);

const BUFFER: usize = 64 << 10;

/// The standard streams that a caller asks for, as it names them; an empty name is /dev/null.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioNames {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

/// Why a standard stream cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    #[error("{stream} {name:?} is not supported yet; supported are a path and fifo:///path")]
    Scheme { stream: &'static str, name: String },
    #[error("cannot open {stream} {}", path.display())]
    Open { stream: &'static str, path: PathBuf, source: io::Error },
    #[error("{stream} {} is not a fifo", path.display())]
    NotFifo { stream: &'static str, path: PathBuf },
    #[error("a terminal is not supported yet")]
    Terminal,
}

impl Kind for StdioError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Scheme { .. } | Self::Terminal => ErrorKind::Unimplemented,
            Self::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::Open { .. } | Self::NotFifo { .. } => ErrorKind::InvalidArgument,
        }
    }
}

/// The host ends of a process's standard streams, opened.
#[derive(Debug)]
pub struct HostStdio {
    pub stdin: Option<Stdin>,
    pub stdout: Option<pipe::Sender>,
    pub stderr: Option<pipe::Sender>,
}

/// A stdin fifo and our own writing end of it, which keeps it from ending before the caller says so.
#[derive(Debug)]
pub struct Stdin {
    reader: pipe::Receiver,
    keeper: pipe::Sender,
}

impl HostStdio {
    /// Opens what `names` says; never blocks.
    ///
    /// # Errors
    /// The first stream that is not there or not supported.
    pub fn open(names: &StdioNames) -> Result<Self, StdioError> {
        if names.terminal {
            return Err(StdioError::Terminal);
        }
        Ok(Self {
            stdin: path_of("stdin", &names.stdin)?.map(open_stdin).transpose()?,
            stdout: path_of("stdout", &names.stdout)?.map(|path| open_output("stdout", path)).transpose()?,
            stderr: path_of("stderr", &names.stderr)?.map(|path| open_output("stderr", path)).transpose()?,
        })
    }
}

fn path_of<'a>(stream: &'static str, name: &'a str) -> Result<Option<&'a Path>, StdioError> {
    let path = name.strip_prefix("fifo://").unwrap_or(name);
    match path {
        "" => Ok(None),
        _ if path.starts_with('/') => Ok(Some(Path::new(path))),
        _ => Err(StdioError::Scheme { stream, name: name.to_owned() }),
    }
}

fn open_fifo(
    stream: &'static str,
    path: &Path,
    options: &mut OpenOptions,
) -> Result<std::fs::File, StdioError> {
    let failed = |source| StdioError::Open { stream, path: path.into(), source };
    let file = options.custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.file_type().is_fifo() {
        return Err(StdioError::NotFifo { stream, path: path.into() });
    }
    Ok(file)
}

fn open_stdin(path: &Path) -> Result<Stdin, StdioError> {
    let failed = |source| StdioError::Open { stream: "stdin", path: path.into(), source };
    let reader = open_fifo("stdin", path, OpenOptions::new().read(true))?;
    let keeper = open_fifo("stdin", path, OpenOptions::new().write(true))?;
    Ok(Stdin {
        reader: pipe::Receiver::from_file(reader).map_err(failed)?,
        keeper: pipe::Sender::from_file(keeper).map_err(failed)?,
    })
}

fn open_output(stream: &'static str, path: &Path) -> Result<pipe::Sender, StdioError> {
    // Read and write: the open does not wait for a reader, and writes do not fail while there is none.
    let file = open_fifo(stream, path, OpenOptions::new().read(true).write(true))?;
    pipe::Sender::from_file(file).map_err(|source| StdioError::Open { stream, path: path.into(), source })
}

/// One output stream on its way from the guest to the caller.
#[derive(Debug)]
pub struct Output {
    name: &'static str,
    total: watch::Sender<Option<u64>>,
    copied: JoinHandle<io::Result<u64>>,
}

impl Output {
    /// Starts to copy from the guest to the caller.
    pub fn start(
        name: &'static str,
        from_guest: impl AsyncRead + Unpin + Send + 'static,
        sink: impl AsyncWrite + Unpin + Send + 'static,
    ) -> Self {
        let (total, seen) = watch::channel(None);
        Self { name, total, copied: tokio::spawn(copy_output(from_guest, sink, seen)) }
    }

    /// Waits until the `total` bytes that the process wrote have reached the caller.
    ///
    /// # Errors
    /// A sentence for the log when they did not all arrive.
    pub async fn finish(self, total: u64) -> Result<(), String> {
        self.total.send_replace(Some(total));
        match self.copied.await {
            Ok(Ok(copied)) if copied == total => Ok(()),
            Ok(Ok(copied)) => Err(format!("{} lost bytes: {copied} of {total} arrived", self.name)),
            Ok(Err(error)) => Err(format!("{} could not be delivered: {error}", self.name)),
            Err(error) => Err(format!("{} could not be delivered: {error}", self.name)),
        }
    }

    /// Delivers what has arrived when the guest is gone and nobody can say how much there was.
    pub async fn abandon(self) {
        // The stream ends with its VM; the deadline is for one that does not.
        if timeout(READER_GRACE, self.copied).await.is_err() {
            tracing::warn!(stream = self.name, "output dropped: its reader takes nothing");
        }
    }
}

async fn copy_output(
    mut from_guest: impl AsyncRead + Unpin,
    mut sink: impl AsyncWrite + Unpin,
    mut total: watch::Receiver<Option<u64>>,
) -> io::Result<u64> {
    let mut buffer = vec![0; BUFFER];
    let mut copied = 0;
    loop {
        if total.borrow().is_some_and(|total| copied >= total) {
            return Ok(copied);
        }
        let read = tokio::select! {
            read = from_guest.read(&mut buffer) => read?,
            changed = total.changed() => match changed {
                Ok(()) => continue,
                // Abandoned: the stream says when it ends.
                Err(_) => from_guest.read(&mut buffer).await?,
            },
        };
        if read == 0 {
            return Ok(copied);
        }
        put(&mut sink, &buffer[..read], &mut total).await?;
        copied += read as u64;
    }
}

/// Writes all of `bytes`; once the process has ended, only as long as the reader takes something within the grace.
async fn put(
    sink: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
    total: &mut watch::Receiver<Option<u64>>,
) -> io::Result<()> {
    let mut write = pin!(sink.write_all(bytes));
    tokio::select! {
        written = &mut write => return written,
        _ = total.wait_for(Option::is_some) => {}
    }
    timeout(READER_GRACE, write).await.unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::TimedOut, "its reader takes nothing, the rest was dropped"))
    })
}

/// The caller's stdin on its way to the guest.
#[derive(Debug)]
pub struct Input {
    keeper: Mutex<Option<pipe::Sender>>,
    task: JoinHandle<()>,
}

impl Input {
    /// Starts to copy; `ended` is called with the number of bytes when the caller has sent its last one.
    pub fn start<F>(
        stdin: Stdin,
        to_guest: impl AsyncWrite + Unpin + Send + 'static,
        ended: impl FnOnce(u64) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let Stdin { reader, keeper } = stdin;
        let task = tokio::spawn(async move {
            let mut to_guest = to_guest;
            let mut reader = reader;
            match copy_input(&mut reader, &mut to_guest).await {
                Ok(total) => ended(total).await,
                // The process or its VM has ended; whoever waits for it says so.
                Err(error) => tracing::debug!("stdin ends early: {error}"),
            }
            // The guest reads the stream to the count it was told; the connection lives until the process is gone.
            std::future::pending::<()>().await;
        });
        Self { keeper: Mutex::new(Some(keeper)), task }
    }

    /// The caller will write no more: stdin ends when everything in the fifo has been read.
    pub fn close(&self) {
        self.keeper.lock().expect("no panic while held").take();
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn copy_input(
    from: &mut (impl AsyncRead + Unpin),
    to_guest: &mut (impl AsyncWrite + Unpin),
) -> io::Result<u64> {
    let mut buffer = vec![0; BUFFER];
    let mut copied = 0;
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(copied);
        }
        to_guest.write_all(&buffer[..read]).await?;
        to_guest.flush().await?;
        copied += read as u64;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nix::{sys::stat::Mode, unistd::mkfifo};
    use tokio::{io::duplex, sync::oneshot};

    use super::*;

    fn fifo(dir: &tempfile::TempDir, name: &str) -> String {
        let path = dir.path().join(name);
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn names_are_paths_or_fifo_uris() {
        assert_eq!(path_of("stdout", "").unwrap(), None);
        assert_eq!(path_of("stdout", "/a").unwrap(), Some(Path::new("/a")));
        assert_eq!(path_of("stdout", "fifo:///a").unwrap(), Some(Path::new("/a")));
        let error = path_of("stdout", "binary:///usr/bin/logger?x=y").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unimplemented);
    }

    #[tokio::test]
    async fn output_ends_at_the_count_not_at_the_end_of_the_stream() {
        let dir = tempfile::tempdir().unwrap();
        let name = fifo(&dir, "out");
        let host = HostStdio::open(&StdioNames { stdout: name.clone(), ..Default::default() }).unwrap();
        let mut reader = std::fs::File::open(&name).unwrap();
        let (mut guest, from_guest) = duplex(4096);
        let output = Output::start("stdout", from_guest, host.stdout.unwrap());
        guest.write_all(b"hello").await.unwrap();
        output.finish(5).await.unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[tokio::test]
    async fn missing_output_is_noticed() {
        let (guest, from_guest) = duplex(4096);
        let output = Output::start("stdout", from_guest, tokio::io::sink());
        drop(guest);
        assert_eq!(output.finish(5).await.unwrap_err(), "stdout lost bytes: 0 of 5 arrived");
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_is_gone_does_not_hold_up_the_exit() {
        let (mut guest, from_guest) = duplex(1 << 20);
        let (sink, unread) = duplex(16);
        let output = Output::start("stdout", from_guest, sink);
        guest.write_all(&[7; 1000]).await.unwrap();
        let error = output.finish(1000).await.unwrap_err();
        assert!(error.contains("takes nothing"), "{error}");
        drop(unread);
    }

    #[tokio::test]
    async fn stdin_ends_when_the_caller_says_so_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let name = fifo(&dir, "in");
        let host = HostStdio::open(&StdioNames { stdin: name.clone(), ..Default::default() }).unwrap();
        let (to_guest, mut guest) = duplex(4096);
        let (said, mut total) = oneshot::channel();
        let input = Input::start(host.stdin.unwrap(), to_guest, async move |count| {
            said.send(count).unwrap();
        });
        for text in ["one ", "two"] {
            // Each writer comes and goes, as a client that detaches and attaches again.
            OpenOptions::new().write(true).open(&name).unwrap().write_all(text.as_bytes()).unwrap();
            let mut buffer = vec![0; text.len()];
            guest.read_exact(&mut buffer).await.unwrap();
            assert_eq!(buffer, text.as_bytes());
        }
        assert!(total.try_recv().is_err());
        input.close();
        assert_eq!(total.await.unwrap(), 7);
    }

    #[test]
    fn a_missing_fifo_and_a_regular_file_are_named() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _guard = runtime.enter();
        let names = StdioNames { stdout: "/nonexistent/out".to_owned(), ..Default::default() };
        assert_eq!(HostStdio::open(&names).unwrap_err().to_string(), "cannot open stdout /nonexistent/out");
        let file = tempfile::NamedTempFile::new().unwrap();
        let names = StdioNames { stdin: file.path().to_str().unwrap().to_owned(), ..Default::default() };
        assert!(matches!(HostStdio::open(&names), Err(StdioError::NotFifo { stream: "stdin", .. })));
    }
}
