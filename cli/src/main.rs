//! The command line `machinen`: one file for each verb.

mod boot;
mod build;
mod check;
mod copy;
mod everyday;
mod failure;
mod find;
mod fork;
mod gc;
mod help;
mod image;
mod maintenance;
mod oci;
mod output;
mod pool;
mod prefix;
mod rights;
mod rootdisk;
mod snapshot;
mod template;
mod text;

use std::{process::ExitCode, sync::LazyLock};

use clap::{ArgAction, FromArgMatches as _, Parser, Subcommand};
use failure::Failure;
use machinen::{owner, spec::OCI_VERSION};

/// What `--version` prints after the name, in runc's form.
static VERSION: LazyLock<String> =
    LazyLock::new(|| format!("version {}\nspec: {OCI_VERSION}", env!("CARGO_PKG_VERSION")));

/// Container runtime that gives every pod a kernel of its own.
#[derive(Debug, Parser)]
#[command(name = "machinen", version = VERSION.as_str(), args_override_self = true, disable_version_flag = true)]
struct Cli {
    /// Print the version
    #[arg(long, short = 'v', short_alias = 'V', action = ArgAction::Version)]
    version: Option<bool>,
    #[command(flatten)]
    oci: oci::GlobalArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    #[command(flatten)]
    Everyday(everyday::EverydayVerb),
    #[command(flatten)]
    Oci(Box<oci::OciVerb>),
    #[command(flatten)]
    Maintenance(maintenance::MaintenanceVerb),
}

/// Runs one command; errors go to stderr in one line, with exit status 1 (2 for a wrong command line).
fn main() -> ExitCode {
    if let Some(code) = machinen::reexec::dispatch(&[
        machinen::template::ENTRY_POINTS,
        oci::ENTRY_POINTS,
        everyday::ENTRY_POINTS,
    ]) {
        return code;
    }
    // Lets `machinen ... | head` end like any other program.
    machinen::sys::end_on_broken_pipe();
    let cli = Cli::from_arg_matches(&help::command().get_matches()).unwrap_or_else(|error| error.exit());
    match run(&cli.oci, cli.verb) {
        Ok(code) => code,
        Err(failure) => {
            cli.oci.report(&failure);
            ExitCode::FAILURE
        }
    }
}

fn run(oci: &oci::GlobalArgs, verb: Verb) -> Result<ExitCode, Failure> {
    if owner::user().is_some() {
        // Locks and sockets are there, so it has to be the user's alone.
        owner::make_run_dir()?;
    }
    match verb {
        Verb::Everyday(verb) => everyday::run(oci, verb),
        Verb::Oci(verb) => Ok(oci::run(oci, &verb)?),
        Verb::Maintenance(verb) => maintenance::run(oci, verb),
    }
}
