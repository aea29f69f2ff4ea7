//! Forks while there are other containers and images, and while other clients of containerd act.

use std::{fs, thread};

use anyhow::{Result, ensure};
use machinen_integration::{containerd::Containerd, paths::Version, setup::Setup};

use super::{
    count_above, counter, end_all,
    faults::{at, continues, failed, works},
    forking, nothing_of, sh,
};
use crate::harness::{IMAGE, on_every_containerd, on_newest_containerd, run_with};

on_every_containerd!(next_to_other_forks_and_checkpoints, names_that_are_taken, a_restart_of_containerd);
on_newest_containerd!(the_image_is_removed_meanwhile, the_source_is_removed_meanwhile, paused_meanwhile);

const REF: &str = "machinen.test/checkpoint:1";

fn forks(containerd: &Containerd, source: &str, new: &str) -> Result<()> {
    forking(containerd, &[source, new])?.run()?.ok().map(drop)
}

fn checkpoint(containerd: &Containerd, source: &str, image: &str) -> Result<()> {
    containerd.ctr_ok(&["containers", "checkpoint", "--rw", "--image", "--task", source, image]).map(drop)
}

/// Content of a checkpoint that exists already, of any client, is no reason to fail.
fn next_to_other_forks_and_checkpoints(containerd: &mut Containerd) -> Result<()> {
    let namespace = containerd.namespace().to_owned();
    containerd.ctr_ok(&[
        "namespaces",
        "label",
        &namespace,
        "containerd.io/namespace.shareable=true",
        "mine=yes",
    ])?;
    let containerd = &*containerd;
    let run = counter(containerd, &[])?;
    let source = run.container();
    let ids: Vec<_> = (0..5).map(|_| containerd.new_id()).collect();
    let before = count_above(containerd, source, 103)?;
    forks(containerd, source, &ids[0])?;
    thread::scope(|scope| {
        let both: Vec<_> =
            ids[1..3].iter().map(|id| scope.spawn(move || forks(containerd, source, id))).collect();
        both.into_iter().try_for_each(|fork| fork.join().expect("no panic"))
    })?;
    checkpoint(containerd, source, REF)?;
    forks(containerd, source, &ids[3])?;
    // A checkpoint by another client during the fork: both wait for their turns.
    containerd.ctr_ok(&["images", "rm", "--sync", REF])?;
    let from = containerd.log().position();
    let running = forking(containerd, &[source, &ids[4]])?.spawn()?;
    at(containerd, from, "/containers/create")?;
    checkpoint(containerd, source, REF)?;
    running.wait()?.ok()?;
    for id in &ids {
        let count = count_above(containerd, id, before)?;
        count_above(containerd, id, count)?;
        ensure!(sh(containerd, id, "hostname")? == *id, "{id} has another hostname");
    }
    continues(containerd, source)?;
    containerd.ctr_ok(&["images", "rm", "--sync", REF])?;
    super::nothing_but_the_fork(containerd)?;
    end_all(containerd, ids.iter().map(String::as_str).chain([source]))
}

/// A container, and a snapshot without one, such as a killed fork leaves them; each is unchanged after the
/// refusal.
fn names_that_are_taken(containerd: &mut Containerd) -> Result<()> {
    let containerd = &*containerd;
    let run = counter(containerd, &[])?;
    let (source, new) = (run.container(), containerd.new_id());
    let refused = |word: &str| -> Result<()> {
        let output = forking(containerd, &[source, &new])?.run()?;
        ensure!(output.status == 1 && output.error_text().contains(word), "{output}");
        ensure!(!output.error_text().contains("undoing a failed fork"), "{output}");
        Ok(())
    };
    let runtime = machinen_integration::paths::runtime();
    containerd.ctr_ok(&["containers", "create", "--runtime", &runtime, IMAGE, &new])?;
    refused("exists already")?;
    refused("exists already")?;
    let info = containerd.ctr_ok(&["containers", "info", &new])?;
    ensure!(info.contains("SnapshotKey"), "{info}");
    containerd.ctr_ok(&["containers", "rm", &new])?;
    containerd.ctr_ok(&["snapshots", "prepare", &new])?;
    refused("there is a snapshot")?;
    let snapshots = containerd.ctr_ok(&["snapshots", "ls"])?;
    ensure!(snapshots.contains(&new), "the other's snapshot is gone: {snapshots}");
    containerd.ctr_ok(&["snapshots", "rm", &new])?;
    // Of two forks with one name, one is made.
    let outputs = thread::scope(|scope| {
        let fork = || forking(containerd, &[source, &new])?.run();
        let both: Vec<_> = (0..2).map(|_| scope.spawn(fork)).collect();
        both.into_iter().map(|fork| fork.join().expect("no panic")).collect::<Result<Vec<_>>>()
    })?;
    ensure!(outputs.iter().filter(|output| output.status == 0).count() == 1, "{outputs:?}");
    count_above(containerd, &new, 102)?;
    end_all(containerd, [new.as_str()])?;
    works(containerd, source, &new)
}

