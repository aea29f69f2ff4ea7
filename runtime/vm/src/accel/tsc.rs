//! How fast the host's time stamp counter runs.

use std::{
    io,
    time::{Duration, Instant},
};

use machinen_base::sys::kvm::tsc;
use nix::{
    errno::Errno,
    time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep},
};

/// Long enough for an error of a few parts in a million. The real length of the interval is measured.
const INTERVAL: Duration = Duration::from_millis(20);

/// Measures the frequency, in kHz, against the raw monotonic clock, which is never adjusted.
pub(super) fn measure() -> io::Result<u32> {
    let (tsc_1, time_1) = sample()?;
    let end = Instant::now() + INTERVAL;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        match clock_nanosleep(ClockId::CLOCK_MONOTONIC, ClockNanosleepFlags::empty(), &left.into()) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let (tsc_2, time_2) = sample()?;
    let ticks = u128::from(tsc_2.wrapping_sub(tsc_1));
    let nanos = time_2.saturating_sub(time_1).as_nanos();
    let khz = (ticks * 1_000_000 + nanos / 2).checked_div(nanos);
    match khz.map(u32::try_from) {
        Some(Ok(khz)) if khz > 0 => Ok(khz),
        _ => Err(io::Error::other(format!("it counted {ticks} in {nanos} ns"))),
    }
}

/// Reads counter and clock at one moment: the attempt of several that was disturbed least.
fn sample() -> io::Result<(u64, Duration)> {
    let mut best = (u64::MAX, 0, Duration::ZERO);
    for _ in 0..16 {
        let before = tsc();
        let time = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC_RAW)?);
        let width = tsc().wrapping_sub(before);
        if width < best.0 {
            best = (width, before.wrapping_add(width / 2), time);
        }
    }
    Ok((best.1, best.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let (one, two) = (measure().unwrap(), measure().unwrap());
        // 1 part in 1000: guests cope with that, and a busy machine stays below it.
        assert!(one.abs_diff(two) < one / 1000, "{one} kHz, then {two} kHz");
    }
}
