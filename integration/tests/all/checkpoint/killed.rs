//! CRIU is killed: the caller gets an error, the container continues or ends as a whole, nothing is left, and
//! the next try works.
//!
//! CRIU is killed by a container of the same pod that sees all processes of the VM.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::{
    api::{CheckpointTaskRequest, DeleteResponse, Empty, PauseRequest, ResumeRequest, StartResponse, Status},
    shim::oci::CheckpointOptions,
};
use machinen_integration::{
    bundle::{self, Bundle},
    containerd::Containerd,
    served::Served,
};
use serde_json::json;
use ttrpc::Code;

use super::{COUNTER, checkpoint, counts_from, refused, request};
use crate::harness::on_newest_containerd;

on_newest_containerd!(
    in_a_dump,
    in_a_dump_of_a_paused_container,
    with_code_in_the_processes,
    ahead_of_a_dump,
    in_a_restore,
    before_start,
    while_fetching_memory
);

/// The part of the error that names the cause.
const CAUSE: &str = "criu was killed by signal 9 (SIGKILL)";

/// The further part of the error if the container could not continue.
const ENDED: &str = "the container has ended";

/// Waits for the number's way back through the connection.
const ECHO: &str = "read -r i <&4";
/// Does not wait.
const NOTHING: &str = "true";

/// A counter with a connection to itself, and much memory in another process. The containers of a pod share a
/// network, so each connection needs a port of its own.
fn connected(port: u16, hear: &str) -> String {
    format!(
        "trap '' PIPE
         (head -c 64m /dev/zero; touch /tmp/ready; sleep 1000) | tail -c 64m &
         mkfifo /tmp/to /tmp/from /tmp/in /tmp/back
         nc -l -p {port} <>/tmp/back >/tmp/in &
         cat </tmp/in >/tmp/back &
         until grep -qi ':{port:04x} .* 0A ' /proc/net/tcp6; do usleep 20000; done
         nc 127.0.0.1 {port} </tmp/to >/tmp/from &
         exec 3>/tmp/to 4</tmp/from
         until [ -e /tmp/ready ]; do usleep 20000; done
         i=100
         while :; do i=$((i+1)); echo $i >&3; {hear}; echo $i >/dev/shm/new; mv /dev/shm/new /dev/shm/count; \
         usleep 50000; done"
    )
}

/// The CRIU that was asked to dump or restore: its name at the start, and the name that it gives itself
/// later.
const WORKER: &str = "swrk|rpc";

/// The moment at which CRIU is killed, as a condition of the shell: as soon as it exists.
const SEEN: &str = "true";
/// CRIU holds the processes.
const HOLDS: &str = "grep -qs 'TracerPid:.[1-9]' /proc/[0-9]*/status";
/// CRIU has put code of its own into one of the processes.
const INFECTS: &str = "grep -qs CRIUMFD /proc/[0-9]*/maps";
/// CRIU has made a first process.
const MAKES: &str = "[ $(grep -lsx criu /proc/[0-9]*/comm | wc -l) -ge 2 ]";
/// CRIU writes memory.
const WRITES: &str = "[ -s \"$(echo /proc/1/root/run/machinen/*/checkpoint/images/pages-1.img)\" ]";
/// CRIU has locked a connection.
const LOCKS: &str =
    "[ -e \"$(echo /proc/1/root/run/machinen/*/checkpoint/images/tcp-stream-*.img | cut -d' ' -f1)\" ]";

struct Pod<'a> {
    containerd: &'a Containerd,
    bundle: Bundle,
    idle: Served<'a>,
}

impl<'a> Pod<'a> {
    fn new(containerd: &'a Containerd) -> Result<Self> {
        let bundle = Bundle::busybox(containerd)?;
        Ok(Self { containerd, bundle, idle: Served::idle(containerd)? })
    }

