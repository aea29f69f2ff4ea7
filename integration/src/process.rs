//! Programs that the harness runs: their output, exit status and time, and a deadline on all of it.

use std::{
    ffi::OsString,
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sys;

/// Default for the longest that a program may take: long enough for a VM on an emulated, busy processor.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// A command line, before it runs. Of the harness's environment, only `PATH` is passed on.
#[derive(Debug, Clone)]
pub struct Invocation {
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    dir: Option<PathBuf>,
    stdin: bool,
    deadline: Duration,
}

/// The result of a program that has ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit status; 128+n when signal n ended it.
    pub status: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub duration: Duration,
}

/// A running program.
#[derive(Debug)]
pub struct Running {
    child: Child,
    name: String,
    started: Instant,
    deadline: Duration,
    stdout: Stream,
    stderr: Stream,
}

/// A stream of a running program, read continuously.
#[derive(Debug)]
pub struct Stream {
    state: Arc<(Mutex<Received>, Condvar)>,
}

#[derive(Debug, Default)]
struct Received {
    bytes: Vec<u8>,
    ended: bool,
}

impl Invocation {
    pub fn new(program: impl AsRef<Path>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            dir: None,
            stdin: false,
            deadline: DEADLINE,
        }
    }

    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    pub fn args<I: IntoIterator<Item = A>, A: Into<OsString>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Has the program be run by another one, which gets it and its arguments after its own.
    pub fn under(self, wrapper: Self) -> Self {
        let args = wrapper.args.into_iter().chain([self.program.into_os_string()]).chain(self.args).collect();
        Self { program: wrapper.program, args, ..self }
    }

    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    pub fn current_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dir = Some(dir.into());
        self
    }

    /// Makes the program's stdin a pipe; without it stdin is `/dev/null`. See [`Running::stdin`].
    pub fn with_stdin(mut self) -> Self {
        self.stdin = true;
        self
    }

    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Starts the program; its output is collected while it runs.
    ///
    /// # Errors
    /// The program cannot be executed.
    pub fn spawn(&self) -> Result<Running> {
        let mut child = self
            .command(if self.stdin { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", self.program.display()))?;
        let stdout = Stream::read(child.stdout.take().context("no stdout")?);
        let stderr = Stream::read(child.stderr.take().context("no stderr")?);
        Ok(Running {
            child,
            name: self.to_string(),
            started: Instant::now(),
            deadline: self.deadline,
            stdout,
            stderr,
        })
    }

    /// Runs the program to its end. A status other than 0 is a result, not an error.
    ///
    /// # Errors
    /// The program cannot be executed, or its deadline passed (it is killed then).
    pub fn run(&self) -> Result<Output> {
        self.spawn()?.wait()
    }

    #[expect(clippy::disallowed_methods, reason = "the harness's one place that starts programs")]
    fn command(&self, stdin: Stdio) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args).env_clear().stdin(stdin);
        command.envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        command
    }

    /// Starts the program on a terminal.
    ///
    /// # Errors
    /// The program cannot be executed.
    pub(crate) fn spawn_on(&self, terminal: &OwnedFd) -> Result<Child> {
        let stdio = || terminal.try_clone().map(Stdio::from).context("cannot duplicate a terminal");
        self.command(stdio()?)
            .stdout(stdio()?)
            .stderr(stdio()?)
            .spawn()
            .with_context(|| format!("cannot run {}", self.program.display()))
    }

    /// Starts a program that serves until its stdin ends; stdout and stderr come back as pipes.
    ///
    /// # Errors
    /// The program cannot be executed.
    pub fn serve(&self) -> Result<Child> {
        self.command(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", self.program.display()))
    }
}

