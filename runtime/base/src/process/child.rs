//! A running child process: watched by its pidfd, reaped exactly once, killed when its owner drops it.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    process::{ChildStderr, ChildStdout},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, killpg},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::Pid,
};
use tokio::{io::unix::AsyncFd, sync::watch};

use super::{ProcessError, ProcessExit, Spawn};
use crate::sys;

/// A child process. Dropping it sends SIGKILL, and a background task reaps it.
#[derive(Debug)]
pub struct Child {
    program: String,
    pid: u32,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    exit: watch::Receiver<Option<ProcessExit>>,
    /// What the child prints, if its [`Spawn`] has [`super::Stdio::Pipe`].
    pub stdout: Option<ChildStdout>,
    /// The standard error of the child, under the same condition as its standard output.
    pub stderr: Option<ChildStderr>,
}

impl Spawn {
    /// Starts the program; must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The program cannot be started. If it is not found, the error says what to install.
    pub fn start(self) -> Result<Child, ProcessError> {
        let (mut child, program) = self.spawn_std()?;
        let pid = child.id();
        let opened = sys::pidfd::open(pid).and_then(sys::async_fd);
        let pidfd = match opened {
            Ok(pidfd) => Arc::new(pidfd),
            Err(source) => {
                // The process cannot be supervised without its pidfd. It has not been reaped, so the pid is
                // still its own.
                let ended = child.kill().and_then(|()| child.wait());
                drop(ended);
                return Err(ProcessError::Child { action: "watch", program, pid, source });
            }
        };
        let (sender, exit) = watch::channel(None);
        let watched = Arc::clone(&pidfd);
        tokio::spawn(async move {
            let exit = reap(&watched).await;
            sender.send_replace(Some(exit));
        });
        Ok(Child { program, pid, pidfd, exit, stdout: child.stdout.take(), stderr: child.stderr.take() })
    }
}

impl Child {
    /// A process that something else reaps, which sends how the process has ended.
    pub(super) fn kept(
        program: String,
        pid: u32,
        pidfd: Arc<AsyncFd<OwnedFd>>,
        exit: watch::Receiver<Option<ProcessExit>>,
    ) -> Self {
        Self { program, pid, pidfd, exit, stdout: None, stderr: None }
    }

    /// Gives up the care for the child, which goes on; returns its pid. It still ends with the thread that has started it.
    pub fn release(self) -> u32 {
        std::mem::ManuallyDrop::new(self).pid
    }

    /// The name or path of the program that the child executes.
    pub fn program(&self) -> &str {
        &self.program
    }

    /// Valid until the child has been reaped. Use it to name the child, and [`Child::signal`] to act on the
    /// child.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How the child ended, if it has.
    pub fn try_exit(&self) -> Option<ProcessExit> {
        *self.exit.borrow()
    }

