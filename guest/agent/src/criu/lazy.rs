//! Memory that is fetched when it is touched: `criu lazy-pages` answers the page faults of restored processes from the
//! images (userfaultfd(2)), and copies what nobody touches in the background.

use std::{io::Read as _, os::fd::AsRawFd as _, path::Path};

use nix::{
    fcntl::OFlag,
    unistd::{Pid, pipe2},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::oneshot,
};

use super::{
    CriuError,
    mounted::Mounted,
    reason::quote,
    rpc::{self, how},
};
use crate::{
    reaper::Reaper,
    sys::{self, WaitStatus},
};

const LOG: &str = "lazy-pages.log";

/// The process that has the pages.
#[derive(Debug)]
pub(super) struct LazyPages {
    reaper: Reaper,
    pid: Pid,
    exit: Option<oneshot::Receiver<WaitStatus>>,
}

impl LazyPages {
    /// Starts it, and returns when processes can ask it. `work` is the directory in which they find it.
    ///
    /// # Errors
    /// It does not start.
    pub(super) async fn serve(reaper: &Reaper, images: &Path, work: &Path) -> Result<Self, CriuError> {
        let (ready, told) = pipe2(OFlag::O_CLOEXEC).map_err(|err| CriuError::Run(err.into()))?;
        let fd = told.as_raw_fd().to_string();
        let (images, work_dir) = (images.display().to_string(), work.display().to_string());
        let args = [
            "lazy-pages",
            "--images-dir",
            &images,
            "--work-dir",
            &work_dir,
            "--log-file",
            LOG,
            "-v3",
            "--status-fd",
            &fd,
        ];
        let (pid, exit) = rpc::spawn(reaper, &args, &[told])?;
        let mut pages = Self { reaper: reaper.clone(), pid, exit: Some(exit) };
        // One byte, or the end.
        let ready = sys::register(std::fs::File::from(ready), Interest::READABLE).map_err(CriuError::Run)?;
        match first_byte(&ready).await {
            Ok(true) => Ok(pages),
            Ok(false) => Err(CriuError::Died { how: how(pages.ended().await), log: quote(&work.join(LOG)) }),
            Err(source) => Err(CriuError::Talk(source)),
        }
    }

    /// Returns when every page is where it belongs, or the processes have ended.
    ///
    /// # Errors
    /// LazyPages are missing, and will be.
    pub(super) async fn fetched(mut self, images: Mounted, work: &Path) -> Result<(), CriuError> {
        let exit = self.ended().await;
        drop(images);
        match exit {
            Some(exit) if exit.code() == 0 => Ok(()),
            exit => Err(CriuError::Pages { how: how(exit), log: quote(&work.join(LOG)) }),
        }
    }

    async fn ended(&mut self) -> Option<WaitStatus> {
        // Dropped before, it is killed.
        let exit = match &mut self.exit {
            Some(exit) => exit.await.ok(),
            None => None,
        };
        self.exit = None;
        exit
    }
}

impl Drop for LazyPages {
    fn drop(&mut self) {
        if self.exit.is_some() {
            // It may have ended by now; the reaper knows.
            let _ = self.reaper.signal(self.pid, libc::SIGKILL);
        }
    }
}

async fn first_byte(ready: &AsyncFd<std::fs::File>) -> std::io::Result<bool> {
    let mut byte = [0];
    ready.async_io(Interest::READABLE, |mut file| Ok(file.read(&mut byte)? > 0)).await
}