/// The fork is undone when containerd serves again; the source runs all the time.
fn a_restart_of_containerd(containerd: &mut Containerd) -> Result<()> {
    let source = counter(containerd, &[])?.container().to_owned();
    let new = containerd.new_id();
    for moment in ["/snapshot/prepare", "/containers/create", "/tasks/checkpointed"] {
        let from = containerd.log().position();
        let running = forking(containerd, &[&source, &new])?.spawn()?;
        at(containerd, from, moment)?;
        containerd.restart()?;
        let output = running.wait()?;
        // containerd 1.x keeps a copy of a checkpoint there while it puts it into its content store.
        for left in fs::read_dir(containerd.root().join("tmp"))? {
            fs::remove_dir_all(left?.path())?;
        }
        // The restart may have fallen between two requests.
        if output.status == 0 {
            count_above(containerd, &new, 102)?;
            end_all(containerd, [new.as_str()])?;
        } else {
            let words = ["connection to containerd broke"];
            failed(containerd, &[&source, &new], &words, output.status, &output.error_text())?;
        }
        continues(containerd, &source)?;
    }
    works(containerd, &source, &new)
}

/// Content that only the image has kept is collected as garbage; the fork and its source need none of it.
fn the_image_is_removed_meanwhile(containerd: &mut Containerd) -> Result<()> {
    let run = counter(containerd, &[])?;
    let (source, new) = (run.container(), containerd.new_id());
    let from = containerd.log().position();
    let running = forking(containerd, &[source, &new])?.spawn()?;
    at(containerd, from, "/snapshot/prepare")?;
    containerd.ctr_ok(&["images", "rm", "--sync", IMAGE])?;
    running.wait()?.ok()?;
    count_above(containerd, &new, 102)?;
    continues(containerd, source)?;
    end_all(containerd, [source, &new])
}

/// The fork is complete, or nothing of it is left.
fn the_source_is_removed_meanwhile(containerd: &mut Containerd) -> Result<()> {
    for moment in ["/snapshot/prepare", "/tasks/checkpointed"] {
        let run = counter(containerd, &[])?;
        let (source, new) = (run.container(), containerd.new_id());
        let from = containerd.log().position();
        let running = forking(containerd, &[source, &new])?.spawn()?;
        at(containerd, from, moment)?;
        containerd.end(source)?;
        let output = running.wait()?;
        if output.status == 0 {
            count_above(containerd, &new, 102)?;
            end_all(containerd, [new.as_str()])?;
        } else {
            failed(containerd, &[source, &new], &[source], output.status, &output.error_text())?;
        }
        nothing_of(containerd, &new)?;
    }
    Ok(())
}

/// Each pause exports anew what the source has written: the copy is made again.
fn paused_meanwhile(containerd: &mut Containerd) -> Result<()> {
    disturbed(containerd, &[])
}

/// A disk that is copied must not be written: the copy is made again after a resume by another client.
#[test]
fn a_disk_of_the_snapshotters_is_paused_meanwhile() {
    run_with(Version::V2_1, &Setup::new().blockfile(), |containerd| {
        disturbed(containerd, &["--snapshotter", "blockfile"])
    });
}

fn disturbed(containerd: &Containerd, flags: &[&str]) -> Result<()> {
    let run = counter(containerd, flags)?;
    let (source, new) = (run.container(), containerd.new_id());
    sh(containerd, source, "i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo $i >/data/file$i; done")?;
    let from = containerd.log().position();
    let running = forking(containerd, &[source, &new])?.spawn()?;
    at(containerd, from, "/containers/create")?;
    for _ in 0..2 {
        // The request is refused while the fork has paused the source, or resumed it.
        containerd.ctr_output(&["tasks", "pause", source])?;
        containerd.ctr_output(&["tasks", "resume", source])?;
    }
    let output = running.wait()?.ok()?;
    if std::env::var_os("MACHINEN_TEST_SHOW").is_some() {
        println!("{output}");
    }
    count_above(containerd, &new, 102)?;
    ensure!(sh(containerd, &new, "ls /data | grep -c file")? == "300", "files are missing");
    continues(containerd, source)?;
    ensure!(fs::read_dir(containerd.root().join("tmp"))?.next().is_none(), "something is left");
    end_all(containerd, [source, &new])
}
