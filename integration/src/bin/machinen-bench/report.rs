//! The table that is printed, and the same as JSON.

use std::fmt;

use serde_json::{Map, Value, json};

#[derive(Debug)]
pub(crate) struct Report {
    rounds: usize,
    rows: Vec<Row>,
    phases: Vec<Phase>,
    targets: Vec<Target>,
}

#[derive(Debug)]
struct Row {
    title: &'static str,
    key: &'static str,
    value: f64,
    unit: &'static str,
}

/// Milliseconds.
#[derive(Debug)]
struct Phase {
    name: String,
    cold: f64,
    warm: f64,
}

#[derive(Debug)]
struct Target {
    title: &'static str,
    value: f64,
    limit: f64,
    unit: &'static str,
}

impl Target {
    fn met(&self) -> bool {
        self.value <= self.limit
    }
}

impl Report {
    pub(crate) fn new(rounds: usize) -> Self {
        Self { rounds, rows: Vec::new(), phases: Vec::new(), targets: Vec::new() }
    }

    /// A median, milliseconds.
    pub(crate) fn time(&mut self, title: &'static str, key: &'static str, value: f64) {
        self.rows.push(Row { title, key, value, unit: "ms" });
    }

    pub(crate) fn size(&mut self, title: &'static str, key: &'static str, kib: u64) {
        self.rows.push(Row { title, key, value: kib as f64, unit: "KiB" });
    }

    /// A step of a start, milliseconds. Steps overlap.
    pub(crate) fn phase(&mut self, name: &str, cold: f64, warm: f64) {
        self.phases.push(Phase { name: name.to_owned(), cold, warm });
    }

    pub(crate) fn target(&mut self, title: &'static str, value: f64, limit: f64, unit: &'static str) {
        self.targets.push(Target { title, value, limit, unit });
    }

    pub(crate) fn json(&self) -> Value {
        let mut values: Map<String, Value> =
            self.rows.iter().map(|row| (row.key.to_owned(), json!(row.value))).collect();
        let phase = |phase: &Phase| (phase.name.clone(), json!({ "cold": phase.cold, "warm": phase.warm }));
        let phases: Map<String, Value> = self.phases.iter().map(phase).collect();
        let target = |target: &Target| {
            json!({
                "target": target.title, "value": target.value, "limit": target.limit, "unit": target.unit,
                "met": target.met(),
            })
        };
        values.insert("rounds".to_owned(), json!(self.rounds));
        values.insert("phases_ms".to_owned(), phases.into());
        values.insert("targets".to_owned(), self.targets.iter().map(target).collect());
        values.into()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "medians of {} rounds", self.rounds)?;
        for Row { title, value, unit, .. } in &self.rows {
            writeln!(f, "  {title:<52}{value:>10.0} {unit}")?;
        }
        writeln!(f, "steps of a start, cold and warm (they overlap)")?;
        for Phase { name, cold, warm } in &self.phases {
            writeln!(f, "  {name:<42}{cold:>10.1}{warm:>10.1} ms")?;
        }
        writeln!(f, "targets")?;
        for target in &self.targets {
            let Target { title, value, limit, unit } = target;
            let verdict = if target.met() { "met" } else { "MISSED" };
            writeln!(f, "  {title:<52}{value:>10.2} of {limit:.2} {unit}: {verdict}")?;
        }
        Ok(())
    }
}
