//! Templates of one containerd, and their states.

use std::{
    fs::{self, DirBuilder},
    os::{fd::AsFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};
use serde::Deserialize;

use crate::{
    containerd::Containerd,
    process::{Output, wait_for_end},
};

/// Longest that a builder may take: it runs at a low priority, next to other tests.
const DEADLINE: Duration = Duration::from_secs(180);

/// A directory of templates below a containerd's root. The keeper of that containerd also ends their holders.
#[derive(Debug)]
pub struct Templates<'a> {
    containerd: &'a Containerd,
    pub dir: PathBuf,
}

/// A template, as reported by `machinen template ls`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Listed {
    pub key: String,
    pub state: String,
    /// Pid of the process that keeps it.
    pub holder: u32,
    /// Bytes.
    pub allocated: u64,
}

/// Names that appeared in a directory while this exists.
#[derive(Debug)]
pub struct Watch {
    dir: PathBuf,
    inotify: Inotify,
    seen: Vec<String>,
}

impl<'a> Templates<'a> {
    /// Name of the directory below the containerd's root.
    pub const DIR: &'static str = "templates";

    /// # Errors
    /// The directory cannot be made; there can be only one.
    pub fn new(containerd: &'a Containerd) -> Result<Self> {
        let dir = containerd.root().join(Self::DIR);
        DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self { containerd, dir })
    }

    /// `machinen template` with these arguments.
    ///
    /// # Errors
    /// The program cannot be run.
    pub fn command(&self, args: &[&str]) -> Result<Output> {
        self.containerd.machinen(&[&["template"], args].concat())?.run()
    }

    /// Builds the template of plain containers in this directory, which must be in the containerd's
    /// configuration.
    ///
    /// # Errors
    /// The template could not be built; the builder's output is quoted.
    pub fn build(&self) -> Result<Listed> {
        let printed = self.containerd.root().join("template-build");
        // Run by the keeper and not by the test: the holder must be a descendant of the keeper.
        self.containerd.run_script(&format!("machinen template build >{} 2>&1\n", printed.display()))?;
        let listed = self.list()?;
        let printed = || fs::read_to_string(&printed).unwrap_or_default();
        let [template] = &listed[..] else { anyhow::bail!("{} templates: {}", listed.len(), printed()) };
        let printed = printed();
        ensure!(template.state == "ready", "the template is {}: {printed}", template.state);
        ensure!(!printed.contains("clones will be slow"), "{printed}");
        Ok(template.clone())
    }

    /// # Errors
    /// `machinen template ls` fails.
    pub fn list(&self) -> Result<Vec<Listed>> {
        let output = self.command(&["ls", "--json"])?.ok()?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("odd list: {output}"))
    }

    /// The only template, which is ready.
    ///
    /// # Errors
    /// There is no ready template, or more than one template.
    pub fn only(&self) -> Result<Listed> {
        let listed = self.list()?;
        let [template] = &listed[..] else { anyhow::bail!("not one template: {listed:?}") };
        ensure!(template.state == "ready", "not ready: {template:?}");
        Ok(template.clone())
    }

    /// Removes everything and waits for the end of the holders.
    ///
    /// # Errors
    /// `machinen template rm` fails, or a holder or a file is left.
    pub fn remove_all(&self) -> Result<()> {
        let holders = self.list()?;
        self.command(&["rm", "--all"])?.ok()?;
        for template in holders {
            ensure!(wait_for_end(template.holder, Duration::ZERO)?, "{template:?} still has its holder");
        }
        let left: Vec<_> = fs::read_dir(&self.dir)?.flatten().map(|entry| entry.file_name()).collect();
        ensure!(left.is_empty(), "left in {}: {left:?}", self.dir.display());
        Ok(())
    }

    /// Notes the files that appear from now on.
    ///
    /// # Errors
    /// The directory cannot be watched.
    pub fn watch(&self) -> Result<Watch> {
        Watch::of(&self.dir)
    }

    /// Waits until no builder is working.
    ///
    /// # Errors
    /// A builder still was after the deadline.
    pub fn quiet(&self) -> Result<()> {
        for process in self.containerd.inventory()?.processes {
            if process.command.contains("template-builder") {
                ensure!(wait_for_end(process.pid, DEADLINE)?, "{process:?} does not end");
            }
        }
        Ok(())
    }
}

impl Watch {
    /// # Errors
    /// The directory cannot be watched.
    pub fn of(dir: &Path) -> Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let events = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
        inotify.add_watch(dir, events).with_context(|| format!("cannot watch {}", dir.display()))?;
        Ok(Self { dir: dir.to_owned(), inotify, seen: Vec::new() })
    }

    /// How many files with this extension have appeared so far.
    ///
    /// # Errors
    /// The directory cannot be watched.
    pub fn count(&mut self, extension: &str) -> Result<usize> {
        match self.inotify.read_events() {
            Ok(events) => {
                let names = events.into_iter().filter_map(|event| event.name);
                self.seen.extend(names.map(|name| name.to_string_lossy().into_owned()));
            }
            Err(nix::errno::Errno::EAGAIN) => {}
            Err(error) => return Err(error).context("cannot read inotify events"),
        }
        let has = |name: &&String| Path::new(name).extension().is_some_and(|is| is == extension);
        Ok(self.seen.iter().filter(has).count())
    }

    /// Waits until a file with this extension has appeared.
    ///
    /// # Errors
    /// No file has before the deadline.
    pub fn wait_for(&mut self, extension: &str) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        while self.count(extension)? == 0 {
            self.changed(end).with_context(|| format!("no .{extension}"))?;
        }
        Ok(())
    }

    /// Waits until a condition is true that can change with each new file.
    ///
    /// # Errors
    /// The condition is not true before the deadline.
    pub fn wait_until(&mut self, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        while !done()? {
            self.changed(end)?;
            self.count("")?;
        }
        Ok(())
    }

    fn changed(&self, end: Instant) -> Result<()> {
        let left = end.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "nothing but {:?} in {}", self.seen, self.dir.display());
        let mut fds = [PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX))
            .context("cannot wait for inotify events")?;
        Ok(())
    }
}
