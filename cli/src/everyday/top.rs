//! `machinen top`: the processes of a container, as its guest sees them.

use std::time::Duration;

use clap::Args;
use machinen::text::printable;
use machinen_task::api::{ProcessDescription, ProcessesResponse};
use serde_json::{Value, json};

use super::ls::ListFormat;
use crate::{
    find::{self, FindError, PodClient},
    oci::GlobalArgs,
    output::{Align, TextTable},
    text::{duration, human},
};

/// Arguments of `machinen top`.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// How the processes are printed
    #[arg(long, short, value_enum, default_value_t = ListFormat::Table)]
    format: ListFormat,
    /// Id or name of the container, or the beginning of its id
    #[arg(value_name = "CONTAINER")]
    container: String,
}

/// # Errors
/// The container does not exist or does not run, or its guest does not answer.
pub(super) async fn run(global: &GlobalArgs, args: &TopArgs) -> Result<(), FindError> {
    let container = find::one(global, &args.container).await?;
    let listed = PodClient::connect(&container.socket)?.processes(&container.id).await?;
    match args.format {
        ListFormat::Json => println!("{:#}", listed.processes.iter().map(value).collect::<Value>()),
        ListFormat::Table => print!("{}", table(&listed)),
    }
    let left_out = (listed.total as usize).saturating_sub(listed.processes.len());
    if left_out > 0 {
        eprintln!("machinen: {left_out} more processes are not listed");
    }
    Ok(())
}

/// The processes as text.
pub(crate) fn table(listed: &ProcessesResponse) -> String {
    let mut table = TextTable::new([
        ("PID", Align::Right),
        ("PPID", Align::Right),
        ("USER", Align::Right),
        ("STATE", Align::Left),
        ("CPU", Align::Right),
        ("RSS", Align::Right),
        ("AGE", Align::Left),
        ("COMMAND", Align::Left),
    ]);
    for process in &listed.processes {
        table.row([
            process.pid.to_string(),
            process.parent_pid.to_string(),
            process.uid.to_string(),
            printable(&process.state),
            format!("{:.2}s", process.cpu_micros as f64 / 1e6),
            human(process.rss_bytes),
            duration(Duration::from_micros(process.age_micros)),
            printable(&process.command),
        ]);
    }
    table.to_string()
}

fn value(process: &ProcessDescription) -> Value {
    json!({
        "pid": process.pid,
        "parentPid": process.parent_pid,
        "uid": process.uid,
        "state": process.state,
        "cpuMicros": process.cpu_micros,
        "rss": process.rss_bytes,
        "ageMicros": process.age_micros,
        "threads": process.threads,
        "command": process.command,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_one_line_whatever_it_is_called() {
        let process = ProcessDescription {
            pid: 7,
            uid: 1000,
            state: "S".to_owned(),
            cpu_micros: 1_500_000,
            rss_bytes: 3 << 20,
            age_micros: 61_000_000,
            command: "sh -c \x1b[2J\n".to_owned(),
            ..Default::default()
        };
        let listed = ProcessesResponse { processes: vec![process], total: 1, ..Default::default() };
        let table = table(&listed);
        let row = table.lines().nth(1).unwrap();
        assert_eq!(table.lines().count(), 2);
        assert!(row.ends_with("sh -c \\u{1b}[2J\\n"), "{row}");
        let cells: Vec<_> = row.split_whitespace().take(6).collect();
        assert_eq!(cells, ["7", "0", "1000", "S", "1.50s", "3.0MiB"]);
    }
}
