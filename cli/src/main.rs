//! The command line `machinen`: one verb a file.

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
    /// Say whether this host can run VMs, how, and what is missing.
    Check(check::CheckArgs),
    /// Look after the cache of disks made from image root file systems.
    Rootdisk(rootdisk::RootdiskArgs),
    /// Look after the saved VMs that starts are cloned from.
    Template(template::TemplateArgs),
    /// Look after the clones that wait for the next starts.
    Pool(pool::PoolArgs),
    /// Look at checkpoints of containers.
    Snapshot(snapshot::SnapshotArgs),
    /// Make a second container that continues from where a running one is.
    #[command(
        long_about = "Make a second container that continues from where a running one is: with the same processes and memory, and \
        what SRC has written until then, in a VM of its own. SRC runs on. NEW has SRC's image, labels and configuration, but \
        another hostname and machine id, and its output goes nowhere."
    )]
    Fork(fork::ForkArgs),
}

/// Runs one command; errors go to stderr in one line, with exit status 1 (2 for a wrong command line).
fn main() -> ExitCode {
    machinen::template::main_if_asked();
    // `machinen ... | head` ends like any other program.
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
