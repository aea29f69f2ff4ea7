//! Access to a container's files: by which users, for how long, and the cost of a guest or a host that does
//! not cooperate.

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
    os::fd::AsRawFd,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    process::{DEADLINE, Invocation, wait_for_end},
    served::Served,
    shim::{Client, Shim, V3},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{Shown, names, root};
use crate::harness::{on_every_containerd, on_newest_containerd};

on_every_containerd!(the_end_is_reported, killing_the_anchor_kills_the_container);
on_newest_containerd!(
    a_guest_that_hangs_is_not_waited_for,
    no_other_process_sees_the_files,
    without_fuse_there_is_an_empty_directory,
);

/// Longest for an access to a guest that does not answer, with a margin. One access can be two requests, the
/// second of which is made when the first has failed, but the view waits for one of them only.
const BOUND: Duration = Duration::from_secs(45);

fn the_end_is_reported(containerd: &mut Containerd) -> Result<()> {
    let shown = Shown::start(containerd)?;
    shown.inside("echo text >/file")?;
    let (mut file, dir) = (File::open(shown.root("file"))?, File::open(shown.root(""))?);
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    ensure!(text == "text\n", "{text}");
    let pid = shown.pid;
    shown.end()?;
    ensure!(wait_for_end(pid, Duration::from_secs(5))?, "the anchor outlives its container");
    // Processes that still have the file open get an error, at once.
    let begun = Instant::now();
    file.rewind()?;
    ensure!(file.read_to_string(&mut text).is_err(), "a file of a container that is gone");
    let through = PathBuf::from(format!("/proc/self/fd/{}/etc", dir.as_raw_fd()));
    ensure!(fs::read_dir(through).is_err(), "a directory of a container that is gone");
    ensure!(begun.elapsed() < Duration::from_secs(1), "the errors took {:?}", begun.elapsed());
    Ok(())
}

fn qemu(containerd: &Containerd, id: &str) -> Result<Pid> {
    let inventory = containerd.inventory()?;
    let mut processes = inventory.processes.iter();
    let found =
        processes.find(|process| process.command.contains("qemu-system") && process.command.contains(id));
    Ok(Pid::from_raw(found.with_context(|| format!("no QEMU in\n{inventory}"))?.pid.cast_signed()))
}

fn a_guest_that_hangs_is_not_waited_for(containerd: &mut Containerd) -> Result<()> {
    let shown = Shown::start(containerd)?;
    let file = shown.root("etc/passwd");
    fs::read(&file)?;
    kill(qemu(containerd, &shown.id)?, Signal::SIGSTOP)?;
    let begun = Instant::now();
    let refused = fs::read(&file);
    ensure!(refused.is_err(), "a stopped VM has answered");
    ensure!(begun.elapsed() < BOUND, "an error took {:?}", begun.elapsed());
    // The next access does not wait again so soon.
    let begun = Instant::now();
    ensure!(fs::read(&file).is_err(), "a stopped VM has answered");
    ensure!(begun.elapsed() < Duration::from_secs(1), "the next error took {:?}", begun.elapsed());
    shown.end()?;

    // A guest that was stopped for a short time is used again.
    let shown = Shown::start(containerd)?;
    let (file, qemu) = (shown.root("etc/passwd"), qemu(containerd, &shown.id)?);
    fs::read(&file)?;
    kill(qemu, Signal::SIGSTOP)?;
    ensure!(fs::read(&file).is_err(), "a stopped VM has answered");
    kill(qemu, Signal::SIGCONT)?;
    let end = Instant::now() + DEADLINE;
    let read = loop {
        match fs::read(&file) {
            Err(error) if error.raw_os_error() == Some(libc::EIO) && Instant::now() < end => {}
            read => break read?,
        }
        #[expect(clippy::disallowed_methods, reason = "the recovery of a guest has no event")]
        thread::sleep(Duration::from_millis(20));
    };
    ensure!(read.starts_with(b"root:"), "after a short stop");

    // A reader that waits when the container is killed gets an error then.
    kill(qemu, Signal::SIGSTOP)?;
    let waiting = thread::spawn(move || fs::read(&file));
    let begun = Instant::now();
    shown.end()?;
    let error = waiting.join().expect("reading does not panic");
    ensure!(error.is_err(), "a VM that is gone has answered");
    ensure!(begun.elapsed() < Duration::from_secs(20), "an error took {:?}", begun.elapsed());
    Ok(())
}

