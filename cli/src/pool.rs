//! `machinen pool`: the clones that wait for the next starts.

use std::time::{Duration, UNIX_EPOCH};

use clap::{Args, Subcommand};
use machinen::{
    config::Config,
    pool::{self, ListedMember, MemberRecord, MemberStage, PoolError},
    text::printable,
};
use serde_json::{Value, json};

use super::{
    output::{Align, TextTable, VerbOutput},
    text::{ago, human},
};

/// Arguments of `machinen pool`.
#[derive(Debug, Args)]
pub(crate) struct PoolArgs {
    /// Print JSON
    #[arg(long, global = true)]
    pub(super) json: bool,
    #[command(subcommand)]
    command: PoolCommand,
}

#[derive(Debug, Subcommand)]
enum PoolCommand {
    /// List the clones, including those of other configurations, the oldest first
    Ls,
    /// End all clones that no container has taken, including those that are being made and those of other
    /// configurations; the next start makes new ones if `pool.size` asks for them
    Drain,
}

/// Runs one of the commands.
///
/// # Errors
/// The pool's directory cannot be read, or a member does not end.
pub(crate) fn run(args: &PoolArgs, config: &Config) -> Result<VerbOutput, PoolError> {
    match args.command {
        PoolCommand::Ls => {
            let members = pool::list(&config.pool.dir)?;
            Ok(VerbOutput::new(table(&members), members.iter().map(listed_json).collect::<Value>()))
        }
        PoolCommand::Drain => {
            let ended = pool::drain(&config.pool.dir)?;
            Ok(VerbOutput::new(format!("{ended} ended\n"), json!({ "ended": ended })))
        }
    }
}

fn table(members: &[ListedMember]) -> String {
    let mut table = TextTable::new([
        ("PID", Align::Right),
        ("MEMORY", Align::Right),
        ("VCPUS", Align::Right),
        ("TAKES", Align::Right),
        ("CREATED", Align::Left),
        ("CONFIGURATION", Align::Left),
        ("STATE", Align::Left),
    ]);
    for ListedMember { record, memory, .. } in members {
        // A clone that has just been started has no record yet.
        let cell = |text: fn(&MemberRecord) -> String| record.as_ref().map(text).unwrap_or_default();
        table.row([
            cell(|record| if record.pid == 0 { String::new() } else { record.pid.to_string() }),
            cell(|record| format!("{}MiB", record.memory_mib)),
            cell(|record| record.vcpus.to_string()),
            human(*memory),
            cell(|record| ago(Some(UNIX_EPOCH + Duration::from_secs(record.created)))),
            cell(|record| printable(&record.config.to_string_lossy())),
            record.as_ref().map_or(MemberStage::Starting, |record| record.stage).name().to_owned(),
        ]);
    }
    table.to_string()
}

fn listed_json(listed: &ListedMember) -> Value {
    let ListedMember { pool, record, memory } = listed;
    json!({
        "pool": pool,
        "pid": record.as_ref().map(|record| record.pid),
        "memoryMib": record.as_ref().map(|record| record.memory_mib),
        "vcpus": record.as_ref().map(|record| record.vcpus),
        "takes": memory,
        "config": record.as_ref().map(|record| &record.config),
        "created": record.as_ref().map(|record| record.created),
        "state": record.as_ref().map_or(MemberStage::Starting, |record| record.stage).name(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_a_row_in_every_stage() {
        let config = "/etc/machinen/machinen.toml".into();
        let (memory_mib, stage) = (2048, MemberStage::WarmingUp);
        let record = MemberRecord { pid: 42, created: 1, memory_mib, vcpus: 2, config, stage };
        let member = |record| ListedMember { pool: "/run/pool".into(), record, memory: 52 << 20 };
        let members = [member(None), member(Some(record))];
        let table = table(&members);
        let rows: Vec<Vec<_>> = table.lines().map(|row| row.split_whitespace().collect()).collect();
        assert_eq!(rows[0], ["PID", "MEMORY", "VCPUS", "TAKES", "CREATED", "CONFIGURATION", "STATE"]);
        assert_eq!(rows[1], ["52.0MiB", "starting"]);
        assert_eq!(rows[2][..4], ["42", "2048MiB", "2", "52.0MiB"]);
        assert!(table.ends_with("  /etc/machinen/machinen.toml  warming up\n"), "{table}");
        assert_eq!(listed_json(&members[0])["state"], "starting");
        assert_eq!(listed_json(&members[1])["pid"], 42);
    }
}
