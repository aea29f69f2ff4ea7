//! The one integration test binary: tests with a real containerd.
//!
//! Each test has a containerd of its own and proves at its end that nothing is left of its containers.
//!
//! `MACHINEN_TEST_RUNTIME=io.containerd.runc.v2` runs the tests with runc, which passes all that test no
//! feature that only machinen has. `MACHINEN_TEST_SHOW=1` with `--nocapture` prints the users' messages when
//! something fails.

mod checkpoint;
mod clones;
mod configurations;
mod confinement;
mod control;
mod cpusets;
mod cri;
mod deploy;
mod docker;
mod everyday;
mod exec;
mod exec_api;
mod failed_create;
mod fake;
mod fork;
mod guest_trouble;
mod harness;
mod hooks;
mod host_cgroup;
mod host_trouble;
mod hostile;
mod interleaving;
mod kernel;
mod layer;
mod lifecycle;
mod logging;
mod network;
mod oci;
mod optional;
mod podman;
mod process;
mod refusals;
mod rootfs;
mod shim;
mod stdin;
mod streams;
mod survival;
mod terminal;
mod traces;
mod upgrade;
mod view;
mod volumes;
