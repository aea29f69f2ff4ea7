//! containerd-shim-machinen-v1: the containerd shim v2 of the runtime `io.machinen.v1`.
//!
//! ```text
//!   containerd --exec--> start  --spawns--> the server (this binary, without an action) --ttrpc--> containerd
//!              --exec--> delete              when the server is gone, or start failed
//!              --exec--> -info               once per runtime, containerd 2.2 and newer
//! ```
#![forbid(unsafe_code)]

mod args;
mod delete;
mod error;
mod events;
mod info;
mod logging;
mod server;
mod start;
mod task;

use std::process::ExitCode;

use args::{Action, Args};
use machinen::{error::chain, pod::anchor};

fn main() -> ExitCode {
    if std::env::args().nth(1).is_some_and(|first| first == anchor::ARGUMENT) {
        anchor::main();
    }
    let result = Args::parse(std::env::args_os().skip(1)).and_then(|args| match args.action {
        Action::Start => start::run(&args),
        Action::Delete => delete::run(&args),
        Action::Info => info::run(),
        Action::Version => {
            println!("containerd-shim-machinen-v1 {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Action::Serve => server::run(&args),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("containerd-shim-machinen-v1: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}
