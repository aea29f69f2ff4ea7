//! The library of machinen, with everything that the shim and the command line share.
//!
//! Dependencies point downward only: `shim, cli -> runtime -> protocol <- guest`. ARCHITECTURE.md has the
//! map.

pub mod accel;
pub mod admission;
pub mod agent;
pub mod annotations;
pub mod assets;
pub mod checkpoint;
pub mod config;
pub mod error;
pub mod layer;
pub(crate) mod memfd;
pub mod pod;
pub mod pool;
pub mod process;
pub mod rootdisk;
pub mod spec;
pub mod sys;
pub mod template;
pub mod view;
pub mod vm;
pub mod watch;

/// The directory of all state that ends with a reboot of the host.
pub const RUN_DIR: &str = "/run/machinen";
