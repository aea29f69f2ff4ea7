//! machinen's guest agent: PID 1 of the microVM.
//!
//! The agent boots user space, dials the host, and then owns every container and every process of the VM.
//! With `--serial-fd` the same binary runs as an ordinary process in private namespaces, for tests of the
//! real agent without a VM. CRIU calls it under the name `tar` (`criu/tmpfs.rs`), and it is the program of a pod's sandbox
//! under the name `pause`.

#![deny(unsafe_code)]
#![warn(unreachable_pub)]

mod agent;
mod boot;
mod cgroup;
mod channel;
mod configure;
mod console;
mod container;
mod context;
mod criu;
mod disk;
mod engine;
mod error;
mod layer;
mod network;
mod options;
mod pause;
mod process;
mod reaper;
mod rehearsal;
mod service;
mod shares;
mod shutdown;
mod stdio;
#[expect(unsafe_code, reason = "the only module with system calls that no crate wraps")]
mod sys;
mod uevent;
mod view;

use std::{process::ExitCode, time::Duration};

use engine::{Engine, EntryPoints};
use options::Options;

fn main() -> ExitCode {
    if let Some(code) = criu::run_as_tar().or_else(criu::run_as_duplicate).or_else(pause::run_as_pause) {
        return code;
    }
    console::install_panic_hook();
    if let Err(err) = run() {
        console::fatal(&err);
    }
    ExitCode::SUCCESS
}

fn run() -> Result<(), agent::AgentError> {
    let options = Options::from_environment()?;
    let machine = boot::boot(options)?;
    console::trace("booted");
    // The engine's process is forked while this one still has a single thread.
    let engine = Engine::fork(EntryPoints { serve_view: view::serve })?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // A template has a thread for what blocks, which clones keep.
        .thread_keep_alive(Duration::MAX)
        .build()
        .map_err(agent::AgentError::Runtime)?;
    runtime.block_on(agent::run(machine, engine))
}
