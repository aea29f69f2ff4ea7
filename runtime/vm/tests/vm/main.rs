//! Tests with real VMs: QEMU, the guest kernel and image of `target/guest`, both channels.
#![expect(clippy::unwrap_used, reason = "a test may")]

mod clone;
mod host;
mod life;
