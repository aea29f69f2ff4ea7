//! Makes the QEMU of a clone from that of its template as it runs.

use std::{ffi::CString, fs::File, os::fd::OwnedFd};

use machinen_base::process::{Child, Jail, Twin, TwinOriginal};

use super::{
    argv::{self, fd},
    launch::LaunchError,
    snapshot::{self, OriginalQemu},
};
use crate::{spec::VmSpec, tap};

/// Makes the twin of the QEMU of a template. `inherited` is what another QEMU would inherit.
pub(super) async fn make(
    spec: &VmSpec,
    original: &OriginalQemu,
    turn: File,
    jail: Jail,
    inherited: Vec<(OwnedFd, i32)>,
    stderr: OwnedFd,
) -> Result<Child, LaunchError> {
    let failed = |action| move |source| LaunchError::Host { action, source };
    let mut replaced = vec![(stderr, vec![libc::STDERR_FILENO])];
    for (file, number) in inherited {
        if (fd::FIRST_TAP..fd::FIRST_VHOST).contains(&number) {
            tap::prepare_for_guest(&file).map_err(failed("set up a tap device"))?;
        }
        // QEMU has opened some of the files again, and uses other numbers for them.
        let numbers = original.numbers.get(&number);
        replaced.push((file, numbers.cloned().unwrap_or_else(|| vec![number])));
    }
    let name = CString::new(format!("machinen-{}", spec.id))
        .map_err(|error| LaunchError::Host { action: "name the process", source: error.into() })?;
    let renamed = (argv::process_name(snapshot::ORIGINAL), argv::process_name(&spec.id));
    let &OriginalQemu { pid, forker, .. } = original;
    let original = TwinOriginal { pid, forker };
    Twin { replaced, name, renamed, jail, turn }.start(original).await.map_err(LaunchError::Qemu)
}
