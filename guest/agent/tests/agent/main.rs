//! The agent as the host sees it: every test starts the real binary in namespaces of its own and talks to it
//! over the channel. Needs root. With MACHINEN_TEST_VM=1 each test starts a VM instead.

#![expect(clippy::unwrap_used, reason = "a step that fails fails its test")]

mod control;
mod exec;
mod hostile;
mod layer;
mod lifecycle;
mod limits;
mod oci;
mod stdio;
mod support;
mod terminal;
mod timeline;
