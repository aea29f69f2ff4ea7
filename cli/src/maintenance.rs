//! The verbs for the host and its caches, and for checkpoints.

use std::process::ExitCode;

use clap::Subcommand;
use machinen::config::Config;

use crate::{check, failure::Failure, gc, help, oci::GlobalArgs, pool, rootdisk, snapshot, template};

/// Verbs for what containers are made of.
#[derive(Debug, Subcommand)]
pub(crate) enum MaintenanceVerb {
    /// Check whether and how this host can run VMs, and what is missing.
    Check(check::CheckArgs),
    /// Manage checkpoints on disk (snapshot bundles).
    Snapshot(snapshot::SnapshotArgs),
    /// Manage the cache of disks that are made from image root file systems.
    Rootdisk(rootdisk::RootdiskArgs),
    /// Manage the templates: saved VMs from which starts are cloned.
    Template(template::TemplateArgs),
    /// Manage the warm pool: clones that wait for the next starts.
    Pool(pool::PoolArgs),
    /// Remove what is left over: unused images and disks, outdated templates, remains of processes that were killed.
    #[command(
        long_about = "Remove what is left over: bundles and pods whose containers are gone, images and disks that no \
        container has used for a while, templates that are gone or outdated, and what forks that were killed have left. \
        Nothing that a container uses is removed. The exit status is 1 if something cannot be removed."
    )]
    Gc(gc::GcArgs),
    /// Write the manual pages.
    #[command(hide = true)]
    Man(help::ManArgs),
    /// Print the completions of a shell.
    #[command(hide = true)]
    Completions(help::CompletionsArgs),
}

/// # Errors
/// The verb has failed.
pub(crate) fn run(global: &GlobalArgs, verb: MaintenanceVerb) -> Result<ExitCode, Failure> {
    match verb {
        // They are used where nothing is configured.
        MaintenanceVerb::Man(args) => return done(help::write_pages(&args)),
        MaintenanceVerb::Completions(args) => return done(help::print_completions(&args)),
        _ => {}
    }
    let config = Config::load()?;
    match verb {
        MaintenanceVerb::Check(args) => Ok(check::run(&args, &config)),
        MaintenanceVerb::Rootdisk(args) => {
            let json = args.json;
            Ok(rootdisk::run(args, &config.rootdisk)?.print(json))
        }
        MaintenanceVerb::Template(args) => Ok(template::run(&args, config)?.print(args.json)),
        MaintenanceVerb::Pool(args) => Ok(pool::run(&args, &config)?.print(args.json)),
        MaintenanceVerb::Snapshot(args) => Ok(snapshot::run(&args)?.print(args.json)),
        MaintenanceVerb::Gc(args) => Ok(gc::run(global, &args, &config)?.print(args.json)),
        MaintenanceVerb::Man(_) | MaintenanceVerb::Completions(_) => Ok(ExitCode::SUCCESS),
    }
}

fn done<E: Into<Failure>>(result: Result<(), E>) -> Result<ExitCode, Failure> {
    result.map(|()| ExitCode::SUCCESS).map_err(Into::into)
}
