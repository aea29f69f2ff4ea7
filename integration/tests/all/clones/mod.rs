//! VMs that are clones of a template: that they are used, that they differ from each other, and what happens
//! when they cannot be had.

mod auto;
mod disks;
mod faults;
mod isolation;
mod memory;
mod pool;
mod twins;

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    containerd::Containerd,
    ctr::Run,
    process::Output,
    setup::Setup,
    templates::{Listed, Templates},
};

use crate::harness::IMAGE;

/// A containerd whose VMs are clones, and the template that they are clones of.
fn with_template(containerd: &Containerd) -> Result<(Templates<'_>, Listed)> {
    let templates = Templates::new(containerd)?;
    containerd.configure(&Setup::new().templates(&templates.dir, "use"))?;
    let template = templates.build()?;
    Ok((templates, template))
}

/// A containerd that has templates built when it needs them.
fn automatic(containerd: &Containerd) -> Result<Templates<'_>> {
    let templates = Templates::new(containerd)?;
    containerd.configure(&Setup::new().templates(&templates.dir, "auto"))?;
    Ok(templates)
}

/// The origin of a created container's VM in the shim's log: `clone` or `boot`.
pub(crate) fn origin(containerd: &Containerd, from: usize, id: &str) -> Result<String> {
    let created = |line: &&String| line.contains("container created") && has_id(line, id);
    let lines = containerd.log().since(from);
    let line = lines.iter().find(created).with_context(|| format!("no line of the creation of {id}"))?;
    let (_, tail) = line.split_once("origin=").with_context(|| format!("no origin on {line}"))?;
    Ok(tail.chars().take_while(char::is_ascii_alphabetic).collect())
}

/// The logger may have quoted the message.
fn has_id(line: &str, id: &str) -> bool {
    let after = |start: usize| line[start + 3..].trim_start_matches(['\\', '"']);
    line.match_indices("id=").any(|(start, _)| {
        let value = after(start);
        value.starts_with(id) && !value[id.len()..].starts_with(|c: char| c.is_ascii_alphanumeric())
    })
}

/// Runs a container that must succeed, in a VM of the given origin.
fn runs_from(containerd: &Containerd, wanted: &str) -> Result<()> {
    works_from(containerd, &containerd.run(IMAGE, &["echo", "well"]), wanted).map(drop)
}

fn works_from(containerd: &Containerd, run: &Run<'_>, wanted: &str) -> Result<Output> {
    let from = containerd.log().position();
    let output = run.output()?.ok()?;
    let origin = origin(containerd, from, run.container())?;
    ensure!(origin == wanted, "the VM of {} is no {wanted} but a {origin}: {output}", run.container());
    Ok(output)
}

/// The number of log lines since then that contain all the words.
fn lines_with(containerd: &Containerd, from: usize, words: &[&str]) -> usize {
    let lines = containerd.log().since(from);
    lines.iter().filter(|line| words.iter().all(|word| line.contains(word))).count()
}
