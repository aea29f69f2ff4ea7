//! What an error means to its caller, and how an error is printed: the same on the host and in the guest.

pub use machinen_protocol::error::{ErrorKind, HasKind, chain};
