//! `machinen ls`: the containers of this host.

use std::time::Duration;

use clap::{Args, ValueEnum};
use machinen::text::printable;
use serde_json::{Value, json};

use crate::{
    find::{self, FindError, FoundContainer, MemoryUse, age_of, memory_of},
    oci::GlobalArgs,
    output::{Align, TextTable},
    text::{duration, human},
};

/// The length of an id in the table.
const SHORT: usize = 12;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ListFormat {
    Table,
    Json,
}

/// Arguments of `machinen ls`.
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// How the containers are printed
    #[arg(long, short, value_enum, default_value_t = ListFormat::Table)]
    format: ListFormat,
    /// Print ids only
    #[arg(long, short)]
    quiet: bool,
    /// Only containers that run or are paused
    #[arg(long, short)]
    running: bool,
    /// Print long ids whole
    #[arg(long)]
    no_trunc: bool,
}

/// A container, and what is measured of it now.
struct Row {
    container: FoundContainer,
    age: Option<Duration>,
    memory: Option<MemoryUse>,
}

/// # Errors
/// The containers cannot be listed.
pub(super) async fn run(global: &GlobalArgs, args: &LsArgs) -> Result<(), FindError> {
    let wanted = |container: &FoundContainer| {
        !args.running || ["running", "paused"].contains(&container.status.as_str())
    };
    let found: Vec<_> = find::all(global).await?.into_iter().filter(wanted).collect();
    if args.quiet {
        found.iter().for_each(|container| println!("{}", printable(&container.id)));
        return Ok(());
    }
    let rows: Vec<Row> = found.into_iter().map(Row::measure).collect();
    match args.format {
        ListFormat::Json => println!("{:#}", rows.iter().map(Row::value).collect::<Value>()),
        ListFormat::Table => {
            print!("{}", table(&rows, args.no_trunc));
            for row in &rows {
                if let Some(problem) = &row.container.problem {
                    eprintln!("machinen: {}: {}", printable(&row.container.id), printable(problem));
                }
            }
        }
    }
    Ok(())
}

impl Row {
    fn measure(container: FoundContainer) -> Self {
        let age = Some(container.pid).filter(|pid| *pid != 0).and_then(age_of);
        let memory = container.vm.and_then(|vm| memory_of(vm.pid));
        Self { container, age, memory }
    }

    fn value(&self) -> Value {
        let Self { container, age, memory } = self;
        json!({
            "id": container.id,
            "name": container.name,
            "owner": container.owner,
            "namespace": container.namespace,
            "image": container.image,
            "status": container.status,
            "pid": container.pid,
            "uptimeSeconds": age.map(|age| age.as_secs()),
            "bundle": container.bundle,
            "forkedFrom": container.forked_from,
            "problem": container.problem,
            "vm": container.vm.map(|vm| json!({
                "pid": vm.pid,
                "memoryCeiling": u64::from(vm.memory_mib) << 20,
                "vcpus": vm.vcpus,
                "rss": memory.map(|memory| memory.rss),
                "pss": memory.map(|memory| memory.pss),
            })),
        })
    }
}

fn table(rows: &[Row], whole: bool) -> String {
    let mut table = TextTable::new([
        ("ID", Align::Left),
        ("NAME", Align::Left),
        ("OWNER", Align::Left),
        ("IMAGE", Align::Left),
        ("STATE", Align::Left),
        ("UPTIME", Align::Left),
        ("MEMORY", Align::Right),
        ("FORKED FROM", Align::Left),
    ]);
    for Row { container, age, memory } in rows {
        // A long id is one that a program has made.
        let is_digest = container.id.len() == 64 && container.id.bytes().all(|byte| byte.is_ascii_hexdigit());
        let id = if is_digest && !whole { &container.id[..SHORT] } else { &container.id };
        let owner = match &container.namespace {
            Some(namespace) => format!("{}/{}", container.owner.name(), printable(namespace)),
            None => container.owner.name().to_owned(),
        };
        let used = memory.map_or_else(|| "-".to_owned(), |memory| human(memory.pss));
        let text = |text: &Option<String>| text.as_deref().map_or_else(|| "-".to_owned(), printable);
        table.row([
            printable(id),
            text(&container.name),
            owner,
            text(&container.image),
            printable(&container.status),
            age.map_or_else(|| "-".to_owned(), duration),
            container.vm.map_or_else(
                || "-".to_owned(),
                |vm| format!("{used} / {}", human(u64::from(vm.memory_mib) << 20)),
            ),
            text(&container.forked_from),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::find::{FoundVm, example};

    #[test]
    fn a_row_has_what_is_known() {
        let mut known = example(&"ab".repeat(32), Some("web"), Some("default"));
        known.vm = Some(FoundVm { pid: 1, memory_mib: 512, vcpus: 2 });
        let memory = Some(MemoryUse { rss: 80 << 20, pss: 60 << 20 });
        let rows = [
            Row { container: known, age: Some(Duration::from_secs(90)), memory },
            Row { container: example("plain", None, None), age: None, memory: None },
        ];
        let table = table(&rows, false);
        let lines: Vec<Vec<_>> =
            table.lines().map(|line| line.split("  ").filter(|cell| !cell.is_empty()).collect()).collect();
        assert_eq!(lines[0][0], "ID");
        let cells: Vec<_> = lines[1].iter().map(|cell| cell.trim()).collect();
        assert_eq!(
            cells,
            ["abababababab", "web", "machinen/default", "-", "running", "1m 30s", "60.0MiB / 512.0MiB", "-"]
        );
        assert!(table.lines().nth(2).unwrap().starts_with("plain"));
        assert_eq!(rows[0].value()["vm"]["pss"], 60 << 20);
        assert_eq!(rows[1].value()["vm"], Value::Null);
    }

    #[test]
    fn nothing_of_a_container_moves_the_cursor() {
        let mut hostile = example("x", Some("a\x1b[2J"), None);
        hostile.image = Some("b\nc".to_owned());
        let table = table(&[Row { container: hostile, age: None, memory: None }], true);
        assert_eq!(table.lines().count(), 2);
        assert!(!table.contains('\x1b'), "{table}");
    }
}
