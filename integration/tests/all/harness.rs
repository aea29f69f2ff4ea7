//! How a test is run: containerd before, and the proof that nothing is left after.

use anyhow::{Result, ensure};
use machinen_integration::{containerd::Containerd, ctr::Run, image::Image, paths::Version, setup::Setup};

/// The image that every test's containerd has.
pub(crate) const IMAGE: &str = "machinen.test/busybox:1";

/// For tests that any containerd serves equally.
pub(crate) const NEWEST: Version = Version::V2_1;

/// Runs a test with a containerd that has the busybox image.
///
/// # Panics
/// When the test fails or leaves something behind; with containerd's log.
pub(crate) fn run(version: Version, test: impl FnOnce(&mut Containerd) -> Result<()>) {
    run_with(version, &Setup::new(), test);
}

/// The same with another configuration.
pub(crate) fn run_with(version: Version, setup: &Setup, test: impl FnOnce(&mut Containerd) -> Result<()>) {
    let mut containerd = Containerd::start_with(version, setup).unwrap_or_else(|error| panic!("{error:#}"));
    if let Err(error) = attempt(&mut containerd, test) {
        let version = version.name();
        panic!("with containerd {version}: {error:#}\n--- containerd's log\n{}", containerd.log());
    }
}

fn attempt(containerd: &mut Containerd, test: impl FnOnce(&mut Containerd) -> Result<()>) -> Result<()> {
    containerd.import(&Image::busybox()?)?;
    let before = containerd.inventory()?;
    test(containerd)?;
    containerd.settle(&before)
}

/// Makes one test per containerd release of each function `fn(&mut Containerd) -> Result<()>`.
macro_rules! on_every_containerd {
    ($($test:ident),* $(,)?) => {
        mod containerd_1_6 {
            $(#[test] fn $test() { $crate::harness::run(machinen_integration::paths::Version::V1_6, super::$test); })*
        }
        mod containerd_1_7 {
            $(#[test] fn $test() { $crate::harness::run(machinen_integration::paths::Version::V1_7, super::$test); })*
        }
        mod containerd_2_1 {
            $(#[test] fn $test() { $crate::harness::run(machinen_integration::paths::Version::V2_1, super::$test); })*
        }
    };
}
pub(crate) use on_every_containerd;

/// Makes a test with the newest containerd of each function `fn(&mut Containerd) -> Result<()>`.
macro_rules! on_newest_containerd {
    ($($test:ident),* $(,)?) => {
        mod containerd_newest {
            $(#[test] fn $test() { $crate::harness::run($crate::harness::NEWEST, super::$test); })*
        }
    };
}
pub(crate) use on_newest_containerd;

/// Runs a container that must fail, checks the user's error message, and that nothing is left and the next
/// container works.
///
/// # Errors
/// The container did not fail, a word is missing from the message, or something was left.
pub(crate) fn fails_saying(containerd: &Containerd, run: &Run<'_>, words: &[&str]) -> Result<()> {
    let before = containerd.inventory()?;
    let output = run.output()?;
    let printed = output.error_text();
    ensure!(output.status != 0, "the container should have failed, but: {output}");
    for word in words {
        ensure!(printed.contains(word), "{word:?} is missing from the user's message: {output}");
    }
    // The caller's terms, not the program's: no source locations, no panics, no debug output of types.
    for noise in ["panicked at", ".rs:", "Os {", "source:"] {
        ensure!(!printed.contains(noise), "{noise:?} is in the user's message: {output}");
    }
    if std::env::var_os("MACHINEN_TEST_SHOW").is_some() {
        println!("{}", printed.trim());
    }
    containerd.settle(&before)
}

/// A container that shows that starts work again.
///
/// # Errors
/// The container does not work.
pub(crate) fn works(containerd: &Containerd) -> Result<()> {
    let output = containerd.run(IMAGE, &["echo", "well"]).output()?;
    ensure!(output.status == 0 && output.text() == "well\n", "a container should work again, but: {output}");
    Ok(())
}
