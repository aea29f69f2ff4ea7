//! The life of one program's container, step by step.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use machinen_integration::{
    containerd::Containerd,
    paths,
    process::{Invocation, Output, wait_for_end},
    task::Listed,
};

use crate::{
    program::{Program, Runtime, Step},
    report::{Outcome, Row},
};

/// Longest that a program may take to end when it is asked to, before it is killed.
const GRACE: Duration = Duration::from_secs(30);
/// Longest that a killed container may take to end.
const KILLED: Duration = Duration::from_secs(60);
/// The most memory that ctr and the VM use for themselves.
const OVERHEAD: Duration = Duration::from_secs(120);

/// Scripts that use a program begin with this.
const PRELUDE: &str =
    "set -eu\nexpect() { [ \"$1\" = \"$2\" ] || { echo \"'$1' instead of '$2'\"; exit 1; }; }\n";
/// Tries the script `$1` until it succeeds or `$2` seconds have passed.
const UNTIL: &str = r#"end=$(($(date +%s) + $2))
until timeout 20 sh -c "$1" >/tmp/.ready 2>&1; do
  [ "$(date +%s)" -lt "$end" ] || { cat /tmp/.ready; exit 1; }
  sleep 0.2
done"#;
/// The limit of memory, where control groups have it: version 2, or 1.
const MEMORY: &str =
    "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes";

struct Walk<'a> {
    containerd: &'a Containerd,
    program: &'a Program,
    runtime: Runtime,
    image: &'a str,
    row: Row,
    /// Images of checkpoints.
    checkpoints: Vec<String>,
    /// All containers that were started, whether they run or not.
    containers: Vec<String>,
}

/// A container, and the number of uses that its state contains.
#[derive(Debug, Clone)]
struct Subject {
    id: String,
    uses: u32,
}

/// Takes a program through all steps, and removes everything of it, whatever the outcome.
pub(crate) fn walk(containerd: &Containerd, program: &Program, runtime: Runtime, image: &str) -> Row {
    let row = Row::new(program, runtime);
    let (checkpoints, containers) = (Vec::new(), Vec::new());
    let mut walk = Walk { containerd, program, runtime, image, row, checkpoints, containers };
    let before = containerd.inventory();
    walk.all();
    walk.row.fill("the program does not run");
    walk.step(Step::End, |walk| {
        walk.clear()?;
        containerd.settle(&before?)
    });
    walk.row
}

