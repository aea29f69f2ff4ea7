//! The disks of a clone, which its template had places for, and that they make no difference to a container.

use anyhow::{Result, ensure};
use machinen_integration::{containerd::Containerd, process::Output, setup::Setup};

use super::{with_template, works_from};
use crate::harness::{IMAGE, on_newest_containerd};

on_newest_containerd!(a_clone_starts_with_its_disks, a_container_in_a_clone_is_as_in_a_vm_that_boots);

/// The size that a guest sees of a disk in a place of its template's, in the unit of /proc/partitions, KiB.
const OF_TEMPLATE: &str = "16106127360";

/// Prints the disks that the guest sees, tries to write to the first one, and writes a file.
// A base disk of another VM must not be writable, however the guest got it.
const SCRIPT: &str =
    "cat /proc/partitions; mknod /base b 8 0 && ! head -c 1 /base && echo mine > /file && cat /file";

fn a_clone_starts_with_its_disks(containerd: &mut Containerd) -> Result<()> {
    let (templates, _) = with_template(containerd)?;
    for (wanted, mode, disks) in [("clone", "use", 2), ("boot", "off", 0)] {
        containerd.configure(&Setup::new().templates(&templates.dir, mode))?;
        let from = containerd.log().position();
        has_disks_of_template(containerd, wanted, disks)?;
        let attached = super::lines_with(containerd, from, &["container created", "attach-base="]);
        ensure!((attached == 0) == (wanted == "clone"), "{wanted}: {attached} base disks were attached");
    }
    templates.remove_all()
}

/// Checks that a container, whose VM is of this origin, has so many of its disks in places of the template's.
pub(super) fn has_disks_of_template(containerd: &Containerd, origin: &str, disks: usize) -> Result<()> {
    let text = works_from(containerd, &containerd.run(IMAGE, &["sh", "-c", SCRIPT]), origin)?.text();
    let seen = text.lines().filter(|line| line.contains(OF_TEMPLATE)).count();
    ensure!(seen == disks && text.ends_with("mine\n"), "{origin}: {text}");
    Ok(())
}

/// Everything that a process sees of itself, but for numbers that the kernel counts.
const OF_ITSELF: &str = "cat /proc/mounts /proc/self/cgroup /proc/self/limits /proc/self/uid_map /proc/self/gid_map \
    /proc/self/oom_score_adj /proc/self/personality /proc/self/comm; \
    grep -v -e ^Vm -e ^Rss -e ctxt_switches -e ^Hugetlb /proc/self/status; \
    cut -d' ' -f4-10 /proc/self/mountinfo; ls -ln /dev /proc/self/fd/ | sed 's/[A-Z][a-z][a-z]  *[0-9]* .*[0-9] //; s/\\[[0-9]*\\]//'; \
    ls -a /proc/1 /sys/fs/cgroup; cat /sys/fs/cgroup/*.max; env; id; pwd; hostname; \
    : > /dev/null && mknod /d b 8 16 && ! cat /d && ls -ldn / /d | cut -c1-40";

fn a_container_in_a_clone_is_as_in_a_vm_that_boots(containerd: &mut Containerd) -> Result<()> {
    let (templates, _) = with_template(containerd)?;
    let seen = |wanted: &str, mode: &str| -> Result<String> {
        containerd.configure(&Setup::new().templates(&templates.dir, mode))?;
        let run = containerd.run(IMAGE, &["sh", "-c", OF_ITSELF]).id("same");
        works_from(containerd, &run, wanted).map(|output: Output| output.text())
    };
    let (clone, boot) = (seen("clone", "use")?, seen("boot", "off")?);
    for (number, (clone, boot)) in clone.lines().zip(boot.lines()).enumerate() {
        ensure!(clone == boot, "line {number} is {clone:?} in a clone and {boot:?} in a VM that boots");
    }
    ensure!(
        clone.lines().count() == boot.lines().count(),
        "in a clone:\n{clone}\nin a VM that boots:\n{boot}"
    );
    ensure!(clone.lines().count() > 100, "too little is compared: {clone}");
    templates.remove_all()
}
