//! The one integration test binary: real containerd, and what runs below it.
//!
//! Each test has a containerd of its own and proves at its end that nothing is left of its containers.

mod confinement;
mod fake;
mod guest_trouble;
mod harness;
mod host_trouble;
mod lifecycle;
mod process;
mod refusals;
mod rootfs;
mod shim;
mod streams;
