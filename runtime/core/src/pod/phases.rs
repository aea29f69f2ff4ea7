//! The duration of each step of a start, for the log and the benchmarks.

use std::{
    fmt,
    sync::Mutex,
    time::{Duration, Instant, SystemTime},
};

use machinen_protocol::api::CreateContainerResponse;

use crate::traces::Phase;

/// Bounds of the number of phases that the guest reports and of the length of their names.
const MOST_GUEST_PHASES: usize = 32;
const MOST_NAME: usize = 32;
/// Bound of the time that the guest reports for one phase.
const MOST_TIME: Duration = Duration::from_secs(3600);

/// Named wall-clock durations, in the order in which the steps ended. Steps may overlap.
#[derive(Debug, Default)]
pub(super) struct PhaseTimes(Mutex<Vec<PhaseTime>>);

#[derive(Debug)]
struct PhaseTime {
    name: String,
    took: Duration,
    ended: SystemTime,
}

impl PhaseTimes {
    /// Runs `step` and records its duration, also if it fails.
    pub(super) async fn time<T>(&self, name: &str, step: impl Future<Output = T>) -> T {
        let start = Instant::now();
        let result = step.await;
        self.record(name, start.elapsed());
        result
    }

    /// Records the guest's phases of a create as `guest/<name>`. The guest says only how long each took: they end now, one
    /// after the other.
    pub(super) fn record_guest(&self, created: &CreateContainerResponse) {
        let phases = || created.phases.iter().take(MOST_GUEST_PHASES);
        let took = |micros: u64| Duration::from_micros(micros).min(MOST_TIME);
        let mut left: Duration = phases().map(|phase| took(phase.micros)).sum();
        let now = SystemTime::now();
        for phase in phases() {
            let plain = |char: &char| char.is_ascii_alphanumeric() || *char == '-';
            let name: String = phase.name.chars().filter(plain).take(MOST_NAME).collect();
            left = left.saturating_sub(took(phase.micros));
            self.record_until(&format!("guest/{name}"), took(phase.micros), now - left);
        }
    }

    pub(super) fn record(&self, name: &str, took: Duration) {
        self.record_until(name, took, SystemTime::now());
    }

    fn record_until(&self, name: &str, took: Duration, ended: SystemTime) {
        tracing::debug!(phase = name, "took {took:.1?}");
        let phase = PhaseTime { name: name.to_owned(), took, ended };
        self.0.lock().expect("no panic while held").push(phase);
    }

    /// The phases for a trace.
    pub(super) fn spans(&self) -> Vec<Phase> {
        let phases = self.0.lock().expect("no panic while held");
        let span = |phase: &PhaseTime| Phase {
            name: phase.name.clone(),
            start: phase.ended - phase.took,
            end: phase.ended,
        };
        phases.iter().map(span).collect()
    }
}

/// `rootdisk=1.2ms vm=60.0ms …`
impl fmt::Display for PhaseTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phases = self.0.lock().expect("no panic while held");
        for (index, PhaseTime { name, took, .. }) in phases.iter().enumerate() {
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

    #[test]
    fn the_guests_phases_follow_each_other_and_are_bounded() {
        use machinen_protocol::api::Phase;

        let phase = |micros: u64| Phase { name: "p".to_owned(), micros, ..Default::default() };
        let phases = PhaseTimes::default();
        phases.record_guest(&CreateContainerResponse {
            phases: vec![phase(2000), phase(3000), phase(u64::MAX)],
            ..Default::default()
        });
        let spans = phases.spans();
        assert_eq!(spans[0].end, spans[1].start);
        assert_eq!(spans[1].end, spans[2].start);
        assert_eq!(spans[2].end.duration_since(spans[2].start).unwrap(), MOST_TIME);
    }
}