    /// A container of the pod that runs a script, or is to be created from a checkpoint of it.
    fn container(&self, script: &str, annotation: &str) -> Result<Served<'a>> {
        let config = self.bundle.config(&["sh", "-c", script], |spec| {
            if !annotation.is_empty() {
                spec["annotations"] = json!({annotation: "true"});
            }
            let mounts = spec["mounts"].as_array_mut().expect("an array");
            mounts.push(bundle::mount("/tmp", "tmpfs", "tmpfs", &["mode=1777"]));
        })?;
        self.idle.in_same_vm(self.containerd, &config)
    }

    fn running(&self, script: &str, annotation: &str) -> Result<Served<'a>> {
        let mut served = self.container(script, annotation)?;
        served.create(|_| ())?;
        served.begin()?;
        let status = served.exec_to("look", &["sh", "-c", &counts_from(100)], "")?;
        ensure!(status == 0, "the container does not count: {status}");
        Ok(served)
    }

    /// Checkpoints a new container of the pod into a directory, and ends it.
    fn checkpointed(&self, dir: &Path, script: &str) -> Result<()> {
        let source = self.running(script, "")?;
        checkpoint(&source, dir)?;
        end(&source)
    }

    /// Restores another container from a directory, checks that it continues, and ends it.
    fn continues_from(&self, dir: &Path, script: &str) -> Result<()> {
        let mut restored = self.container(script, "")?;
        restored.create_from(dir)?;
        restored.begin()?;
        continues(&restored)?;
        end(&restored)
    }

    /// Runs a script that sees the VM's processes, and their files.
    fn outside(&self, script: &str, stdout: &Path) -> Result<Served<'a>> {
        let config = self.bundle.config(&["sh", "-c", script], |spec| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("an array");
            namespaces.retain(|namespace| namespace["type"] != "pid");
            for set in ["bounding", "effective", "permitted"] {
                let set = spec["process"]["capabilities"][set].as_array_mut().expect("an array");
                set.push(json!("CAP_SYS_PTRACE"));
            }
        })?;
        let mut served = self.idle.in_same_vm(self.containerd, &config)?;
        served.create(|request| request.stdout = format!("file://{}", stdout.display()))?;
        served.begin()?;
        Ok(served)
    }

    /// Kills the CRIU whose arguments match `word`, as soon as it exists and `when` is true.
    fn killer(&self, word: &str, when: &str) -> Result<Killer<'a>> {
        let script = format!(
            "n=0; until pid=; for d in $(grep -lsx criu /proc/[0-9]*/comm); do d=${{d%/comm}}; d=${{d#/proc/}}; \
             grep -qsE '{word}' /proc/$d/cmdline && [ $d -lt ${{pid:-99999}} ] && pid=$d; done; [ \"$pid\" ] && {when}; \
             do n=$((n+1)); [ $n -lt 2000 ] || exit 7; done; \
             [ $(cat /proc/$pid/oom_score_adj) -le -999 ] || exit 6; kill -9 $pid || exit 5"
        );
        Ok(Killer(self.outside(&script, Path::new("/dev/null"))?))
    }

    /// The content of the VM, without CRIU's caches and processes of the kernel: processes, mounts, control
    /// groups, temporary files.
    fn content(&self) -> Result<BTreeSet<String>> {
        let script = "for s in $(grep -LE '^PPid:.[02]$' /proc/[0-9]*/status); do head -n 1 $s; done; cut -d' ' -f5 /proc/1/mountinfo; \
                      cd /proc/1/root; find sys/fs/cgroup/machinen tmp run run/machinen/* -maxdepth 1";
        let printed = self.containerd.root().join("content");
        let looks = self.outside(script, &printed)?;
        ensure!(looks.wait("")?.exit_status == 0, "cannot look");
        gone(&looks)?;
        let content = fs::read_to_string(&printed)?.replace(&looks.shim.id, "(the observer)");
        fs::remove_file(&printed)?;
        Ok(content.lines().map(ToOwned::to_owned).collect())
    }

    /// Deletes the idle container; all others are deleted already.
    fn end(self) -> Result<()> {
        self.idle.end()
    }
}

struct Killer<'a>(Served<'a>);

impl Killer<'_> {
    /// Waits for the end of the killer, and checks that it has killed CRIU.
    fn done(self) -> Result<()> {
        let status = self.0.wait("")?.exit_status;
        ensure!(status == 0, "criu was not killed: {status}");
        gone(&self.0)
    }
}

/// Deletes a container that has stopped.
fn gone(served: &Served<'_>) -> Result<()> {
    served.client.ok::<DeleteResponse>("Delete", &served.delete(""))?;
    Ok(fs::remove_dir_all(&served.shim.bundle)?)
}

fn end(served: &Served<'_>) -> Result<()> {
    served.client.ok::<Empty>("Kill", &served.kill("", 9))?;
    served.wait("")?;
    gone(served)
}

