//! Formats sizes and times for people.

use std::time::{Duration, SystemTime};

/// Bytes with one decimal in the largest unit that leaves at least 1.
pub(super) fn human(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (0..units.len()).rev().find(|unit| bytes >> (10 * unit) > 0).unwrap_or(0);
    match unit {
        0 => format!("{bytes}B"),
        _ => format!("{:.1}{}", bytes as f64 / (1_u64 << (10 * unit)) as f64, units[unit]),
    }
}

/// How long ago a time was, in its two largest units.
pub(super) fn ago(time: Option<SystemTime>) -> String {
    duration(time.and_then(|time| time.elapsed().ok()).unwrap_or_default())
}

/// A time span, in its two largest units.
pub(super) fn duration(age: Duration) -> String {
    let mut rounded = humantime::format_duration(Duration::from_secs(age.as_secs())).to_string();
    if let Some((at, _)) = rounded.match_indices(' ').nth(1) {
        rounded.truncate(at);
    }
    rounded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short() {
        assert_eq!(
            (human(0), human(1023), human(1536), human(2 << 30)),
            ("0B".into(), "1023B".into(), "1.5KiB".into(), "2.0GiB".into())
        );
        let long_ago = SystemTime::now() - Duration::from_secs(90_061);
        assert_eq!((ago(None), ago(Some(long_ago))), ("0s".into(), "1day 1h".into()));
    }
}
