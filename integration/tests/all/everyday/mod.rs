//! The commands for a user at a terminal: `boot`, `image build`, `ls`, `top`, `console`, `logs`, `cp`, `attach`, `mux`, `port`, `secret` and `gc`.

mod boot;
mod build;
mod copy;
mod mux;
mod owners;
mod secrets;
mod seen;

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    image::Image,
    oci::Oci,
    process::{Invocation, Output},
    runtime::Runtime,
    setup::{Setup, Value},
};
use serde_json::Value as Json;

/// Makes a test of each function `fn(&Oci) -> Result<()>`, on a host of its own with an archive of an image in it.
macro_rules! on_a_host {
    ($($test:ident),* $(,)?) => {
        $(mod $test { #[test] fn machinen() { $crate::everyday::run(super::$test); } })*
    };
}
use on_a_host;

fn run(test: fn(&Oci) -> Result<()>) {
    // The private host's own disk, since `/var/lib` is an overlay there.
    let dir = tempfile::Builder::new().prefix("mboot-").tempdir_in("/var/tmp").expect("/var/tmp is writable");
    let setup = Setup::new().set("boot", "dir", Value::path(dir.path()));
    let oci = Oci::start_with(Runtime::Machinen, &setup).unwrap_or_else(|error| panic!("{error:#}"));
    let tested = (|| {
        Image::busybox()?.write(&oci.file("image.tar"))?;
        let before = oci.inventory()?;
        test(&oci)?;
        oci.settle(&before)?;
        let bundles = dir.path().join("bundles");
        let left = bundles.exists().then(|| bundles.read_dir()).transpose()?;
        ensure!(left.is_none_or(|left| left.count() == 0), "bundles are left");
        Ok(())
    })();
    tested.unwrap_or_else(|error: anyhow::Error| panic!("{error:#}"));
}

/// The archive of the image, as an argument.
fn image(oci: &Oci) -> String {
    oci.file("image.tar").display().to_string()
}

/// `machinen boot` with options and a script, to its end.
fn boot(oci: &Oci, options: &[&str], script: &str) -> Result<Output> {
    booting(oci, options, script)?.run()
}

fn booting(oci: &Oci, options: &[&str], script: &str) -> Result<Invocation> {
    oci.command(&[&["boot"], options, &[image(oci).as_str(), "sh", "-c", script]].concat())
}

/// A container in the background, which waits after it has printed `ready`.
fn background(oci: &Oci, name: &str, options: &[&str], script: &str) -> Result<()> {
    let script = format!("{script}; echo ready; while :; do sleep 1; done");
    let started = boot(oci, &[&["--detach", "--name", name], options].concat(), &script)?.ok()?;
    ensure!(started.text().trim() == name, "{started}");
    oci.scripted("until \"$@\" | grep -q ready; do sleep 0.1; done", &["logs", name])?.run()?.ok().map(drop)
}

fn json(text: &str) -> Result<Json> {
    serde_json::from_str(text).with_context(|| format!("not JSON: {text}"))
}
