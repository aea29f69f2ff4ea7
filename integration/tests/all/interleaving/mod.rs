//! Concurrent requests: random programs of task requests from several clients at once, against the real shim
//! and agent in a fake VM.
//!
//! Whatever the order, every request is answered, with success or with a refusal that a client understands; a
//! request that was answered with success has been carried out; input and its end arrive; and nothing is
//! left.

mod case;
mod program;

use anyhow::{Context, Result, ensure};
use machinen_integration::{bundle::Bundle, containerd::Containerd, fake::FakeVmm};
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use crate::harness::on_newest_containerd;

on_newest_containerd!(random_programs);

/// How many programs one run of the test makes.
const PROGRAMS: u32 = 60;

fn random_programs(containerd: &mut Containerd) -> Result<()> {
    let fake = FakeVmm::start(containerd)?;
    containerd.configure(&fake.setup())?;
    let rootfs = Bundle::busybox(containerd)?;
    let mut totals = case::Totals::default();
    let config =
        Config { cases: PROGRAMS, failure_persistence: None, max_shrink_iters: 8, ..Config::default() };
    let counted = std::cell::RefCell::new(&mut totals);
    let outcome = TestRunner::new(config).run(&program::program(), |program| {
        let run = case::run(containerd, &rootfs, &program, &mut counted.borrow_mut());
        let run = run.and_then(|()| fake.settle());
        run.map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    outcome.map_err(|error| anyhow::anyhow!("{error}")).context("a program failed")?;
    println!("{totals}");
    ensure!(totals.all_seen(), "a kind of request was never made, or never succeeded: {totals}");
    Ok(())
}
