//! Processes that run this program at another entry point than its command line.
//!
//! A binary that owns VMs starts such processes of itself. The first argument of a process is the name of its entry
//! point, so that ps(1) shows what the process does. Each binary passes its table to [`dispatch`] before it reads its
//! command line.

use std::{env, ffi::CString, path::PathBuf, process::ExitCode};

use nix::sys::prctl;

use crate::process::Spawn;

/// An entry point of a binary.
#[derive(Debug, Clone, Copy)]
pub struct EntryPoint {
    /// The first argument of a process that starts here.
    pub name: &'static str,
    /// What the process does; it gets the arguments after the name.
    pub main: fn(Vec<String>) -> ExitCode,
}

impl EntryPoint {
    /// A process that starts here; see [`spawn`].
    pub fn spawn(&self) -> Spawn {
        spawn(self.name)
    }
}

/// A process of this program that starts at the entry point `name`. It is the program that runs now, even if another one
/// has taken its place on disk.
pub fn spawn(name: &str) -> Spawn {
    let listed = env::args_os().next().map(PathBuf::from);
    let listed = listed.and_then(|path| path.file_name().map(ToOwned::to_owned));
    Spawn::new("/proc/self/exe").arg0(listed.unwrap_or_else(|| "machinen".into())).args([name])
}

/// Runs the entry point that this process was started for. None: the process was started for its command line.
pub fn dispatch(entry_points: &[&[EntryPoint]]) -> Option<ExitCode> {
    let mut args = env::args_os().skip(1);
    let first = args.next()?;
    let entry_point =
        entry_points.iter().copied().flatten().find(|entry_point| first == *entry_point.name)?;
    // The kernel cuts it off after 15 bytes. Without it the process is called "exe".
    let name = CString::new(entry_point.name).expect("a name without NUL");
    if let Err(error) = prctl::set_name(&name) {
        tracing::debug!(entry_point = entry_point.name, "cannot set the name of the process: {error}");
    }
    Some((entry_point.main)(args.map(|arg| arg.to_string_lossy().into_owned()).collect()))
}
