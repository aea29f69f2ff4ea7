//! The command line `machinen`: one file for each verb.

mod check;
mod fork;
mod output;
mod pool;
mod prefix;
mod rootdisk;
mod snapshot;
mod template;
mod text;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use machinen::{config::Config, error::chain};

/// Container runtime that gives every pod a kernel of its own.
#[derive(Debug, Parser)]
#[command(name = "machinen", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Check whether and how this host can run VMs, and what is missing.
    Check(check::CheckArgs),
    /// Manage the cache of disks that are made from image root file systems.
    Rootdisk(rootdisk::RootdiskArgs),
    /// Manage the templates: saved VMs from which starts are cloned.
    Template(template::TemplateArgs),
    /// Manage the warm pool: clones that wait for the next starts.
    Pool(pool::PoolArgs),
    /// Manage checkpoints on disk (snapshot bundles).
    Snapshot(snapshot::SnapshotArgs),
    /// Make a second container that continues from where a running one is.
    #[command(
        long_about = "Make a second container that continues from where a running one is: with the same processes \
        and memory, and what SRC has written until then, in a VM of its own. SRC continues to run. NEW has SRC's \
        image, labels and configuration, but another hostname and machine id, and its output is discarded."
    )]
    Fork(fork::ForkArgs),
}

/// Runs one command; errors go to stderr in one line, with exit status 1 (2 for a wrong command line).
fn main() -> ExitCode {
    if let Some(code) = machinen::reexec::dispatch(&[machinen::template::ENTRY_POINTS]) {
        return code;
    }
    // Lets `machinen ... | head` end like any other program.
    machinen::sys::end_on_broken_pipe();
    let cli = Cli::parse();
    match run(cli.verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("machinen: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let config = Config::load()?;
    match verb {
        Verb::Check(args) => Ok(check::run(&args, &config)),
        Verb::Rootdisk(args) => {
            let json = args.json;
            Ok(rootdisk::run(args, &config.rootdisk)?.print(json))
        }
        Verb::Template(args) => Ok(template::run(&args, config)?.print(args.json)),
        Verb::Pool(args) => Ok(pool::run(&args, &config)?.print(args.json)),
        Verb::Snapshot(args) => Ok(snapshot::run(&args)?.print(args.json)),
        Verb::Fork(args) => {
            fork::run(&args, &config)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
