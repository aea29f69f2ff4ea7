//! The process that holds a template: it publishes the template and keeps it in memory until it is killed.
//!
//! Templates grow: where a clone writes to memory that its template never had, the kernel adds a page of
//! zeros to the template's memfd before it makes the clone's copy (mmap(2), MAP_PRIVATE). A template that has
//! grown to twice its size is replaced by a compact copy as soon as no clone uses it.

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
    process::ExitCode,
};

use machinen_base::{
    fs::{lock, remove_if_exists},
    process::{self, ignore_children},
    reexec::EntryPoint,
    sys::inherit,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::Mode,
    unistd::mkfifo,
};

use super::{builder, pages, paths::TemplatePaths};

/// The process that holds a template; its arguments are the directory of templates, the key, and if there is one the pid of the
/// QEMU that clones are twins of, with the number under which that has opened the memory.
pub(super) const ENTRY_POINT: EntryPoint = EntryPoint { name: "template-holder", main };

/// Numbers of the descriptors that the holder keeps open.
pub(super) const MEMORY: i32 = 3;
pub(super) const DEVICES: i32 = 4;
pub(super) const LOCK: i32 = 5;
/// A pipe to the process that waits for the builder. The wait ends when the pipe is closed.
pub(super) const REPORT: i32 = 6;

fn main(args: Vec<String>) -> ExitCode {
    let (dir, key, original) = match &args[..] {
        [dir, key] => (dir, key, None),
        [dir, key, pid, number] => match (pid.parse(), number.parse()) {
            (Ok(pid), Ok(number)) => (dir, key, Some(Original { pid, number })),
            _ => return ExitCode::from(2),
        },
        _ => return ExitCode::from(2),
    };
    let names = TemplatePaths::new(Path::new(dir), key);
    let published = publish(&names);
    // Dropping `report` closes the pipe, which ends the wait.
    if let Ok(report) = inherit::take(REPORT).map(File::from) {
        match &published {
            Ok(_) => builder::send_line(&report, "ready"),
            Err(error) => builder::send_line(&report, &format!("failed: cannot publish it: {error}")),
        }
    }
    // Only an error ends the holder, and the template with it. The next start then has another one built.
    drop(published.map(|(memory, users)| keep(memory, users, original, &names)));
    ExitCode::FAILURE
}

/// The QEMU that clones are twins of, a child of this process.
struct Original {
    pid: u32,
    /// The number under which it has opened the memory.
    number: i32,
}

/// Replaces the memory by a compact copy if it has grown, each time that the last clone has ended. Ends when the original does.
fn keep(
    mut memory: OwnedFd,
    mut users: File,
    original: Option<Original>,
    names: &TemplatePaths,
) -> io::Result<()> {
    // Twins are children of this process, too, and have keepers that learn how they end.
    ignore_children()?;
    let end = original.as_ref().map(|original| process::watch_end(original.pid)).transpose()?;
    let built = pages::allocated(&File::from(memory.try_clone()?))?;
    loop {
        let mut events = vec![PollFd::new(users.as_fd(), PollFlags::empty())];
        events.extend(end.as_ref().map(|end| PollFd::new(end.as_fd(), PollFlags::POLLIN)));
        poll(&mut events, PollTimeout::NONE)?;
        if events.get(1).and_then(PollFd::any) == Some(true) {
            return Err(io::Error::other("the template's QEMU has ended"));
        }
        // The fifo is opened again: a reader that has seen the last writer close it sees no further event.
        users = watch(names)?;
        let grown = File::from(memory.try_clone()?);
        if pages::allocated(&grown)? > 2 * built
            && let Ok(copy) = pages::copy(&grown)
        {
            if let Some(Original { pid, number }) = original {
                // No twin is made meanwhile.
                let turn = File::options().append(true).create(true).mode(0o600).open(names.turn())?;
                lock(&turn)?;
                process::prepare_for_twins(pid, &copy, number)?;
            }
            // The copy gets the descriptor number under which clones find the memory. If the host has no
            // memory for a copy, the old one is kept.
            rustix::io::dup2(&copy, &mut memory)?;
        }
    }
}