fn no_other_process_sees_the_files(containerd: &mut Containerd) -> Result<()> {
    let shown = Shown::start(containerd)?;
    ensure!(shown.root("etc/secret").metadata()?.len() > 0, "root may look");
    let host = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!host.contains("fuse.machinen"), "the host has it mounted:\n{host}");
    let own = fs::read_to_string(format!("/proc/{}/mountinfo", shown.pid))?;
    let mounts: Vec<&str> = own.lines().collect();
    let [mount] = mounts[..] else { anyhow::bail!("the anchor has more than its root:\n{own}") };
    ensure!(mount.contains(" / / rw,nosuid,nodev,noexec") && mount.contains(" fuse.machinen "), "{mount}");
    let status = fs::read_to_string(format!("/proc/{}/status", shown.pid))?;
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        ensure!(
            status.contains(&format!("{set}:\t0000000000000000\n")),
            "the anchor has capabilities:\n{status}"
        );
    }
    let fds = fs::read_dir(format!("/proc/{}/fd", shown.pid))?.count();
    ensure!(fds == 2, "stdin and stderr, and {} more", fds - 2);
    // Even a user who may inspect the process cannot read the files.
    let capabilities = "+sys_ptrace,+dac_override";
    let user = Invocation::new("setpriv").args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    let user = user.arg(format!("--inh-caps={capabilities}")).arg(format!("--ambient-caps={capabilities}"));
    let user = user.arg("cat").arg(shown.root("etc/passwd")).run()?;
    ensure!(user.status != 0 && user.error_text().contains("Permission denied"), "{user}");
    // The container does not see the anchor either.
    let names = shown.inside("cat /proc/[0-9]*/comm")?;
    ensure!(names.lines().all(|name| ["sleep", "sh", "cat"].contains(&name)), "the container sees {names}");
    shown.end()
}

fn without_fuse_there_is_an_empty_directory(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let shim = Shim::new(containerd)?;
    fs::copy(bundle.config(&["sleep", "1000"], |_| ())?, shim.bundle.join("config.json"))?;
    // The host has something else at /dev/fuse.
    let covered =
        "[ -n \"$COVERED\" ] || COVERED=1 exec unshare --mount sh \"$0\"; mount --bind /dev/null /dev/fuse";
    let client = Client::connect(&shim.serve_in(covered)?, V3)?;
    let mut served = Served { shim, client, pid: 0, shares_vm: false };
    served.create(|_| ())?;
    served.begin()?;
    ensure!(names(&root(served.pid, ""))?.is_empty(), "{:?}", names(&root(served.pid, ""))?);
    let refused = fs::write(root(served.pid, "file"), "");
    ensure!(
        refused.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ReadOnlyFilesystem),
        "{refused:?}"
    );
    let log = served.shim.log()?;
    let lines: Vec<_> = log.lines().filter(|line| line.contains("will not be visible on the host")).collect();
    ensure!(lines.len() == 1 && lines[0].contains("level=warn"), "not one clear line:\n{log}");
    ensure!(served.exec_to("works", &["true"], "")? == 0, "the container does not run");
    served.end()
}

fn killing_the_anchor_kills_the_container(containerd: &mut Containerd) -> Result<()> {
    let shown = Shown::start(containerd)?;
    fs::read(shown.root("etc/passwd"))?;
    let from = containerd.log().position();
    kill(Pid::from_raw(shown.pid.cast_signed()), Signal::SIGKILL)?;
    containerd.log().wait_for_event(from, "/tasks/exit")?;
    let deleted = containerd.ctr_output(&["tasks", "delete", &shown.id])?;
    ensure!(deleted.status == 137 || deleted.error_text().contains("137"), "{deleted}");
    containerd.ctr_ok(&["containers", "delete", &shown.id])?;
    Ok(())
}
