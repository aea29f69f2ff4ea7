//! containerd-shim-machinen-v1: the containerd shim v2 of the runtime `io.machinen.v1`.
//!
//! ```text
//!   containerd --exec--> start  --spawns--> the server (this binary, without an action) --ttrpc--> containerd
//!              --exec--> delete              when the server has ended, or start has failed
//!              --exec--> -info               once per runtime, containerd 2.2 and newer
//! ```
#![forbid(unsafe_code)]

mod args;
mod connections;
mod delete;
mod error;
mod group;
mod info;
mod logging;
mod member;
mod options;
mod publisher;
mod server;
mod start;

use std::process::ExitCode;

use machinen::{
    error::chain,
    pod::anchor,
    pool,
    reexec::{self, EntryPoint},
    shares, template,
};

use args::{Action, ShimArgs};
use error::ShimError;

fn main() -> ExitCode {
    let entry_points = [
        template::ENTRY_POINTS,
        &[anchor::ENTRY_POINT, shares::ENTRY_POINT, shares::MAPPING_ENTRY_POINT, MEMBER],
    ];
    reexec::dispatch(&entry_points).unwrap_or_else(|| report(run()))
}

/// A process that becomes a server when a container needs one.
const MEMBER: EntryPoint = EntryPoint { name: pool::MEMBER, main: |args| report(member::run(&args)) };

fn report(result: Result<(), ShimError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("containerd-shim-machinen-v1: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), ShimError> {
    let args = ShimArgs::parse(std::env::args_os().skip(1))?;
    match args.action {
        Action::Start => start::run(&args),
        Action::Delete => delete::run(&args),
        Action::Info => info::run(),
        Action::Version => {
            println!("containerd-shim-machinen-v1 {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Action::Serve => server::run(&args),
    }
}
