//! From an OCI bundle on the host to what the guest is told.
//!
//! ```text
//!   config.json --bundle::load--> Spec --guest::reduce--> GuestSpec (JSON for the agent, injected files)
//!   Process     --exec::reduce--> Process
//! ```
//! Everything here but `bundle::load` is pure.

pub mod bundle;
pub mod exec;
pub mod guest;
