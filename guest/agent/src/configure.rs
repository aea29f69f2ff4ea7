//! What the guest cannot know by itself: the time, true randomness, and its name.

use std::{fs::File, io, os::fd::AsFd};

use machinen_protocol::api;
use nix::{
    errno::Errno,
    sys::{time::TimeSpec, utsname::uname},
    time::{ClockId, clock_settime},
    unistd::sethostname,
};

use crate::{agent::Parts, sys};

/// The kernel's generator has a state of 256 bits.
const MIN_ENTROPY: usize = 32;
const MAX_ENTROPY: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigureError {
    #[error("{got} bytes of entropy given, between {MIN_ENTROPY} and {MAX_ENTROPY} are needed")]
    Entropy { got: usize },
    #[error("{nanoseconds} is not a time after 1970")]
    Time { nanoseconds: i64 },
    #[error("cannot set the clock")]
    Clock(#[source] Errno),
    #[error("cannot open the random number generator")]
    OpenRandom(#[source] io::Error),
    #[error("cannot seed the random number generator")]
    Seed(#[source] Errno),
    #[error("cannot set the hostname {name:?}")]
    Hostname { name: String, source: Errno },
    #[error("cannot ask the kernel for its release")]
    Release(#[source] Errno),
}

/// # Errors
/// A value is not acceptable, to the agent or to the kernel.
pub(crate) fn configure(
    parts: &Parts,
    request: &api::ConfigureRequest,
) -> Result<api::ConfigureResponse, ConfigureError> {
    let got = request.entropy.len();
    if !(MIN_ENTROPY..=MAX_ENTROPY).contains(&got) {
        return Err(ConfigureError::Entropy { got });
    }
    let now = request.realtime_ns;
    if now <= 0 {
        return Err(ConfigureError::Time { nanoseconds: now });
    }
    if parts.owns_kernel {
        let time = TimeSpec::new(now / 1_000_000_000, now % 1_000_000_000);
        clock_settime(ClockId::CLOCK_REALTIME, time).map_err(ConfigureError::Clock)?;
        let random = File::options().write(true).open("/dev/random").map_err(ConfigureError::OpenRandom)?;
        sys::add_entropy(random.as_fd(), &request.entropy).map_err(ConfigureError::Seed)?;
    }
    sethostname(&request.hostname)
        .map_err(|source| ConfigureError::Hostname { name: request.hostname.clone(), source })?;
    let kernel = uname().map_err(ConfigureError::Release)?;
    Ok(api::ConfigureResponse {
        kernel_release: kernel.release().to_string_lossy().into_owned(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        ..Default::default()
    })
}