impl Walk<'_> {
    fn all(&mut self) {
        let mut source = Subject { id: self.containerd.new_id(), uses: 0 };
        let runs = self.step(Step::Start, |walk| walk.start(&source))
            && self.step(Step::Use, |walk| walk.use_once(&mut source));
        if !runs {
            return;
        }
        self.step(Step::Limits, |walk| walk.limits(&source));
        if self.runtime == Runtime::Runc && !can_checkpoint() {
            let reason = "CRIU does not run on this host";
            self.row.set(Step::Checkpoint, Outcome::NotTried(reason.to_owned()));
        } else if self.step(Step::Checkpoint, |walk| walk.checkpoint(&mut source)) {
            let restored = Subject { id: self.containerd.new_id(), uses: source.uses - 1 };
            self.step(Step::Restore, |walk| walk.restore(restored));
        }
        self.row.unless(Step::Restore, "there is no checkpoint");
        if self.runtime == Runtime::Runc {
            self.row.set(Step::Fork, Outcome::NotTried("runc cannot fork".to_owned()));
        } else {
            self.step(Step::Fork, |walk| walk.fork(&mut source));
        }
        self.step(Step::Restart, |walk| walk.restart(&mut source));
    }

    /// Whether the step succeeded.
    fn step(&mut self, step: Step, run: impl FnOnce(&mut Self) -> Result<()>) -> bool {
        let started = Instant::now();
        let result = run(self);
        let outcome = Outcome::of(result, started.elapsed(), self.program.refusal(self.runtime, step));
        let passed = matches!(outcome, Outcome::Passed(_));
        self.row.set(step, outcome);
        passed
    }

    fn start(&mut self, subject: &Subject) -> Result<()> {
        let program = self.program;
        self.containers.push(subject.id.clone());
        let cgroup = format!(
            "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options={}:nosuid:noexec:nodev",
            program.cgroup
        );
        let memory = (program.memory << 20).to_string();
        let run = self.containerd.run(self.image, &["sh", "-c", &program.run]).detached().id(&subject.id);
        let run = run.runtime(&self.runtime.id()).flags(&["--memory-limit", &memory, "--mount", &cgroup]);
        let run = run.flag("--log-uri").flag(format!("file://{}", self.output(subject).display()));
        let flags: Vec<_> = program.flags.iter().map(String::as_str).collect();
        run.flags(&flags).invocation()?.deadline(OVERHEAD).run()?.ok()?;
        self.ready(subject)
    }

    /// The output of the program.
    fn output(&self, subject: &Subject) -> PathBuf {
        self.containerd.root().join(format!("{}.output", subject.id))
    }

    fn ready(&self, subject: &Subject) -> Result<()> {
        let seconds = self.program.seconds.to_string();
        let ready = self.exec(subject, &["sh", "-c", UNTIL, "sh", &self.program.ready, &seconds])?;
        ready.ok().with_context(|| format!("does not get ready; printed {}", self.printed(subject)))?;
        Ok(())
    }

    /// The end of the program's output, for errors.
    fn printed(&self, subject: &Subject) -> String {
        let text = fs::read(self.output(subject)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text[text.len().saturating_sub(700)..]).into_owned();
        format!("{:?}", text.trim())
    }

    fn use_once(&self, subject: &mut Subject) -> Result<()> {
        subject.uses += 1;
        let script = format!("{PRELUDE}{}", self.program.usage);
        let (uses, seconds) = (subject.uses.to_string(), self.program.seconds.to_string());
        let used = self.exec(subject, &["timeout", "-k", "5", &seconds, "sh", "-c", &script, "sh", &uses])?;
        used.ok().with_context(|| {
            format!("use {uses} fails; the program has printed {}", self.printed(subject))
        })?;
        Ok(())
    }

    fn limits(&self, subject: &Subject) -> Result<()> {
        let script = self.program.limits.as_deref().unwrap_or(MEMORY);
        let memory = (self.program.memory << 20).to_string();
        let expected = self.program.sees.as_deref().unwrap_or(&memory);
        let printed = self.exec(subject, &["timeout", "60", "sh", "-c", script])?.ok()?.text();
        ensure!(printed.trim() == expected, "sees {:?} instead of {expected:?}", printed.trim());
        Ok(())
    }

    /// The container continues to run afterwards, whether it can be checkpointed or not.
    fn checkpoint(&mut self, source: &mut Subject) -> Result<()> {
        let name = format!("machinen.test/checkpoint-{}:1", source.id);
        self.checkpoints.push(name.clone());
        let args = ["containers", "checkpoint", "--rw", "--image", "--task", &source.id, &name];
        let taken = self.containerd.ctr(args)?.deadline(OVERHEAD).run()?.ok();
        let reason = self.reason(source);
        self.use_once(source).context("the container after its checkpoint")?;
        taken.map(drop).context(reason)
    }

    /// runc names a file with CRIU's reasons; machinen quotes the reasons.
    fn reason(&self, source: &Subject) -> String {
        let log = fs::read(self.containerd.bundle(&source.id).join("criu-dump.log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let errors: Vec<_> = log.lines().filter(|line| line.contains("Error (")).collect();
        format!("cannot be checkpointed{}{}", if errors.is_empty() { "" } else { ": " }, errors.join("; "))
    }

    fn restore(&mut self, mut restored: Subject) -> Result<()> {
        let name = self.checkpoints.last().context("there is no checkpoint")?.clone();
        self.containers.push(restored.id.clone());
        let args = ["containers", "restore", "--rw", "--live", &restored.id, &name];
        self.containerd.ctr(args)?.deadline(OVERHEAD).run()?.ok()?;
        self.use_once(&mut restored).context("the restored container")?;
        self.remove(&restored.id)
    }

    fn fork(&mut self, source: &mut Subject) -> Result<()> {
        let mut forked = Subject { id: self.containerd.new_id(), uses: source.uses };
        self.containers.push(forked.id.clone());
        let fork = self.containerd.machinen(&["fork", "--namespace", self.containerd.namespace()])?;
        let fork = fork.arg("--address").arg(self.containerd.socket()).args([&source.id, &forked.id]);
        let done = fork.env("TMPDIR", self.containerd.root().join("tmp")).deadline(OVERHEAD).run()?.ok();
        self.use_once(source).context("the source of a fork")?;
        done?;
        self.use_once(&mut forked).context("the fork")?;
        self.use_once(source).context("the source of a fork, once more")?;
        self.remove(&forked.id)
    }

    fn restart(&self, subject: &mut Subject) -> Result<()> {
        self.stop(&subject.id)?;
        let log = format!("file://{}", self.output(subject).display());
        let start = ["tasks", "start", "--detach", "--log-uri", &log, &subject.id];
        self.containerd.ctr(start)?.deadline(OVERHEAD).run()?.ok().context("cannot start it again")?;
        self.ready(subject)?;
        if !self.program.durable {
            subject.uses = 0;
        }
        self.use_once(subject).context("after a stop and a start")
    }

    fn exec(&self, subject: &Subject, command: &[&str]) -> Result<Output> {
        let exec = self.containerd.exec(&subject.id, &self.containerd.new_id(), command);
        exec.invocation()?.deadline(OVERHEAD + Duration::from_secs(self.program.seconds)).run()
    }

    /// Asks the program to end, and kills it if it does not end in time.
    fn stop(&self, id: &str) -> Result<()> {
        let pid = self.containerd.task(id).listed()?.pid;
        self.containerd.ctr_ok(&["tasks", "kill", "--signal", &self.program.stop, id])?;
        if !wait_for_end(pid, GRACE)? {
            println!("   {id} does not end by {} within {GRACE:?}, and is killed", self.program.stop);
            self.containerd.ctr_ok(&["tasks", "kill", "--signal", "SIGKILL", id])?;
            ensure!(wait_for_end(pid, KILLED)?, "{id} does not end by SIGKILL");
        }
        self.delete_task(id)
    }

    /// Kills and removes a container, parts of which may be missing.
    fn remove(&self, id: &str) -> Result<()> {
        if let Some(Listed { pid, .. }) = self.containerd.task(id).find()? {
            self.containerd.ctr_output(&["tasks", "kill", "--signal", "SIGKILL", id])?;
            ensure!(wait_for_end(pid, KILLED)?, "{id} does not end by SIGKILL");
            self.delete_task(id)?;
        }
        self.containerd.ctr_output(&["containers", "delete", id])?;
        Ok(())
    }

    /// The end of the process is visible before containerd is notified of it.
    fn delete_task(&self, id: &str) -> Result<()> {
        let end = Instant::now() + GRACE;
        loop {
            let from = self.containerd.log().position();
            let deleted = self.containerd.ctr_output(&["tasks", "delete", id])?;
            if self.containerd.task(id).find()?.is_none() {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            let found =
                self.containerd.log().wait_within(left, from, |line| line.contains("topic=/tasks/exit"));
            if found.is_err() {
                bail!("the ended task {id} cannot be deleted: {deleted}");
            }
        }
    }

    fn clear(&mut self) -> Result<()> {
        for id in std::mem::take(&mut self.containers) {
            self.remove(&id)?;
            let output = self.containerd.root().join(format!("{id}.output"));
            if output.exists() {
                fs::remove_file(output)?;
            }
        }
        for image in std::mem::take(&mut self.checkpoints) {
            self.containerd.ctr_output(&["images", "rm", "--sync", &image])?;
        }
        // containerd unpacks a checkpoint for the runtime, and never removes it.
        for entry in fs::read_dir(self.containerd.root().join("tmp"))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("ctrd-checkpoint") {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }
}

/// The directory in which `make setup` has installed CRIU for runc.
pub(crate) fn criu_dir() -> PathBuf {
    paths::workspace().join("target/tools/criu/bin")
}

/// Whether this host's kernel has the features that CRIU needs.
fn can_checkpoint() -> bool {
    Invocation::new(criu_dir().join("criu")).arg("check").run().is_ok_and(|output| output.status == 0)
}
