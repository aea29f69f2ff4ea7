//! Repeated measurements of one operation.

use std::time::Duration;

/// Durations, in the order in which they were measured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Samples(Vec<Duration>);

impl Samples {
    pub fn push(&mut self, sample: Duration) {
        self.0.push(sample);
    }

    /// Median in milliseconds; of an even number of samples the mean of the middle two; 0 without samples.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let middle = |at: usize| sorted.get(at).map_or(0.0, |sample| sample.as_secs_f64() * 1000.0);
        let (low, high) = (sorted.len().saturating_sub(1) / 2, sorted.len() / 2);
        f64::midpoint(middle(low), middle(high))
    }

    /// Milliseconds that 99 % of the samples do not exceed: of fewer than a hundred the highest; 0 without
    /// samples.
    pub fn p99(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * 99).div_ceil(100);
        rank.checked_sub(1).map_or(0.0, |at| sorted[at].as_secs_f64() * 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::Samples;
    use std::time::Duration;

    fn of(millis: &[u64]) -> f64 {
        Samples(millis.iter().map(|&millis| Duration::from_millis(millis)).collect()).median()
    }

    #[test]
    fn medians() {
        assert!((of(&[30, 10, 20]) - 20.0).abs() < 1e-9);
        assert!((of(&[40, 10, 20, 30]) - 25.0).abs() < 1e-9);
        assert!((of(&[7]) - 7.0).abs() < 1e-9);
        assert!(of(&[]).abs() < 1e-9);
    }

    #[test]
    fn ninety_nine_of_a_hundred() {
        let p99 = |last: u64| Samples((1..=last).map(Duration::from_millis).collect()).p99();
        assert!((p99(200) - 198.0).abs() < 1e-9 && (p99(9) - 9.0).abs() < 1e-9 && p99(0).abs() < 1e-9);
    }
}
