//! What every crate of machinen on the host stands on: errors, system calls, child processes, files.
//!
//! The only unsafe code of the host side is in [`sys`], and only [`process`] starts child processes.

#![warn(missing_docs)]

pub mod cgroup;
pub mod confined;
pub mod error;
pub mod fs;
pub mod memfd;
pub mod mounts;
pub mod netns;
pub mod owner;
pub mod pressure;
pub mod process;
pub mod reexec;
mod slow_close;
pub mod space;
#[expect(unsafe_code, reason = "the one place for it")]
pub mod sys;
pub mod text;
pub mod watch;

/// The host's root's directory of everything that is valid until the host reboots; others have [`owner::run_dir`].
pub const RUN_DIR: &str = "/run/machinen";
/// The host's root's directory of everything that outlives a reboot; others have [`owner::data_dir`].
pub const DATA_DIR: &str = "/var/lib/machinen";
