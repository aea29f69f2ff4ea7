//! Pods of Kubernetes: what kubelet asks of containerd's CRI, with runc and with machinen.
//!
//! Each test runs with both runtimes: with runc it shows that it asks for nothing special.

mod checkpoint;
mod events;
mod handlers;
mod installer;
mod isolation;
mod kubelet;
mod life;
mod many;
mod namespaces;
mod network;
mod networks;
mod observed;
mod resources;
mod restart;
mod sandbox;
mod security;
mod snapshotters;
mod soak;
mod streaming;
mod trouble;
mod vm;
mod volumes;
mod volumes_of_kubelet;

use anyhow::Result;
use machinen_integration::{
    cri::{Handler, Node},
    paths::Version,
    setup::Setup,
};

/// Makes a test of a function `fn(&mut Node) -> Result<()>` with a containerd and a runtime.
macro_rules! pod_tests {
    ($($module:ident($version:ident, $handler:ident): [$($test:ident),* $(,)?];)*) => {
        $(mod $module {
            $(#[test] fn $test() {
                $crate::cri::run(
                    machinen_integration::paths::Version::$version,
                    machinen_integration::cri::Handler::$handler,
                    super::$test,
                );
            })*
        })*
    };
}
pub(crate) use pod_tests;

/// Makes tests with both runtimes: with every containerd, with the oldest and the newest, and with the newest.
macro_rules! both_runtimes {
    (
        every: [$($every:ident),* $(,)?], oldest_and_newest: [$($two:ident),* $(,)?], newest: [$($one:ident),* $(,)?] $(,)?
    ) => {
        $crate::cri::pod_tests! {
            runc_1_6(V1_6, Runc): [$($every,)* $($two,)*];
            runc_1_7(V1_7, Runc): [$($every,)*];
            runc_2_1(V2_1, Runc): [$($every,)* $($two,)* $($one,)*];
            machinen_1_6(V1_6, Machinen): [$($every,)* $($two,)*];
            machinen_1_7(V1_7, Machinen): [$($every,)*];
            machinen_2_1(V2_1, Machinen): [$($every,)* $($two,)* $($one,)*];
            sandbox_2_1(V2_1, MachinenSandbox): [$($every,)* $($two,)* $($one,)*];
        }
    };
}
pub(crate) use both_runtimes;

/// Runs a test on a node, and proves that nothing is left of its pods.
///
/// # Panics
/// When the test fails or leaves something behind; with containerd's log.
pub(crate) fn run(version: Version, handler: Handler, test: fn(&mut Node) -> Result<()>) {
    run_with(version, handler, &Setup::new(), test);
}

/// The same with another configuration.
pub(crate) fn run_with(version: Version, handler: Handler, setup: &Setup, test: fn(&mut Node) -> Result<()>) {
    let mut node = Node::start(version, handler, setup).unwrap_or_else(|error| panic!("{error:#}"));
    if let Err(error) = test(&mut node).and_then(|()| node.settle()) {
        let (version, runtime, log) = (version.name(), handler.name(), node.containerd().log());
        panic!("with containerd {version} and {runtime}: {error:#}\n--- containerd's log\n{log}");
    }
}