impl std::fmt::Display for Invocation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.program.display())?;
        self.args.iter().try_for_each(|arg| write!(f, " {}", arg.display()))
    }
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The writing end of the program's stdin, once; present when the invocation asked for it.
    pub fn stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// Waits until the program has written a text to its stdout.
    ///
    /// # Errors
    /// The text did not come before the program's deadline or end.
    pub fn wait_for_stdout(&self, text: &str) -> Result<()> {
        let left = self.deadline.saturating_sub(self.started.elapsed());
        ensure!(self.stdout.contains(text, left), "`{}` did not print {text:?}", self.name);
        Ok(())
    }

    /// Waits for the program's end, but not for that of its streams, which other programs may have inherited. Returns
    /// the exit status.
    ///
    /// # Errors
    /// The deadline passed; the program was killed.
    pub fn wait_for_exit(&mut self) -> Result<i32> {
        let left = self.deadline.saturating_sub(self.started.elapsed());
        let ended = wait_for_end(self.child.id(), left)?;
        if !ended {
            self.child.kill().context("cannot kill an overdue program")?;
        }
        ensure!(ended, "`{}` did not end within {:?}", self.name, self.deadline);
        // Unlike `wait`, this leaves stdin open for those that have inherited it.
        let status = self.child.try_wait().context("cannot wait for a child")?;
        status.map(status_of).context("a child that has ended has no status")
    }

    /// What the program, and those that have inherited its streams, have written so far to stdout and stderr.
    pub fn written(&self) -> [String; 2] {
        [&self.stdout, &self.stderr].map(|stream| String::from_utf8_lossy(&stream.so_far()).into_owned())
    }

    /// Waits for the program's end.
    ///
    /// # Errors
    /// The deadline passed; the program was killed.
    pub fn wait(mut self) -> Result<Output> {
        drop(self.child.stdin.take());
        let ended = wait_for_end(self.child.id(), self.deadline.saturating_sub(self.started.elapsed()))?;
        if !ended {
            self.child.kill().context("cannot kill an overdue program")?;
        }
        let status = self.child.wait().context("cannot wait for a child")?;
        let duration = self.started.elapsed();
        let output = Output {
            status: status_of(status),
            stdout: self.stdout.to_end(),
            stderr: self.stderr.to_end(),
            duration,
        };
        if !ended {
            bail!("`{}` did not end within {:?}: {output}", self.name, self.deadline);
        }
        Ok(output)
    }
}

/// 128+n when signal n ended it.
fn status_of(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

impl Drop for Running {
    fn drop(&mut self) {
        // After `wait` both calls find a reaped child and do nothing.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Output {
    /// Lossy, for messages and for output that is known to be text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// # Errors
    /// The status was not 0; both streams are quoted.
    pub fn ok(self) -> Result<Self> {
        ensure!(self.status == 0, "{self}");
        Ok(self)
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { status, duration, .. } = self;
        write!(f, "status {status} after {duration:.1?}")?;
        for (name, text) in [("stdout", self.text()), ("stderr", self.error_text())] {
            let text = text.trim_end();
            match (text.char_indices().nth(1500), text.char_indices().nth_back(500)) {
                (Some((head, _)), Some((tail, _))) if head < tail => {
                    write!(f, "\n  {name}: {} ... {}", &text[..head], &text[tail..])?;
                }
                _ => write!(f, "\n  {name}: {text}")?,
            }
        }
        Ok(())
    }
}

/// Waits until a process ends, also one that is no child of this process; false after the given time.
///
/// # Errors
/// The process cannot be watched.
pub fn wait_for_end(pid: u32, time: Duration) -> Result<bool> {
    let fd = match sys::pidfd_open(pid) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(true),
        fd => fd.with_context(|| format!("cannot watch the process {pid}"))?,
    };
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
    Ok(poll(&mut fds, timeout).context("cannot poll a pidfd")? > 0)
}

impl Stream {
    /// Reads a source to its end, in a thread.
    pub fn read(mut source: impl Read + Send + 'static) -> Self {
        let state = Arc::new((Mutex::new(Received::default()), Condvar::new()));
        std::thread::spawn({
            let state = Arc::clone(&state);
            move || {
                let (received, grown) = &*state;
                let mut buffer = vec![0; 64 << 10];
                loop {
                    let read = source.read(&mut buffer);
                    let mut received = received.lock().expect("readers do not panic");
                    match read {
                        Ok(count) if count > 0 => received.bytes.extend_from_slice(&buffer[..count]),
                        // Bytes that were read before an error are kept.
                        _ => received.ended = true,
                    }
                    grown.notify_all();
                    if received.ended {
                        return;
                    }
                }
            }
        });
        Self { state }
    }

    /// Waits until a text has been read, for this time at most; false when it has not come.
    pub fn contains(&self, text: &str, time: Duration) -> bool {
        let has = |bytes: &[u8]| bytes.windows(text.len()).any(|window| window == text.as_bytes());
        let (received, grown) = &*self.state;
        let received = received.lock().expect("readers do not panic");
        let waited = grown
            .wait_timeout_while(received, time, |received| !has(&received.bytes) && !received.ended)
            .expect("readers do not panic");
        has(&waited.0.bytes)
    }

    /// Waits for the end of the stream, for this time at most; false when it has not come.
    pub fn ends(&self, time: Duration) -> bool {
        let (received, grown) = &*self.state;
        let received = received.lock().expect("readers do not panic");
        let waited = grown.wait_timeout_while(received, time, |received| !received.ended);
        waited.expect("readers do not panic").0.ended
    }

    /// All bytes that have been read so far.
    pub fn so_far(&self) -> Vec<u8> {
        self.state.0.lock().expect("readers do not panic").bytes.clone()
    }

    /// Everything, once the stream has ended.
    fn to_end(&self) -> Vec<u8> {
        let (received, grown) = &*self.state;
        let received = received.lock().expect("readers do not panic");
        let mut received =
            grown.wait_while(received, |received| !received.ended).expect("readers do not panic");
        std::mem::take(&mut received.bytes)
    }
}