    /// Resolves when the child has ended and been reaped, for any number of callers at any time.
    pub fn exited(&self) -> impl Future<Output = ProcessExit> + Send + 'static {
        let mut exit = self.exit.clone();
        async move {
            let exited = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
            match exited {
                Some(exit) => exit,
                // The reaping task ends early only when the runtime shuts down, which drops this future too.
                None => std::future::pending().await,
            }
        }
    }

    /// Sends a signal. It is not an error if the child has ended already.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn signal(&self, signal: Signal) -> Result<(), ProcessError> {
        match sys::pidfd::send_signal(self.pidfd.as_fd(), signal) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(ProcessError::Child {
                action: "signal",
                program: self.program.clone(),
                pid: self.pid,
                source: error,
            }),
            _ => Ok(()),
        }
    }

    /// SIGSTOP; all threads of the child stand when this returns. Blocks for the moment that this takes.
    ///
    /// # Errors
    /// The kernel refuses the signal, or the child has ended.
    pub fn stop(&self) -> Result<(), ProcessError> {
        self.signal(Signal::SIGSTOP)?;
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        // By its pid, which is still the child's: a task of this thread reaps the child, and does not run meanwhile. A wait for
        // the pidfd would not block.
        let source = loop {
            match waitid(Id::Pid(Pid::from_raw(self.pid.cast_signed())), flags) {
                Ok(WaitStatus::Stopped(..)) => return Ok(()),
                Ok(_) => break Errno::ESRCH.into(),
                Err(Errno::EINTR) => {}
                Err(error) => break error.into(),
            }
        };
        Err(ProcessError::Child { action: "stop", program: self.program.clone(), pid: self.pid, source })
    }

    /// SIGKILL for the child and all processes of its group, which it was made the leader of; the child has been
    /// reaped when this returns. Processes that have left the group, or that outlive the child, are not killed. To be
    /// called on the thread that has started the child.
    ///
    /// # Errors
    /// The kernel refuses the signal.
    pub async fn kill_group(&self) -> Result<ProcessExit, ProcessError> {
        // The number of the group is still the child's: a task of this thread reaps the child, and does not run
        // meanwhile.
        if self.try_exit().is_none()
            && let Err(errno) = killpg(Pid::from_raw(self.pid.cast_signed()), Signal::SIGKILL)
            && errno != Errno::ESRCH
        {
            return Err(ProcessError::Child {
                action: "kill the process group of",
                program: self.program.clone(),
                pid: self.pid,
                source: errno.into(),
            });
        }
        Ok(self.exited().await)
    }

    /// The child's limits, which its owner may raise while it runs.
    pub fn limits(&self) -> ChildLimits {
        ChildLimits { program: self.program.clone(), pid: self.pid, exit: self.exit.clone() }
    }

    /// SIGTERM, then SIGKILL when the child has not ended within `grace`; it has been reaped when this
    /// returns.
    ///
    /// # Errors
    /// The kernel refuses the signal.
    pub async fn terminate(&self, grace: Duration) -> Result<ProcessExit, ProcessError> {
        self.signal(Signal::SIGTERM)?;
        match tokio::time::timeout(grace, self.exited()).await {
            Ok(exit) => Ok(exit),
            Err(_) => self.kill().await,
        }
    }

    /// SIGKILL; the child has been reaped when this returns.
    ///
    /// # Errors
    /// The kernel refuses the signal.
    pub async fn kill(&self) -> Result<ProcessExit, ProcessError> {
        self.signal(Signal::SIGKILL)?;
        Ok(self.exited().await)
    }
}

/// The resource limits of a running [`Child`].
#[derive(Debug, Clone)]
pub struct ChildLimits {
    program: String,
    pid: u32,
    exit: watch::Receiver<Option<ProcessExit>>,
}

impl ChildLimits {
    /// Whether this process may raise limits at all. Where it may not (without CAP_SYS_RESOURCE), a child has
    /// to be started with the limits that it will need.
    pub fn can_be_raised() -> bool {
        sys::limits::can_raise()
    }

    /// Raises the size to which the child may make files grow, if the limit is lower (RLIMIT_FSIZE). It is not an
    /// error if the child has ended already. To be called on the thread that has started the child.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn allow_file_size(&self, bytes: u64) -> Result<(), ProcessError> {
        // The pid is still the child's: a task of this thread reaps the child, and does not run meanwhile.
        if self.exit.borrow().is_some() {
            return Ok(());
        }
        match sys::limits::raise_file_size(self.pid, bytes) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(ProcessError::Child {
                action: "raise a limit of",
                program: self.program.clone(),
                pid: self.pid,
                source: error,
            }),
            _ => Ok(()),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.try_exit().is_none()
            && let Err(error) = self.signal(Signal::SIGKILL)
        {
            tracing::warn!(program = self.program, pid = self.pid, "cannot kill a child: {error}");
        }
    }
}

/// Reaps a process that has no [`Child`], so that it does not stay a zombie while this process lives.
pub(super) fn reap_in_background(child: std::process::Child, program: String) {
    let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
    match sys::pidfd::open(child.id()).and_then(sys::async_fd) {
        Ok(pidfd) => drop(runtime.spawn(async move { reap(&pidfd).await })),
        Err(error) => tracing::warn!(program, "cannot watch a process: {error}"),
    }
}

