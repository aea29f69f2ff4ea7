//! The process that keeps a template: it publishes it, and then does nothing until it is killed.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::Path,
};

use nix::sys::prctl;

use super::{builder, store};
use crate::sys::inherit;

/// First argument of a process that is a holder; its directory and key follow.
pub(super) const ARGUMENT: &str = "template-holder";

/// Numbers of the descriptors that it keeps.
pub(super) const MEMORY: i32 = 3;
pub(super) const DEVICES: i32 = 4;
pub(super) const LOCK: i32 = 5;
/// Whoever waits for the builder: the end of it is the end of the wait.
pub(super) const REPORT: i32 = 6;

pub(super) fn main(mut args: impl Iterator<Item = String>) -> ! {
    let (Some(dir), Some(key)) = (args.next(), args.next()) else { std::process::exit(2) };
    // Its own name in process lists.
    let named = prctl::set_name(c"machinen-templ");
    let published = publish(Path::new(&dir), &key).and(named.map_err(io::Error::from));
    // It is closed with this: whoever waits sees the end.
    if let Ok(report) = inherit::take(REPORT).map(File::from) {
        match &published {
            Ok(()) => builder::say(&report, "ready"),
            Err(error) => builder::say(&report, &format!("failed: cannot publish it: {error}")),
        }
    }
    if published.is_err() {
        std::process::exit(1);
    }
    loop {
        nix::unistd::pause();
    }
}

/// The process that holds a template, whatever its manifest says.
pub(super) fn find(dir: &Path, key: &str) -> Option<u32> {
    let identity = |dir: &Path| fs::metadata(dir).ok().map(|dir| (dir.dev(), dir.ino()));
    let dir = identity(dir)?;
    let holds = |pid: u32| {
        let args = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut args = args.split(|byte| *byte == 0).skip(1).map(OsStr::from_bytes);
        args.next() == Some(ARGUMENT.as_ref())
            && args.next().and_then(|other| identity(other.as_ref())) == Some(dir)
            && args.next() == Some(key.as_ref())
    };
    let processes = fs::read_dir("/proc").ok()?;
    let mut pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|pid| holds(*pid))
}

/// From here on the descriptors are under the numbers that the manifest stands for.
fn publish(dir: &Path, key: &str) -> io::Result<()> {
    let names = store::Names::new(dir, key);
    env::set_current_dir("/")?;
    fs::rename(names.unpublished(), names.manifest())
}
