//! `machinen fork` of containers that have a network.

use anyhow::{Result, ensure};
use machinen_integration::{containerd::Containerd, process::Output};

use super::lab::{Lab, OTHER, OWN};
use crate::{
    fork::{fork, forking, sh},
    harness::{IMAGE, on_newest_containerd},
};

on_newest_containerd!(a_fork_needs_a_network_of_its_own);

/// `machinen fork` that must fail.
fn refused(containerd: &Containerd, args: &[&str]) -> Result<String> {
    let output: Output = forking(containerd, args)?.run()?;
    ensure!(output.status != 0, "{args:?}: {output}");
    Ok(output.error_text())
}

fn a_fork_needs_a_network_of_its_own(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::bridged()?;
    let second = lab.second([OTHER, super::lab::OTHER6])?;
    let second = second.display().to_string();
    let own = lab.path().display().to_string();
    let run = containerd.run(IMAGE, &["sh", "-c", "nc -ll -p 7000 -e cat"]);
    let run = run.detached().flag("--null-io").flag(lab.flag());
    run.ok()?;
    let (source, new, alone) = (run.container(), containerd.new_id(), containerd.new_id());
    let from = containerd.log().position();
    for (args, words) in [
        (&[source, &new][..], "has the network namespace"),
        (&["--netns", &own, source, &new], "the new container needs another one"),
        (&["--netns", "/nowhere/net", source, &new], "cannot use --netns /nowhere/net"),
        (&["--netns", "net", source, &new], "is not absolute"),
    ] {
        let error = refused(containerd, args)?;
        ensure!(error.contains(words), "{args:?}: no {words:?} in {error}");
    }
    let checkpoints = containerd.log().since(from);
    ensure!(!checkpoints.iter().any(|line| line.contains("container checkpointed")), "not refused at once");
    fork(containerd, &["--netns", "none", source, &alone])?;
    ensure!(sh(containerd, &alone, "ls /sys/class/net")? == "lo", "the fork has a network");
    fork(containerd, &["--netns", &second, source, &new])?;
    let addresses = sh(containerd, &new, "ip -o addr show dev eth0")?;
    ensure!(addresses.contains(OTHER) && !addresses.contains(&format!("{OWN}/")), "{addresses}");
    for address in [OWN, OTHER] {
        let output = lab.in_peer(&["busybox", "sh", "-c", &format!("echo {address} | nc {address} 7000")])?;
        ensure!(output.text() == format!("{address}\n"), "{address}: {output}");
    }
    [source, &new, &alone].into_iter().try_for_each(|id| containerd.end(id))?;
    lab.nothing_is_left()
}
