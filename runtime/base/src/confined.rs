//! Threads that can open no file but those below some directories (landlock(7)), and connect to nothing.
//!
//! What unpacks the bytes of a guest is a thread of a process that owns VMs. A mistake in it leads to no other file of the
//! host then. It is no boundary against code that the guest has brought to run there, which has the memory of the
//! whole process.

use std::{fs::File, io, os::fd::BorrowedFd, thread};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, PathBeneath, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, Scope,
};

/// What is restricted as far as the host's kernel can: Linux 6.12.
const RIGHTS: ABI = ABI::V6;

/// Runs `work` in a thread of its own, which can open and change only what is below the directories that `dirs` are open
/// on, in addition to what is open already. On a kernel without Landlock, or one that cannot move files between
/// directories then (before Linux 5.19), the work runs in this thread without restrictions. Blocks.
///
/// # Errors
/// The thread cannot be started or restricted. The work has not begun then.
///
/// # Panics
/// The work panics.
pub fn confined<T: Send>(dirs: &[BorrowedFd<'_>], work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let Ok(ruleset) = ruleset() else { return Ok(work()) };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("confined".to_owned()).spawn_scoped(scope, || {
            restrict(ruleset, dirs).map_err(io::Error::other)?;
            Ok(work())
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Whether a restricted thread is kept from the host's files.
///
/// # Errors
/// Those of [`confined`].
pub fn holds() -> io::Result<bool> {
    confined(&[], || File::open("/").is_err())
}

/// An error if the kernel has no Landlock, or too little of it.
fn ruleset() -> Result<Ruleset, RulesetError> {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let ruleset = ruleset.handle_access(AccessFs::Refer)?.set_compatibility(CompatLevel::BestEffort);
    ruleset
        .handle_access(AccessFs::from_all(RIGHTS))?
        .handle_access(AccessNet::from_all(RIGHTS))?
        .scope(Scope::from_all(RIGHTS))
}

fn restrict(ruleset: Ruleset, dirs: &[BorrowedFd<'_>]) -> Result<(), RulesetError> {
    let rules =
        dirs.iter().map(|dir| Ok::<_, RulesetError>(PathBeneath::new(dir, AccessFs::from_all(RIGHTS))));
    ruleset.create()?.add_rules(rules)?.restrict_self().map(drop)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        net::{TcpListener, TcpStream},
        os::fd::AsFd as _,
    };

    use super::*;

    #[test]
    fn only_what_is_below_the_directories_is_reached() {
        assert!(holds().unwrap(), "this kernel has no Landlock, or none of Linux 5.19");
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        [&one, &other].iter().for_each(|dir| fs::create_dir(dir).unwrap());
        fs::write(other.join("file"), "kept").unwrap();
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        let opened = File::open(&one).unwrap();
        confined(&[opened.as_fd()], || {
            fs::create_dir(one.join("sub")).unwrap();
            fs::write(one.join("a"), "new").unwrap();
            fs::hard_link(one.join("a"), one.join("sub/b")).unwrap();
            std::os::unix::fs::symlink(other.join("file"), one.join("link")).unwrap();
            let refused = [
                fs::write(other.join("file"), "lost").map(drop),
                fs::write(one.join("link"), "lost").map(drop),
                fs::read(other.join("file")).map(drop),
                fs::create_dir(other.join("made")),
                fs::remove_file(other.join("file")),
                fs::hard_link(one.join("a"), other.join("a")),
                fs::rename(one.join("a"), other.join("a")),
                TcpStream::connect(address).map(drop),
            ];
            for (number, result) in refused.into_iter().enumerate() {
                assert!(result.is_err(), "{number}");
            }
        })
        .unwrap();
        // The thread that waited is as free as before.
        assert_eq!(fs::read_to_string(other.join("file")).unwrap(), "kept");
        TcpStream::connect(address).unwrap();
    }

    #[test]
    fn files_are_linked_between_the_directories() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        [&one, &other].iter().for_each(|dir| fs::create_dir(dir).unwrap());
        fs::write(other.join("file"), "x").unwrap();
        let opened = [File::open(&one).unwrap(), File::open(&other).unwrap()];
        let linked = confined(&[opened[0].as_fd(), opened[1].as_fd()], || {
            fs::hard_link(other.join("file"), one.join("file"))
        });
        linked.unwrap().unwrap();
    }
}
