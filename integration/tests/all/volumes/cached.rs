//! What the guest keeps of a volume's files, and how often it asks the host. The server's own counts are exact, other than
//! times.

use std::{
    fs::{self, File},
    io::{Seek as _, SeekFrom, Write as _},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{containerd::Containerd, process::Invocation, served::Served};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{XattrFlags, getxattr, inotify, setxattr},
    io::Errno,
};

use super::{life::servers, served, shell, source};
use crate::harness::on_newest_containerd;

on_newest_containerd!(
    an_unchanged_file_is_read_once,
    a_file_that_is_open_for_writing_is_read_anew,
    few_requests_make_and_remove_a_file,
    a_closed_file_is_closed_on_the_host,
    a_listing_includes_the_attributes,
    a_write_takes_capabilities_away,
);

const SIZE: usize = 8 << 20;
/// A file is trusted to be unchanged 2.5 s after its last change.
const SETTLE: &str = "sleep 3";
const CAPABILITIES: &str = "security.capability";
const READ: &str = "cat /data/f | md5sum";

/// What the server has read so far: bytes, and calls. A request takes two calls, and its bytes count too.
fn read_by_server(containerd: &Containerd) -> Result<(u64, u64)> {
    let pid = *servers(containerd)?.first().context("no server")?;
    let counts = fs::read_to_string(format!("/proc/{pid}/io"))?;
    let count = |name: &str| {
        let line = counts.lines().find_map(|line| line.strip_prefix(name));
        Ok::<_, anyhow::Error>(line.context("no such count")?.trim().parse()?)
    };
    Ok((count("rchar:")?, count("syscr:")?))
}

/// A file that has not changed for long enough.
fn settled_file(served: &Served<'_>, data: &Path) -> Result<()> {
    let kind = Invocation::new("stat").args(["-f", "-c", "%T"]).arg(data).run()?.ok()?.text();
    let known = ["ext2/ext3", "xfs", "btrfs", "f2fs"];
    ensure!(known.contains(&kind.trim()), "the test's files are on {kind}: data are kept on {known:?} only");
    fs::write(data.join("f"), vec![b'x'; SIZE])?;
    shell(served, SETTLE).map(drop)
}

/// Opened again, an unchanged file is not read again; a changed one is, whatever its modification time says.
fn an_unchanged_file_is_read_once(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let served = served(containerd, &data)?;
    settled_file(&served, &data)?;
    let first = shell(&served, READ)?;
    let (before, _) = read_by_server(containerd)?;
    ensure!(shell(&served, READ)? == first, "the content has changed");
    let (after, _) = read_by_server(containerd)?;
    ensure!(after - before < 1 << 20, "{} bytes were read again", after - before);

    let modified = fs::metadata(data.join("f"))?.modified()?;
    let mut file = File::options().write(true).open(data.join("f"))?;
    file.seek(SeekFrom::Start(SIZE as u64 / 2))?;
    file.write_all(b"changed")?;
    file.set_modified(modified)?;
    drop(file);
    let changed = shell(&served, READ)?;
    ensure!(changed != first, "the guest has kept the former content");
    let host = Invocation::new("md5sum").arg(data.join("f")).run()?.ok()?.text();
    ensure!(host.split(' ').next() == changed.split(' ').next(), "the host has {host}, the guest {changed}");

    // A file that the guest itself has changed.
    let seen = shell(&served, "printf guest | dd of=/data/f conv=notrunc 2>/dev/null; head -c 5 /data/f")?;
    ensure!(seen == "guest", "{seen}");
    served.end()
}

/// A process of the host that has the file open may change it through a mapping, and no time says so.
fn a_file_that_is_open_for_writing_is_read_anew(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let served = served(containerd, &data)?;
    settled_file(&served, &data)?;
    let writer = File::options().write(true).open(data.join("f"))?;
    for _ in 0..2 {
        let (before, _) = read_by_server(containerd)?;
        shell(&served, READ)?;
        let (after, _) = read_by_server(containerd)?;
        ensure!(after - before >= SIZE as u64, "only {} bytes were read", after - before);
    }
    drop(writer);
    served.end()
}

/// LOOKUP, CREATE, WRITE and RELEASE; LOOKUP, UNLINK and FORGET.
fn few_requests_make_and_remove_a_file(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let served = served(containerd, &data)?;
    shell(&served, "echo x >/data/warm; rm /data/warm")?;
    for (script, most) in
        [("for n in $(seq 100); do echo x >/data/$n; done", 5), ("cd /data; rm $(seq 100)", 4)]
    {
        let (_, before) = read_by_server(containerd)?;
        shell(&served, script)?;
        let (_, after) = read_by_server(containerd)?;
        let requests = (after - before) / 2;
        ensure!(requests < 100 * most, "{requests} requests for 100 files: {script}");
    }
    served.end()
}

/// No process waits for that, and no further request follows.
fn a_closed_file_is_closed_on_the_host(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let served = served(containerd, &data)?;
    let closed = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&closed, &data, inotify::WatchFlags::CLOSE_WRITE)?;
    shell(&served, "exec 3>/data/f; echo x >&3")?;
    let timeout = Timespec { tv_sec: 10, tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(&closed, PollFlags::IN)], Some(&timeout))?;
    ensure!(ready == 1, "the host has the file still open for writing");
    served.end()
}

/// No file of the directory is looked up by itself.
fn a_listing_includes_the_attributes(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    fs::create_dir(data.join("dir"))?;
    for number in 0..100 {
        fs::write(data.join(format!("dir/{number}")), "x")?;
    }
    let served = served(containerd, &data)?;
    let (_, before) = read_by_server(containerd)?;
    let seen = shell(&served, "ls -l /data/dir | grep -c root")?;
    let (_, after) = read_by_server(containerd)?;
    ensure!(seen == "100\n", "{seen}");
    let requests = (after - before) / 2;
    ensure!(requests < 30, "{requests} requests for a directory of 100 files");
    served.end()
}

/// The guest's kernel knows that the new file has none.
fn a_write_takes_capabilities_away(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let served = served(containerd, &data)?;
    shell(&served, "echo x >/data/program; chmod 755 /data/program")?;
    // CAP_NET_RAW, permitted and effective (linux/capability.h, vfs_cap_data).
    let words = [0x0200_0001_u32, 1 << 13, 0, 0, 0];
    let value: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let program = data.join("program");
    setxattr(&program, CAPABILITIES, &value, XattrFlags::empty())?;
    // A write takes them away, on the host too.
    shell(&served, "echo y >>/data/program")?;
    let left = getxattr(&program, CAPABILITIES, &mut [0; 64][..]);
    ensure!(left == Err(Errno::NODATA), "a changed program has kept its capabilities: {left:?}");
    served.end()
}
