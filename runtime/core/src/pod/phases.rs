//! The duration of each step of a start, for the log and the benchmarks.

use std::{
    fmt,
    sync::Mutex,
    time::{Duration, Instant},
};

use machinen_protocol::api::CreateContainerResponse;

/// Bounds of the number of phases that the guest reports and of the length of their names.
const MOST_GUEST_PHASES: usize = 32;
const MOST_NAME: usize = 32;

/// Named wall-clock durations, in the order in which the steps ended. Steps may overlap.
#[derive(Debug, Default)]
pub(super) struct PhaseTimes(Mutex<Vec<(String, Duration)>>);

impl PhaseTimes {
    /// Runs `step` and records its duration, also if it fails.
    pub(super) async fn time<T>(&self, name: &str, step: impl Future<Output = T>) -> T {
        let start = Instant::now();
        let result = step.await;
        self.record(name, start.elapsed());
        result
    }

    /// Records the guest's phases of a create as `guest/<name>`.
    pub(super) fn record_guest(&self, created: &CreateContainerResponse) {
        for phase in created.phases.iter().take(MOST_GUEST_PHASES) {
            let plain = |char: &char| char.is_ascii_alphanumeric() || *char == '-';
            let name: String = phase.name.chars().filter(plain).take(MOST_NAME).collect();
            self.record(&format!("guest/{name}"), Duration::from_micros(phase.micros));
        }
    }

    pub(super) fn record(&self, name: &str, took: Duration) {
        tracing::debug!(phase = name, "took {took:.1?}");
        self.0.lock().expect("no panic while held").push((name.to_owned(), took));
    }
}

/// `rootdisk=1.2ms vm=60.0ms …`
impl fmt::Display for PhaseTimes {
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
    fn the_guests_names_are_bounded() {
        use machinen_protocol::api::Phase;

        let phase = |name: String| Phase { name, micros: 1500, ..Default::default() };
        let phases = PhaseTimes::default();
        phases.record_guest(&CreateContainerResponse {
            phases: vec![phase("mount\n level=error x=".to_owned() + &"y".repeat(5000)); 1000],
            ..Default::default()
        });
        let text = phases.to_string();
        assert_eq!(text.split(' ').count(), MOST_GUEST_PHASES);
        assert_eq!(text.split(' ').next(), Some("guest/mountlevelerrorxyyyyyyyyyyyyyyyy=1.5ms"));
    }

    #[test]
    fn phases_read_in_order() {
        let phases = PhaseTimes::default();
        phases.record("rootdisk", Duration::from_micros(1234));
        phases.record("vm", Duration::from_millis(60));
        assert_eq!(phases.to_string(), "rootdisk=1.2ms vm=60.0ms");
    }
}