async fn reap(pidfd: &AsyncFd<OwnedFd>) -> ProcessExit {
    loop {
        // A pidfd is readable when its process has ended. If waiting for that fails, waitid(2) decides.
        let ready = pidfd.readable().await;
        match waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
            Ok(WaitStatus::Exited(_, code)) => return ProcessExit::Code(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return ProcessExit::Signal(signal as i32),
            Ok(_) => {}
            Err(error) => {
                tracing::error!("cannot wait for a child: {}", io::Error::from(error));
                return ProcessExit::Code(-1);
            }
        }
        if let Ok(mut guard) = ready {
            guard.clear_ready();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufRead as _;

    use super::*;
    use crate::process::Stdio;

    fn shell(script: &str) -> Child {
        Spawn::new("sh").args(["-c", script]).stdout(Stdio::Pipe).start().unwrap()
    }

    fn wait_for_line(child: &mut Child) -> String {
        let mut line = String::new();
        io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        line
    }

    #[tokio::test]
    async fn every_waiter_gets_the_exit() {
        let child = shell("exit 7");
        let (one, two) = tokio::join!(child.exited(), child.exited());
        assert_eq!((one, two), (ProcessExit::Code(7), ProcessExit::Code(7)));
        assert_eq!(child.exited().await, ProcessExit::Code(7));
        assert!(!std::path::Path::new(&format!("/proc/{}", child.pid())).exists());
        child.signal(Signal::SIGTERM).unwrap();
    }

    #[tokio::test]
    async fn a_stubborn_child_is_killed_after_its_grace() {
        let mut child = shell("trap '' TERM; echo ready; while :; do read x < /dev/zero; done");
        wait_for_line(&mut child);
        assert_eq!(
            child.terminate(Duration::from_millis(20)).await.unwrap(),
            ProcessExit::Signal(libc::SIGKILL)
        );
    }

    #[tokio::test]
    async fn a_willing_child_ends_within_its_grace() {
        let mut child = shell("trap 'exit 3' TERM; echo ready; sleep 100 & wait");
        wait_for_line(&mut child);
        assert_eq!(child.terminate(Duration::from_secs(10)).await.unwrap(), ProcessExit::Code(3));
    }

    #[tokio::test]
    async fn a_group_ends_with_its_leader() {
        let mut child = shell("sleep 1000 & echo $!; exec sleep 1000");
        let other: i32 = wait_for_line(&mut child).trim().parse().unwrap();
        let ended = sys::async_fd(sys::pidfd::open(other.cast_unsigned()).unwrap()).unwrap();
        assert_eq!(child.kill_group().await.unwrap(), ProcessExit::Signal(libc::SIGKILL));
        drop(tokio::time::timeout(Duration::from_secs(10), ended.readable()).await.expect("it was killed"));
        assert_eq!(child.kill_group().await.unwrap(), ProcessExit::Signal(libc::SIGKILL));
    }

    #[tokio::test]
    async fn a_limit_of_file_sizes_is_raised_and_not_lowered() {
        let limits = crate::process::ResourceLimits { file_size: Some(8192), ..Default::default() };
        let jail = crate::process::Jail { limits, ..Default::default() };
        let child = Spawn::new("sleep").args(["100"]).jail(jail).start().unwrap();
        let limit = || {
            let text = std::fs::read_to_string(format!("/proc/{}/limits", child.pid())).unwrap();
            let line = text.lines().find(|line| line.starts_with("Max file size")).unwrap().to_owned();
            line.split_whitespace().nth(4).unwrap().parse::<u64>().unwrap()
        };
        assert_eq!(limit(), 8192);
        if !ChildLimits::can_be_raised() {
            child.limits().allow_file_size(4096).unwrap();
            let refused = child.limits().allow_file_size(1 << 30).unwrap_err();
            assert!(refused.to_string().contains("raise a limit of sleep"), "{refused}");
            return;
        }
        child.limits().allow_file_size(1 << 30).unwrap();
        child.limits().allow_file_size(4096).unwrap();
        assert_eq!(limit(), 1 << 30);
        child.kill().await.unwrap();
        child.limits().allow_file_size(1 << 31).unwrap();
    }

    #[tokio::test]
    async fn dropping_a_child_kills_and_reaps_it() {
        let child = shell("exec sleep 100");
        let exited = child.exited();
        drop(child);
        assert_eq!(exited.await, ProcessExit::Signal(libc::SIGKILL));
    }
}
