//! containerd-shim-machinen-v1: the containerd shim v2 of the runtime `io.machinen.v1`.
//!
//! ```text
//!   containerd --exec--> start  --spawns--> the server (this binary, without an action) --ttrpc--> containerd
//!              --exec--> delete              when the server has ended, or start has failed
//!              --exec--> -info               once per runtime, containerd 2.2 and newer
//! ```
#![forbid(unsafe_code)]

mod args;
mod delete;
mod error;
mod info;
mod logging;
mod member;
mod publisher;
mod server;
mod start;

use std::process::ExitCode;

use machinen::{error::chain, pod::anchor, pool, template};

use args::{Action, ShimArgs};
use error::ShimError;

fn main() -> ExitCode {
    if std::env::args().nth(1).is_some_and(|first| first == anchor::ARGUMENT) {
        anchor::main();
    }
    template::main_if_asked();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("containerd-shim-machinen-v1: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), ShimError> {
    let mut words = std::env::args().skip(1);
    if words.next().is_some_and(|first| first == pool::ARGUMENT) {
        return member::run(words.next());
    }
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
