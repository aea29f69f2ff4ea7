//! Kubernetes' node without a kubelet: a private containerd with the plugin CRI, a network of CNI plugins, and a
//! client that sends what kubelet sends.
//!
//! ```text
//!   test ── Node ──gRPC──> containerd (CRI) ── CNI plugins ── bridge cni0, 10.88.0.1
//!            │                  │                                  │
//!            └── Pod ── Container: runc or machinen ───────────── eth0, 10.88.0.x
//! ```
//!
//! containerd and all that it starts have a network namespace of their own, which is the node's network: bridges
//! and rules of iptables do not reach the host's.

mod calls;
mod config;
mod container;
mod node;
mod pod;
pub mod stream;

pub use calls::{Client, Refusal};
pub(crate) use config::{DIRS, FRAMES, NAMESPACE, configure, in_own_network};
pub use container::{Container, LogLine};
pub use k8s_cri::v1 as api;
pub use node::{Handler, IMAGE, Node, OTHER_CONFIGURATION};
pub use pod::Pod;

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// How long to wait before asking again.
const PERIOD: Duration = Duration::from_millis(50);
/// How long something may take on an emulated, busy processor.
const PATIENCE: Duration = Duration::from_secs(60);

/// Asks until there is an answer, as kubelet does.
///
/// # Errors
/// There is no answer in time, or a question failed.
#[expect(
    clippy::disallowed_methods,
    reason = "containerd 1.6 has no events of CRI, and kubelet asks again too"
)]
pub fn eventually<T>(what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() > end {
            bail!("{what}: not within {PATIENCE:?}");
        }
        thread::sleep(PERIOD);
    }
}
