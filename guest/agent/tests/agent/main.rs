//! The agent as the host sees it: every test starts the real binary in namespaces of its own and talks to it over
//! the channel. Needs root. `vm` does the same with a VM, on request.

mod lifecycle;
mod oci;
mod support;
mod vm;
