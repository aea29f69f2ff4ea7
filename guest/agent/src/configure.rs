//! What the guest cannot know by itself: the time, random numbers, and its identity.
//!
//! A clone arrives here with everything that its template had. These settings make it a different machine, so
//! nothing that depends on them may be created earlier.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
};

use machinen_protocol::{
    api,
    error::{ErrorKind, HasKind},
};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::{time::TimeSpec, utsname::uname},
    time::{ClockId, clock_settime},
    unistd::sethostname,
};

use crate::sys;

/// The kernel's generator has a state of 256 bits.
const MIN_ENTROPY: usize = 32;
const MAX_ENTROPY: usize = 4096;

/// The file is part of the image, which is read-only and the same for all VMs.
const MACHINE_ID: &str = "/etc/machine-id";
const OWN_MACHINE_ID: &str = "/run/machine-id";
const MACHINE_ID_DIGITS: usize = 32;

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
    #[error("{given:?} is not a machine id of {MACHINE_ID_DIGITS} hexadecimal digits")]
    MachineId { given: String },
    #[error("cannot write {OWN_MACHINE_ID}")]
    WriteMachineId(#[source] io::Error),
    #[error("cannot mount {MACHINE_ID}")]
    MountMachineId(#[source] Errno),
    #[error("cannot ask the kernel for its release")]
    Release(#[source] Errno),
}

impl HasKind for ConfigureError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Entropy { .. } | Self::Time { .. } | Self::MachineId { .. } | Self::Hostname { .. } => {
                ErrorKind::InvalidArgument
            }
            _ => ErrorKind::Internal,
        }
    }
}

/// Applies the host's configuration. Clock, random numbers and machine id are set only where the agent
/// `owns_kernel`.
///
/// # Errors
/// The agent or the kernel refuses a value.
pub(crate) fn configure(
    request: &api::ConfigureRequest,
    owns_kernel: bool,
) -> Result<api::ConfigureResponse, ConfigureError> {
    let got = request.entropy.len();
    if !(MIN_ENTROPY..=MAX_ENTROPY).contains(&got) {
        return Err(ConfigureError::Entropy { got });
    }
    set_clock(request.realtime_ns, owns_kernel)?;
    let id = &request.machine_id;
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if id.len() != MACHINE_ID_DIGITS || !id.bytes().all(is_digit) {
        return Err(ConfigureError::MachineId { given: id.clone() });
    }
    if owns_kernel {
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
        ..Default::default()
    })
}

/// Sets the wall clock to nanoseconds since the Unix epoch, where the agent `owns_kernel`.
///
/// # Errors
/// The time is not after the epoch, or the kernel refuses it.
pub(crate) fn set_clock(nanoseconds: i64, owns_kernel: bool) -> Result<(), ConfigureError> {
    if nanoseconds <= 0 {
        return Err(ConfigureError::Time { nanoseconds });
    }
    if !owns_kernel {
        return Ok(());
    }
    let time = TimeSpec::new(nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(ConfigureError::Clock)
}

/// Mounts the file of the machine id, which stays empty until the VM is configured.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn warm_up() -> Result<(), ConfigureError> {
    fs::write(OWN_MACHINE_ID, "").map_err(ConfigureError::WriteMachineId)?;
    mount_machine_id()
}

fn set_machine_id(id: &str) -> Result<(), ConfigureError> {
    let text = format!("{id}\n");
    fs::write(OWN_MACHINE_ID, &text).map_err(ConfigureError::WriteMachineId)?;
    // In a clone, the file is mounted by its template.
    if fs::read(MACHINE_ID).is_ok_and(|shown| shown == text.as_bytes()) { Ok(()) } else { mount_machine_id() }
}

fn mount_machine_id() -> Result<(), ConfigureError> {
    let none = None::<&str>;
    mount(Some(OWN_MACHINE_ID), MACHINE_ID, none, MsFlags::MS_BIND, none)
        .map_err(ConfigureError::MountMachineId)
}
