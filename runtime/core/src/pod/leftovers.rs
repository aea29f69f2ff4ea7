//! What is left of a pod whose owner was killed, and how that is removed.
//!
//! QEMU, its helpers, the anchors and the share server die with their owner. Files, cgroups, the redirection of packets
//! and the poststop hooks are left: the pod's state directory has records of them.

use std::{path::Path, time::Instant};

use machinen_base::{
    error::chain,
    fs::{FileError, remove_dir_if_exists},
    process::ReservedUser,
};

use super::{
    cover::{self, COVERS_DIR},
    sandbox_files,
};
use crate::{
    hooks::{PoststopRecord, recorded},
    host_cgroup, network,
};

/// Directory with the VM's sockets and console log, in a pod's state directory.
pub(super) const VM_DIR: &str = "vm";

/// Directory with the records of the pod's poststop hooks, in its state directory.
pub(super) const POSTSTOP_DIR: &str = "poststop";

/// Removes what is left of the pod with this state directory, whose owner has ended. `bundle` is that of its first
/// container. Works in any partial state: what is gone already is not an error. Hooks that still run at `until` are
/// killed. Returns the problems that have not kept the rest from being removed.
///
/// # Errors
/// Files of the pod cannot be removed.
pub async fn remove(state_dir: &Path, bundle: &Path, until: Instant) -> Result<Vec<String>, FileError> {
    let mut problems = run_poststop_hooks(&state_dir.join(POSTSTOP_DIR), until).await;
    let mut note = |result: Result<(), String>| problems.extend(result.err());
    note(cover::uncover_abandoned(state_dir).map_err(|error| chain(&error)));
    note(sandbox_files::remove(state_dir).map_err(|error| chain(&error)));
    note(host_cgroup::remove_abandoned(state_dir).map_err(|error| chain(&error)));
    note(network::disconnect_abandoned(bundle).map_err(|error| chain(&error)));
    // A killed owner has not released the users of its children.
    note(ReservedUser::sweep().map_err(|error| chain(&error)));
    for dir in [VM_DIR, POSTSTOP_DIR, COVERS_DIR] {
        let path = state_dir.join(dir);
        remove_dir_if_exists(&path).map_err(FileError::at("remove", path))?;
    }
    Ok(problems)
}

/// Runs the poststop hooks of all containers of the pod; returns their failures.
async fn run_poststop_hooks(dir: &Path, until: Instant) -> Vec<String> {
    let mut problems = Vec::new();
    let ids = recorded(dir).unwrap_or_else(|error| {
        problems.push(chain(&error));
        Vec::new()
    });
    for id in ids {
        let failures = match PoststopRecord::open(dir, &id) {
            Ok(Some(record)) => record.run(&[], Some(until)).await,
            Ok(None) => Ok(Vec::new()),
            Err(error) => Err(error),
        };
        problems.extend(failures.unwrap_or_else(|error| vec![error]).iter().map(|error| chain(error)));
    }
    problems
}
