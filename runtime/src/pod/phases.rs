//! How long each step of a start took, for the log and the benchmarks.

use std::{
    fmt,
    sync::Mutex,
    time::{Duration, Instant},
};

/// Named wall-clock durations, in the order in which the steps ended. Steps may overlap.
#[derive(Debug, Default)]
pub struct Phases(Mutex<Vec<(String, Duration)>>);

impl Phases {
    /// Runs `step` and records how long it took, also when it fails.
    pub async fn time<T>(&self, name: &str, step: impl Future<Output = T>) -> T {
        let start = Instant::now();
        let result = step.await;
        self.record(name, start.elapsed());
        result
    }

    pub fn record(&self, name: &str, took: Duration) {
        tracing::debug!(phase = name, "took {took:.1?}");
        self.0.lock().expect("no panic while held").push((name.to_owned(), took));
    }
}

/// `rootdisk=1.2ms vm=60.0ms …`
impl fmt::Display for Phases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, took)) in self.0.lock().expect("no panic while held").iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{name}={:.1}ms", took.as_secs_f64() * 1e3)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_read_in_order() {
        let phases = Phases::default();
        phases.record("rootdisk", Duration::from_micros(1234));
        phases.record("vm", Duration::from_millis(60));
        assert_eq!(phases.to_string(), "rootdisk=1.2ms vm=60.0ms");
    }
}
