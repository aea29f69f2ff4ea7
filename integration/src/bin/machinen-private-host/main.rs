//! The programs with which tests use a host of their own (`machinen_integration::private_host`).
//!
//! `serve SOCKET` runs inside of the host and starts what `run SOCKET PROGRAM [ARGUMENT...]` asks for from outside,
//! with the standard streams and the environment of `run`. What the program leaves in the background has the host's
//! keeper as its ancestor, unlike what a program leaves that only enters the namespaces.
//!
//! `monitor REPORTS PID-FILE PROGRAM [ARGUMENT...]` is what conmon is for a runtime.

mod monitor;
mod run;
mod serve;

use std::{env, process::ExitCode};

use anyhow::{Result, bail};

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    match perform(&args) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("machinen-private-host: {error:#}");
            ExitCode::from(u8::MAX)
        }
    }
}

fn perform(args: &[String]) -> Result<u8> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["serve", socket] => serve::serve(socket.as_ref()).map(|()| 0),
        ["run", socket, program @ ..] if !program.is_empty() => run::run(socket.as_ref(), program),
        ["monitor", reports, pid_file, program @ ..] if !program.is_empty() => {
            monitor::monitor(reports.as_ref(), pid_file.as_ref(), program).map(|()| 0)
        }
        _ => bail!("usage: serve SOCKET | run SOCKET PROGRAM... | monitor REPORTS PID-FILE PROGRAM..."),
    }
}
