//! Fetches memory when it is touched: `criu lazy-pages` answers the page faults of restored processes from
//! the images (userfaultfd(2)), and copies the remaining pages in the background.

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
    image_mount::ImageMount,
    reason::quote,
    rpc::{self, how},
};
use crate::{
    reaper::Reaper,
    sys::{self, WaitStatus},
};

const LOG: &str = "lazy-pages.log";

/// The process that serves the pages.
#[derive(Debug)]
pub(super) struct LazyPages {
    reaper: Reaper,
    pid: Pid,
    exit: Option<oneshot::Receiver<WaitStatus>>,
}

impl LazyPages {
    /// Starts the process, and returns when it accepts requests. `work` is the directory in which CRIU finds
    /// it.
    ///
    /// # Errors
    /// The process does not start.
    pub(super) async fn serve(reaper: &Reaper, images: &Path, work: &Path) -> Result<Self, CriuError> {
        let (ready, status) = pipe2(OFlag::O_CLOEXEC).map_err(|err| CriuError::Run(err.into()))?;
        let fd = status.as_raw_fd().to_string();
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
        let (pid, exit) = rpc::spawn(reaper, &args, &[status])?;
        let mut pages = Self { reaper: reaper.clone(), pid, exit: Some(exit) };
        // The process writes one byte when it is ready.
        let ready = sys::register(std::fs::File::from(ready), Interest::READABLE).map_err(CriuError::Run)?;
        match first_byte(&ready).await {
            Ok(true) => Ok(pages),
            Ok(false) => Err(CriuError::Died { how: how(pages.ended().await), log: quote(&work.join(LOG)) }),
            Err(source) => Err(CriuError::Talk(source)),
        }
    }

    /// Returns when every page was copied, or the processes have ended.
    ///
    /// # Errors
    /// Some pages are lost.
    pub(super) async fn fetched(mut self, images: ImageMount, work: &Path) -> Result<(), CriuError> {
        let exit = self.ended().await;
        drop(images);
        match exit {
            Some(exit) if exit.code() == 0 => Ok(()),
            exit => Err(CriuError::Pages { how: how(exit), log: quote(&work.join(LOG)) }),
        }
    }

    async fn ended(&mut self) -> Option<WaitStatus> {
        // If this is dropped earlier, the process is killed.
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
            // The reaper ignores the signal if the process has ended.
            let _ = self.reaper.signal(self.pid, libc::SIGKILL);
        }
    }
}

async fn first_byte(ready: &AsyncFd<std::fs::File>) -> std::io::Result<bool> {
    let mut byte = [0];
    ready.async_io(Interest::READABLE, |mut file| Ok(file.read(&mut byte)? > 0)).await
}
