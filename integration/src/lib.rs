//! Test harness: a private containerd, images made on demand, and the check of what is left behind.
//!
//! ```text
//!   test, demo or bench ──> Containerd ──stdin pipe──> machinen-keeper (subreaper)
//!                              │                          └── containerd ── shims ── QEMU, ...
//!                              └── ctr                    end of the pipe: kills all, unmounts, removes
//! ```
//!
//! Podman, and runtimes that are run by hand, are on a host of the test's own ([`private_host`]), which has a keeper too.
//!
//! The keeper is the reason why nothing outlives a test, even one that was killed: every process that
//! containerd has started is a descendant of the keeper. This is also how [`inventory`] knows which processes
//! of the machine belong to which test.

pub mod bundle;
pub mod containerd;
pub mod cri;
pub mod ctr;
pub mod docker;
pub mod events;
pub mod exec;
pub mod fake;
pub mod image;
pub mod inventory;
pub mod lab;
pub mod log;
pub mod loop_device;
pub mod oci;
pub mod paths;
pub mod phases;
pub mod podman;
mod podman_commands;
pub mod private_host;
pub mod process;
pub mod rootless;
pub mod runtime;
pub mod samples;
pub mod served;
mod settle;
pub mod setup;
pub mod shim;
#[expect(unsafe_code, reason = "the one place for it")]
pub mod sys;
pub mod task;
pub mod templates;
pub mod terminal;