/// Opens the fifo that shows when no clone uses the template any more (fifo(7)).
fn watch(names: &TemplatePaths) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_NONBLOCK).open(names.used())
}

/// Finds the process that holds a template, without relying on the manifest.
///
/// Any user can run a program with a holder's arguments, some of them with root's rights (set-user-ID). So the
/// process must also belong to the caller and have the template's lock file open, which no other user can
/// reach.
pub(super) fn find(dir: &Path, key: &str) -> Option<u32> {
    let identity = |path: &Path| fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
    let lock = identity(&TemplatePaths::new(dir, key).lock());
    let dir = identity(dir)?;
    let user = nix::unistd::geteuid().as_raw();
    let holds = |pid: u32| {
        let args = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut args = args.split(|byte| *byte == 0).skip(1).map(OsStr::from_bytes);
        args.next() == Some(ENTRY_POINT.name.as_ref())
            && args.next().and_then(|other| identity(other.as_ref())) == Some(dir)
            && args.next() == Some(key.as_ref())
            && fs::metadata(format!("/proc/{pid}")).is_ok_and(|process| process.uid() == user)
            && identity(format!("/proc/{pid}/fd/{LOCK}").as_ref()) == lock
            && lock.is_some()
    };
    let processes = fs::read_dir("/proc").ok()?;
    let mut pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|pid| holds(*pid))
}

/// Publishes the manifest. The descriptors have the numbers under which clones look for them.
fn publish(names: &TemplatePaths) -> io::Result<(OwnedFd, File)> {
    env::set_current_dir("/")?;
    let memory = inherit::take(MEMORY)?;
    remove_if_exists(&names.used())?;
    mkfifo(&names.used(), Mode::S_IRUSR | Mode::S_IWUSR)?;
    let users = watch(names)?;
    fs::rename(names.unpublished(), names.manifest())?;
    Ok((memory, users))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use machinen_base::process::{Child, Spawn, Stdio};

    use super::*;

    /// Starts a process with the arguments of a holder, and with this file as its descriptor of the lock.
    fn resembling(dir: &Path, key: &str, lock: &Path) -> Child {
        let lock = File::options().create(true).append(true).open(lock).unwrap();
        let dir = dir.to_str().unwrap();
        Spawn::new("env")
            .args(["-C", dir, "sh", ENTRY_POINT.name, dir, key])
            .fd(lock.into(), LOCK)
            .stdout(Stdio::Pipe)
            .start()
            .unwrap()
    }

    /// Waits until a process executes the script.
    fn wait_for(process: &mut Child) {
        let mut stdout = File::from(OwnedFd::from(process.stdout.take().unwrap()));
        stdout.read_exact(&mut [0]).unwrap();
    }

    #[tokio::test]
    async fn the_arguments_of_a_holder_do_not_make_one() {
        let dir = tempfile::tempdir().unwrap();
        let (fifo, key) = (dir.path().join("fifo"), "k");
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        fs::write(dir.path().join(ENTRY_POINT.name), "echo; read forever < fifo\n").unwrap();
        let lock = TemplatePaths::new(dir.path(), key).lock();
        fs::write(&lock, "").unwrap();
        // The pid of the stranger is lower, as a rule, so it would be found first.
        let mut stranger = resembling(dir.path(), key, &dir.path().join("another"));
        let mut holder = resembling(dir.path(), key, &lock);
        wait_for(&mut stranger);
        wait_for(&mut holder);
        assert_eq!(find(dir.path(), key), Some(holder.pid()));
        holder.kill().await.unwrap();
        assert_eq!(find(dir.path(), key), None);
        stranger.kill().await.unwrap();
    }
}
