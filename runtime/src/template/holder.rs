//! The process that keeps a template: it publishes it, and then does next to nothing until it is killed.
//!
//! Memory of a clone that its template never had becomes the template's too, as a page of zeros: that is how the kernel
//! copies what is missing in a file (mmap(2), MAP_PRIVATE). A template that has grown to twice its size gives way to a copy
//! of itself as soon as no clone uses it.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{
            ffi::OsStrExt as _,
            fs::{MetadataExt as _, OpenOptionsExt as _},
        },
    },
    path::Path,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{prctl, stat::Mode},
    unistd::mkfifo,
};

use super::{builder, pages, store};
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
    let names = store::TemplatePaths::new(Path::new(&dir), &key);
    let published = publish(&names).and_then(|held| named.map(|()| held).map_err(io::Error::from));
    // It is closed with this: whoever waits sees the end.
    if let Ok(report) = inherit::take(REPORT).map(File::from) {
        match &published {
            Ok(_) => builder::say(&report, "ready"),
            Err(error) => builder::say(&report, &format!("failed: cannot publish it: {error}")),
        }
    }
    // Only an error ends it, and with it the template, so that the next start has another one built.
    drop(published.map(|(memory, users)| keep(memory, users, &names)));
    std::process::exit(1)
}

/// Each time that the last clone has ended, sees to the memory.
fn keep(mut memory: OwnedFd, mut users: File, names: &store::TemplatePaths) -> io::Result<()> {
    let built = pages::allocated(&File::from(memory.try_clone()?))?;
    loop {
        poll(&mut [PollFd::new(users.as_fd(), PollFlags::empty())], PollTimeout::NONE)?;
        // Another one for the next time: a reader that has seen the last writer go sees nothing else any more.
        users = watch(names)?;
        let grown = File::from(memory.try_clone()?);
        if pages::allocated(&grown)? > 2 * built
            && let Ok(copy) = pages::copy(&grown)
        {
            // Under the number by which it is found. A host without memory for a copy keeps the old one.
            rustix::io::dup2(&copy, &mut memory)?;
        }
    }
}

/// Shows when nobody has the template in use any more (fifo(7)).
fn watch(names: &store::TemplatePaths) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_NONBLOCK).open(names.used())
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
fn publish(names: &store::TemplatePaths) -> io::Result<(OwnedFd, File)> {
    env::set_current_dir("/")?;
    let memory = inherit::take(MEMORY)?;
    store::gone(fs::remove_file(names.used()))?;
    mkfifo(&names.used(), Mode::S_IRUSR | Mode::S_IWUSR)?;
    let users = watch(names)?;
    fs::rename(names.unpublished(), names.manifest())?;
    Ok((memory, users))
}
