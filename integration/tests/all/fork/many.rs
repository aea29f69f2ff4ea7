//! Ten forks of one container, made at once.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use machinen_integration::{containerd::Containerd, paths};

use super::{count_above, counter, end_all, forking, nothing_but_the_fork, sh};
use crate::harness::on_newest_containerd;

on_newest_containerd!(ten_at_once);

const FORKS: usize = 10;

/// A small number, since the VMs are emulated on a few processors, and a source can only be checkpointed once
/// at a time.
const DEADLINE: Duration = Duration::from_secs(300);

fn ten_at_once(containerd: &mut Containerd) -> Result<()> {
    let run = counter(containerd, &[])?;
    let source = run.container();
    let before = count_above(containerd, source, 103)?;
    let ids: Vec<_> = (0..FORKS).map(|_| containerd.new_id()).collect();
    thread::scope(|scope| {
        let forks: Vec<_> = ids
            .iter()
            .map(|id| {
                let containerd = &*containerd;
                scope.spawn(move || -> Result<()> {
                    forking(containerd, &[source, id])?.deadline(DEADLINE).run()?.ok().map(drop)
                })
            })
            .collect();
        forks.into_iter().try_for_each(|fork| fork.join().expect("no panic"))
    })?;
    nothing_but_the_fork(containerd)?;
    // All forks run in parallel, each from the state of its source, each independently.
    let counts = ids.iter().map(|id| count_above(containerd, id, before)).collect::<Result<Vec<_>>>()?;
    for (id, count) in ids.iter().zip(counts) {
        count_above(containerd, id, count)?;
        sh(containerd, id, &format!("echo {id} >/data/mine"))?;
    }
    let ask = "cat /data/mine /proc/sys/kernel/hostname; uniq -d /data/log | wc -l";
    for id in &ids {
        let printed = sh(containerd, id, ask)?;
        ensure!(printed == format!("{id}\n{id}\n0"), "{id} printed {printed:?}");
    }
    let boots = ids.iter().map(|id| sh(containerd, id, "cat /proc/sys/kernel/random/boot_id"));
    let boots = boots.collect::<Result<BTreeSet<_>>>()?;
    ensure!(boots.len() == FORKS, "the VMs are not different: {boots:?}");
    count_above(containerd, source, before)?;
    let left = abandoned_checkpoints()?;
    ensure!(left.is_empty(), "images are left: {left:?}");
    end_all(containerd, ids.iter().map(String::as_str).chain([source]))
}

/// The directories of checkpoints that no fork has locked. Those of other tests' forks are in the same cache.
fn abandoned_checkpoints() -> Result<Vec<PathBuf>> {
    let cache = paths::workspace().join("target/test/rootdisk/forks");
    let dirs = fs::read_dir(cache)?.flatten().map(|entry| entry.path());
    let unlocked = |dir: &PathBuf| File::open(dir).is_ok_and(|dir| dir.try_lock().is_ok());
    Ok(dirs.filter(unlocked).collect())
}
