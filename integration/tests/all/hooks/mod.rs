//! OCI hooks: when each runs and where, what it gets, what a failure does, and that none runs twice.

mod failures;
mod killed;
mod moments;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use machinen_integration::containerd::Containerd;
use serde_json::{Value, json};

/// Hooks that write one line each to a file of the host, and their state to another.
struct HookLog {
    dir: PathBuf,
}

impl HookLog {
    fn new(containerd: &Containerd) -> Result<Self> {
        let dir = containerd.root().join(format!("hooks-{}", containerd.new_id()));
        fs::create_dir(&dir)?;
        Ok(Self { dir })
    }

    /// A hook that logs `NAME OWN-NETWORK-NAMESPACE NETWORK-NAMESPACE-OF-THE-PID`.
    fn hook(&self, name: &str) -> Value {
        self.hook_with(name, "true")
    }

    /// The same, and then it runs a shell script.
    fn hook_with(&self, name: &str, script: &str) -> Value {
        let dir = self.dir.display();
        let pid = format!("sed -n 's/.*\"pid\":\\([0-9]*\\).*/\\1/p' {dir}/{name}.json");
        shell(&format!(
            "cat > {dir}/{name}.json; echo {name} $(readlink /proc/self/ns/net) \
             $(readlink /proc/$({pid})/ns/net) >> {dir}/log; {script}"
        ))
    }

    /// A hook of each kind that runs on the host, which is named after its list.
    fn of_all_kinds(&self) -> Value {
        let kinds = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"];
        kinds.iter().map(|kind| ((*kind).to_owned(), json!([self.hook(kind)]))).collect()
    }

    /// The lines so far, in words.
    fn lines(&self) -> Result<Vec<Vec<String>>> {
        let path = self.dir.join("log");
        let text = if path.exists() { fs::read_to_string(&path)? } else { String::new() };
        Ok(text.lines().map(|line| line.split(' ').map(str::to_owned).collect()).collect())
    }

    /// The names of the hooks that have run so far.
    fn names(&self) -> Result<Vec<String>> {
        Ok(self.lines()?.into_iter().filter_map(|line| line.into_iter().next()).collect())
    }

    /// # Errors
    /// Other hooks have run.
    fn has_run(&self, names: &[&str]) -> Result<()> {
        let run = self.names()?;
        ensure!(run == names, "these hooks have run: {run:?}, instead of {names:?}");
        Ok(())
    }

    /// What a hook has read on its stdin.
    fn state(&self, name: &str) -> Result<Value> {
        let text = fs::read(self.dir.join(format!("{name}.json")))?;
        serde_json::from_slice(&text).with_context(|| format!("{name} has read no state"))
    }
}

/// A hook that runs a shell script, on the host or in busybox.
fn shell(script: &str) -> Value {
    json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] })
}
