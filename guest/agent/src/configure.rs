//! What the guest cannot know by itself: the time, true randomness, and who it is.
//!
//! A clone comes here with all that its template had. What is set here is what makes it another machine, so nothing
//! that depends on any of it may be made before.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
};

use machinen_protocol::api;
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::{time::TimeSpec, utsname::uname},
    time::{ClockId, clock_settime},
    unistd::sethostname,
};

use crate::{agent::Parts, sys};

/// The kernel's generator has a state of 256 bits.
const MIN_ENTROPY: usize = 32;
const MAX_ENTROPY: usize = 4096;

/// The image is read-only and the same for all.
const MACHINE_ID: &str = "/etc/machine-id";
const OWN_MACHINE_ID: &str = "/run/machine-id";
const MACHINE_ID_DIGITS: usize = 32;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

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
    #[error("{given:?} is no machine id of {MACHINE_ID_DIGITS} hexadecimal digits")]
    MachineId { given: String },
    #[error("cannot write {OWN_MACHINE_ID}")]
    WriteMachineId(#[source] io::Error),
    #[error("cannot mount {MACHINE_ID}")]
    MountMachineId(#[source] Errno),
    #[error("cannot read {BOOT_ID}")]
    BootId(#[source] io::Error),
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
    set_clock(parts, request.realtime_ns)?;
    let id = &request.machine_id;
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if id.len() != MACHINE_ID_DIGITS || !id.bytes().all(is_digit) {
        return Err(ConfigureError::MachineId { given: id.clone() });
    }
    if parts.owns_kernel {
        let random = File::options().write(true).open("/dev/random").map_err(ConfigureError::OpenRandom)?;
        sys::add_entropy(random.as_fd(), &request.entropy).map_err(ConfigureError::Seed)?;
        set_machine_id(id)?;
    }
    sethostname(&request.hostname)
        .map_err(|source| ConfigureError::Hostname { name: request.hostname.clone(), source })?;
    let kernel = uname().map_err(ConfigureError::Release)?;
    Ok(api::ConfigureResponse {
        kernel_release: kernel.release().to_string_lossy().into_owned(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id: fs::read_to_string(BOOT_ID).map_err(ConfigureError::BootId)?.trim_end().to_owned(),
        ..Default::default()
    })
}

/// Sets the wall clock to nanoseconds since the Unix epoch, where it is the agent's to set.
///
/// # Errors
/// It is no time after the epoch, or the kernel refuses.
pub(crate) fn set_clock(parts: &Parts, nanoseconds: i64) -> Result<(), ConfigureError> {
    if nanoseconds <= 0 {
        return Err(ConfigureError::Time { nanoseconds });
    }
    if !parts.owns_kernel {
        return Ok(());
    }
    let time = TimeSpec::new(nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(ConfigureError::Clock)
}

fn set_machine_id(id: &str) -> Result<(), ConfigureError> {
    let text = format!("{id}\n");
    fs::write(OWN_MACHINE_ID, &text).map_err(ConfigureError::WriteMachineId)?;
    // A clone that was made ahead of time is told twice who it is.
    if fs::read(MACHINE_ID).is_ok_and(|shown| shown == text.as_bytes()) {
        return Ok(());
    }
    let none = None::<&str>;
    mount(Some(OWN_MACHINE_ID), MACHINE_ID, none, MsFlags::MS_BIND, none)
        .map_err(ConfigureError::MountMachineId)
}