fn continues(served: &Served<'_>) -> Result<()> {
    served.is("", Status::RUNNING, served.pid)?;
    // Like any container, and unlike CRIU, it can be killed when the VM is out of memory.
    let look = format!("[ $(cat /proc/1/oom_score_adj) = 0 ] || exit 5; {}", counts_from(100));
    let status = served.exec_to("look", &["sh", "-c", &look], "")?;
    ensure!(status == 0, "the container does not continue: {status}");
    Ok(())
}

fn in_a_dump(containerd: &mut Containerd) -> Result<()> {
    let pod = Pod::new(containerd)?;
    let source = pod.running(&connected(7000, ECHO), "")?;
    let dir = containerd.root().join("images");
    let message = killed_in_a_dump(&pod, &source, SEEN)?;
    ensure!(!message.contains(ENDED), "{message}");
    continues(&source)?;
    // The next checkpoint is complete.
    source.client.ok::<Empty>("Checkpoint", &with_connections(&source, &dir)?)?;
    continues(&source)?;
    end(&source)?;
    pod.continues_from(&dir, &connected(7000, ECHO))?;
    fs::remove_dir_all(&dir)?;
    pod.end()
}

/// A container that the client has paused stays paused.
fn in_a_dump_of_a_paused_container(containerd: &mut Containerd) -> Result<()> {
    let pod = Pod::new(containerd)?;
    // The container may be lost as in [`with_code_in_the_processes`], but not every time.
    for _ in 0..5 {
        let source = pod.running(COUNTER, "")?;
        let id = || source.shim.id.clone();
        source.client.ok::<Empty>("Pause", &PauseRequest { id: id(), ..Default::default() })?;
        if killed_in_a_dump(&pod, &source, HOLDS)?.contains(ENDED) {
            lost(&source)?;
            continue;
        }
        source.is("", Status::PAUSED, source.pid)?;
        let frozen =
            format!("grep -qx 'frozen 1' /proc/1/root/sys/fs/cgroup/machinen/{}/cgroup.events", id());
        let looks = pod.outside(&frozen, Path::new("/dev/null"))?;
        ensure!(looks.wait("")?.exit_status == 0, "a paused container runs");
        gone(&looks)?;
        source.client.ok::<Empty>("Resume", &ResumeRequest { id: id(), ..Default::default() })?;
        if continues(&source).is_err() {
            lost(&source)?;
            continue;
        }
        end(&source)?;
        return pod.end();
    }
    bail!("the container was lost each time")
}

/// The container has ended as a whole, and Wait reports its exit.
fn lost(source: &Served<'_>) -> Result<()> {
    let exit = source.wait("")?.exit_status;
    ensure!([133, 137].contains(&exit), "the container ended with {exit}");
    gone(source)
}

fn with_connections(source: &Served<'_>, dir: &Path) -> Result<CheckpointTaskRequest> {
    request(source, dir, Some(&CheckpointOptions { open_tcp: true, ..Default::default() }))
}

/// Kills CRIU in a checkpoint, and returns the error.
fn killed_in_a_dump(pod: &Pod<'_>, source: &Served<'_>, when: &str) -> Result<String> {
    let dir = pod.containerd.root().join("images");
    let killer = pod.killer(WORKER, when)?;
    let (code, message) = refused(&source.client, &with_connections(source, &dir)?)?;
    ensure!(code == Code::FAILED_PRECONDITION && message.contains(CAUSE), "{when}: {code:?}: {message}");
    killer.done()?;
    ensure!(!dir.exists(), "{when}: something is left of a checkpoint that failed");
    Ok(message)
}

/// While CRIU has its code in the processes they may be lost, but then all of them, and Wait reports the
/// exit.
fn with_code_in_the_processes(containerd: &mut Containerd) -> Result<()> {
    let pod = Pod::new(containerd)?;
    for (port, when) in (7000..).zip([HOLDS, INFECTS, WRITES, LOCKS]) {
        let source = pod.running(&connected(port, NOTHING), "")?;
        let message = killed_in_a_dump(&pod, &source, when)?;
        if message.contains(ENDED) || continues(&source).is_err() {
            lost(&source).context(when)?;
            continue;
        }
        let dir = containerd.root().join("images");
        source.client.ok::<Empty>("Checkpoint", &with_connections(&source, &dir)?)?;
        fs::remove_dir_all(&dir)?;
        continues(&source)?;
        end(&source)?;
    }
    pod.end()
}

