//! A guest's requests for its volumes: each is answered or ends the stream, and the server neither panics nor hangs.
//!
//! Run it as root. What the server changes is in a directory in memory that the thread of each run cannot leave.
#![no_main]

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::chroot, net::UnixStream},
    },
    path::Path,
    thread,
};

use libfuzzer_sys::fuzz_target;
use machinen::{confined::confined, shares::ServedFiles, sys::keep_only_capabilities};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// Those of the share server, which can make no device nodes (capabilities(7)).
const CAPABILITIES: [u8; 8] = [0, 1, 2, 3, 4, 6, 7, 31];

/// FUSE_INIT with the version and the options that the agent sends (linux/fuse.h).
fn init() -> Vec<u8> {
    let body: Vec<u8> = [7_u32, 31, 1 << 17, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut message = (40 + body.len() as u32).to_le_bytes().to_vec();
    message.extend(26_u32.to_le_bytes());
    message.resize(40, 0);
    message.extend(body);
    message
}

/// An empty file system in the memory of this thread's own mount namespace, without device nodes and too small to take
/// much of the host's.
fn small_file_system(at: &Path) -> nix::Result<()> {
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("fuzz"), at, Some("tmpfs"), MsFlags::MS_NODEV | MsFlags::MS_NOSUID, Some("size=16m"))
}

/// Serves what arrives below the directory, which the thread cannot leave.
fn serve(requests: UnixStream, dir: &Path) -> std::io::Result<()> {
    small_file_system(dir)?;
    fs::create_dir(dir.join("d"))?;
    fs::write(dir.join("f"), "content")?;
    let (root, files) = (File::open(dir)?, ServedFiles::new()?);
    let _ended = confined(&[root.as_fd()], || {
        chroot(dir).and_then(|()| std::env::set_current_dir("/")).expect("root");
        keep_only_capabilities(&CAPABILITIES).expect("root");
        files.serve(OwnedFd::from(requests).into())
    })?;
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let dir = tempfile::tempdir().expect("a directory");
    let (server, mut guest) = UnixStream::pair().expect("a pair of sockets");
    thread::scope(|scope| {
        scope.spawn(|| serve(server, dir.path()).expect("root, and a kernel with Landlock"));
        let mut replies = guest.try_clone().expect("a descriptor");
        scope.spawn(move || {
            let _read = replies.read_to_end(&mut Vec::new());
        });
        let _closed = guest.write_all(&init()).and_then(|()| guest.write_all(data));
        let _closed = guest.shutdown(Shutdown::Write);
    });
});
