//! `machinen pool`: the clones that wait for the next starts.

use clap::{Args, Subcommand};
use serde_json::json;

use machinen::config::Config;
use machinen::pool::{self, PoolError};

/// Arguments of `machinen pool`.
#[derive(Debug, Args)]
pub struct PoolArgs {
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the sockets of the clones that are ready
    Ls,
    /// End all clones that are ready, those of other configurations too; the next start makes new ones if `pool.size` asks
    /// for them
    Drain,
}

/// Runs one of the commands and prints its result.
///
/// # Errors
/// The pool's directory cannot be read, or a member does not end.
pub fn run(args: &PoolArgs, config: &Config) -> Result<(), PoolError> {
    let (text, value) = match args.command {
        Command::Ls => {
            let members = pool::members(&config.pool.dir)?;
            (members.iter().map(|path| format!("{}\n", path.display())).collect(), json!(members))
        }
        Command::Drain => {
            let ended = pool::drain(&config.pool.dir)?;
            (format!("{ended} ended\n"), json!({ "ended": ended }))
        }
    };
    if args.json {
        println!("{value:#}");
    } else {
        print!("{text}");
    }
    Ok(())
}
