//! The table that is printed, and the same as JSON.

use std::fmt;

use machinen_integration::samples::Samples;
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
    title: String,
    key: String,
    value: f64,
    /// Statistics of repeated measurements.
    p99: Option<f64>,
    unit: &'static str,
}

/// Milliseconds.
#[derive(Debug)]
struct Phase {
    name: String,
    cold: f64,
    boot: f64,
    clone: f64,
}

#[derive(Debug)]
struct Target {
    title: &'static str,
    value: f64,
    limit: f64,
    /// The value should be no lower, instead of no higher.
    at_least: bool,
    unit: &'static str,
}

impl Target {
    fn met(&self) -> bool {
        if self.at_least { self.value >= self.limit } else { self.value <= self.limit }
    }
}

impl Report {
    pub(crate) fn new(rounds: usize) -> Self {
        Self { rounds, rows: Vec::new(), phases: Vec::new(), targets: Vec::new() }
    }

    /// Median and 99th percentile of durations.
    pub(crate) fn time(&mut self, title: impl Into<String>, key: impl Into<String>, samples: &Samples) {
        let (value, p99) = (samples.median(), Some(samples.p99()));
        self.rows.push(Row { title: title.into(), key: key.into(), value, p99, unit: "ms" });
    }

    /// One figure, milliseconds.
    pub(crate) fn mean(&mut self, title: impl Into<String>, key: impl Into<String>, millis: f64) {
        self.rows.push(Row { title: title.into(), key: key.into(), value: millis, p99: None, unit: "ms" });
    }

    /// A median, MB/s.
    pub(crate) fn rate(&mut self, title: &str, key: &str, value: f64) {
        let (title, key) = (title.to_owned(), key.to_owned());
        self.rows.push(Row { title, key, value, p99: None, unit: "MB/s" });
    }

    /// A median, how often in a second.
    pub(crate) fn frequency(&mut self, title: &str, key: &str, value: f64) {
        let (title, key) = (title.to_owned(), key.to_owned());
        self.rows.push(Row { title, key, value, p99: None, unit: "/s" });
    }

    /// A quotient of two medians.
    pub(crate) fn share(&mut self, title: &str, key: &str, value: f64) {
        let (title, key, value) = (title.to_owned(), key.to_owned(), value * 100.0);
        self.rows.push(Row { title, key, value, p99: None, unit: "%" });
    }

    pub(crate) fn size(&mut self, title: impl Into<String>, key: impl Into<String>, kib: u64) {
        let (title, key) = (title.into(), key.into());
        self.rows.push(Row { title, key, value: kib as f64, p99: None, unit: "KiB" });
    }

    /// Medians of a step of a start, milliseconds. Steps overlap.
    pub(crate) fn phase(&mut self, name: &str, cold: f64, boot: f64, clone: f64) {
        self.phases.push(Phase { name: name.to_owned(), cold, boot, clone });
    }

    pub(crate) fn target(&mut self, title: &'static str, value: f64, limit: f64, unit: &'static str) {
        self.targets.push(Target { title, value, limit, at_least: false, unit });
    }

    pub(crate) fn target_at_least(
        &mut self,
        title: &'static str,
        value: f64,
        limit: f64,
        unit: &'static str,
    ) {
        self.targets.push(Target { title, value, limit, at_least: true, unit });
    }

    pub(crate) fn json(&self) -> Value {
        let mut values = Map::new();
        for Row { key, value, p99, .. } in &self.rows {
            values.insert(key.clone(), json!(value));
            if let Some(p99) = p99 {
                values.insert(format!("{key}_p99"), json!(p99));
            }
        }
        let phase = |phase: &Phase| {
            let times = json!({ "cold": phase.cold, "boot": phase.boot, "clone": phase.clone });
            (phase.name.clone(), times)
        };
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
        writeln!(
            f,
            "medians of {} rounds, and 99th percentiles (of fewer than 100: the highest)",
            self.rounds
        )?;
        for Row { title, value, p99, unit, .. } in &self.rows {
            let p99 = p99.map_or(String::new(), |p99| format!("{p99:>9.0}"));
            writeln!(f, "  {title:<60}{value:>9.0} {unit:<3}{p99}")?;
        }
        writeln!(f, "steps of a start: boot with a cold cache, boot, clone (they overlap)")?;
        for Phase { name, cold, boot, clone } in &self.phases {
            writeln!(f, "  {name:<34}{cold:>10.1}{boot:>10.1}{clone:>10.1} ms")?;
        }
        writeln!(f, "targets")?;
        for target in &self.targets {
            let Target { title, value, limit, unit, .. } = target;
            let verdict = if target.met() { "met" } else { "MISSED" };
            writeln!(f, "  {title:<60}{value:>9.2} of {limit:.2} {unit}: {verdict}")?;
        }
        Ok(())
    }
}
