//! The program of a pod's sandbox, as which the agent is started by the name `pause`: it holds the pod's namespaces, and is
//! the first process where the containers share their processes.

use std::{env, io, path::Path, process::ExitCode};

use machinen_protocol::PAUSE;
use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
};

/// Waits until SIGTERM or SIGINT, if this program was started as `pause`. Until then it reaps the processes whose parents
/// have ended. With `-v` it prints its version instead.
pub(crate) fn run_as_pause() -> Option<ExitCode> {
    let name = env::args_os().next()?;
    if Path::new(&name).file_name() != Path::new(PAUSE).file_name() {
        return None;
    }
    if env::args_os().nth(1).is_some_and(|option| option == "-v") {
        println!("pause {}", env!("CARGO_PKG_VERSION"));
        return Some(ExitCode::SUCCESS);
    }
    match wait() {
        Ok(()) => Some(ExitCode::SUCCESS),
        Err(error) => {
            eprintln!("pause: {error}");
            Some(ExitCode::FAILURE)
        }
    }
}

fn wait() -> io::Result<()> {
    let signals: SigSet = [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    signals.thread_block()?;
    loop {
        if signals.wait()? != Signal::SIGCHLD {
            return Ok(());
        }
        // One signal may stand for several processes.
        while !matches!(
            waitpid(None, Some(WaitPidFlag::WNOHANG)),
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD)
        ) {}
    }
}
