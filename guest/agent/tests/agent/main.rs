//! The agent as the host sees it: every test starts the real binary in namespaces of its own and talks to it over
//! the channel. Needs root. `vm` does the same with a VM, on request.

mod hostile;
mod lifecycle;
mod oci;
mod stdio;
mod support;
mod vm;
