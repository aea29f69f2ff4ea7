//! The command line `machinen`: one file for each verb.

mod check;
mod fork;
mod oci;
mod output;
mod pool;
mod prefix;
mod rootdisk;
mod snapshot;
mod template;
mod text;

use std::{process::ExitCode, sync::LazyLock};

use clap::{Parser, Subcommand};
use machinen::{config::Config, error::chain, spec::OCI_VERSION};

/// What `--version` prints after the name, in runc's form.
static VERSION: LazyLock<String> =
    LazyLock::new(|| format!("version {}\nspec: {OCI_VERSION}", env!("CARGO_PKG_VERSION")));

/// Container runtime that gives every pod a kernel of its own.
#[derive(Debug, Parser)]
#[command(name = "machinen", version = VERSION.as_str(), args_override_self = true)]
struct Cli {
    #[command(flatten)]
    oci: oci::GlobalArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    #[command(flatten)]
    Oci(oci::OciVerb),
    #[command(flatten)]
    Own(OwnVerb),
}

/// Verbs that no other OCI runtime has.
#[derive(Debug, Subcommand)]
enum OwnVerb {
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
    if let Some(code) = machinen::reexec::dispatch(&[machinen::template::ENTRY_POINTS, oci::ENTRY_POINTS]) {
        return code;
    }
    // Lets `machinen ... | head` end like any other program.
    machinen::sys::end_on_broken_pipe();
    let cli = Cli::parse();
    match run(&cli.oci, cli.verb) {
        Ok(code) => code,
        Err(error) => {
            let message = chain(error.as_ref());
            eprintln!("machinen: {message}");
            cli.oci.report(&message);
            ExitCode::FAILURE
        }
    }
}

fn run(oci: &oci::GlobalArgs, verb: Verb) -> Result<ExitCode, Box<dyn std::error::Error>> {
    match verb {
        Verb::Oci(verb) => Ok(oci::run(oci, &verb)?),
        Verb::Own(verb) => run_own(verb),
    }
}

fn run_own(verb: OwnVerb) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let config = Config::load()?;
    match verb {
        OwnVerb::Check(args) => Ok(check::run(&args, &config)),
        OwnVerb::Rootdisk(args) => {
            let json = args.json;
            Ok(rootdisk::run(args, &config.rootdisk)?.print(json))
        }
        OwnVerb::Template(args) => Ok(template::run(&args, config)?.print(args.json)),
        OwnVerb::Pool(args) => Ok(pool::run(&args, &config)?.print(args.json)),
        OwnVerb::Snapshot(args) => Ok(snapshot::run(&args)?.print(args.json)),
        OwnVerb::Fork(args) => {
            fork::run(&args, &config)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