fn ahead_of_a_dump(containerd: &mut Containerd) -> Result<()> {
    let pod = Pod::new(containerd)?;
    let dir = containerd.root().join("images");
    for (count, when) in [SEEN, HOLDS].into_iter().enumerate() {
        let source = pod.running(COUNTER, "io.machinen.pre-dump")?;
        let killer = pod.killer(WORKER, when)?;
        let taken = checkpoint(&source, &dir);
        killer.done()?;
        let log = pod.idle.shim.log()?;
        let logged =
            log.lines().filter(|line| line.contains("cannot copy memory ahead") && line.contains(CAUSE));
        ensure!(logged.count() == count + 1, "{when}: the log lacks the error: {log}");
        match taken {
            Ok(()) => {
                fs::remove_dir_all(&dir)?;
                continues(&source)?;
                end(&source)?;
            }
            // CRIU's code was in one of the processes, as in [`with_code_in_the_processes`].
            Err(_) if when == HOLDS => lost(&source)?,
            Err(error) => return Err(error),
        }
    }
    pod.end()
}

fn in_a_restore(containerd: &mut Containerd) -> Result<()> {
    let pod = Pod::new(containerd)?;
    let dir = containerd.root().join("images");
    pod.checkpointed(&dir, COUNTER)?;
    let before = pod.content()?;
    for when in [SEEN, MAKES] {
        let mut restored = pod.container(COUNTER, "")?;
        restored.trust(&dir)?;
        let killer = pod.killer(WORKER, when)?;
        let mut create = restored.shim.create_request();
        create.checkpoint = dir.display().to_string();
        let (code, message) = restored.client.refused("Create", &create)?;
        ensure!(code == Code::FAILED_PRECONDITION && message.contains(CAUSE), "{when}: {code:?}: {message}");
        killer.done()?;
        let after = pod.content()?;
        ensure!(before == after, "{when}: the VM's content was {before:#?} and is {after:#?}");
        restored.create(|request| request.checkpoint.clone_from(&create.checkpoint))?;
        restored.begin()?;
        continues(&restored)?;
        end(&restored)?;
    }
    fs::remove_dir_all(&dir)?;
    pod.end()
}

fn before_start(containerd: &mut Containerd) -> Result<()> {
    let pod = Pod::new(containerd)?;
    let dir = containerd.root().join("images");
    pod.checkpointed(&dir, COUNTER)?;
    let before = pod.content()?;
    let mut restored = pod.container(COUNTER, "")?;
    restored.create_from(&dir)?;
    pod.killer(WORKER, SEEN)?.done()?;
    let (code, message) = restored.client.refused("Start", &restored.start(""))?;
    ensure!(code == Code::FAILED_PRECONDITION && message.contains(CAUSE), "{code:?}: {message}");
    let exit = restored.wait("")?.exit_status;
    ensure!(exit == 137, "the container ended with {exit}");
    gone(&restored)?;
    let after = pod.content()?;
    ensure!(before == after, "the VM's content was {before:#?} and is {after:#?}");
    pod.continues_from(&dir, COUNTER)?;
    fs::remove_dir_all(&dir)?;
    pod.end()
}

fn while_fetching_memory(containerd: &mut Containerd) -> Result<()> {
    let pod = Pod::new(containerd)?;
    let dir = containerd.root().join("images");
    let script = format!(
        "(head -c 64m /dev/zero; touch /tmp/ready; sleep 1000) | tail -c 64m & \
                          until [ -e /tmp/ready ]; do usleep 20000; done; {COUNTER}"
    );
    pod.checkpointed(&dir, &script)?;
    let mut restored = pod.container(&script, "io.machinen.lazy")?;
    restored.create_from(&dir)?;
    restored.client.ok::<StartResponse>("Start", &restored.start(""))?;
    pod.killer("lazy-pages", SEEN)?.done()?;
    let exit = restored.wait("")?.exit_status;
    ensure!(exit == 137, "the container ended with {exit}");
    gone(&restored)?;
    let log = pod.idle.shim.log()?;
    let logged = |line: &str| line.contains("its memory could not be read") && line.contains(CAUSE);
    ensure!(log.lines().any(logged), "the log lacks the error: {log}");
    fs::remove_dir_all(&dir)?;
    pod.end()
}
