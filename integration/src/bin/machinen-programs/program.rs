//! The description of a program: its file in `integration/programs`.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result};
use clap::ValueEnum;
use machinen_integration::paths;
use serde::Deserialize;

/// A program, as described by its file. Scripts are run by `sh -c` in the container.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Program {
    /// Name of the file, without `.toml`.
    #[serde(skip)]
    pub(crate) name: String,
    /// A description of a few words.
    pub(crate) about: String,
    /// The image with the program. Programs of the same image share it, with the packages of all of them.
    pub(crate) image: String,
    /// Debian packages that it needs.
    pub(crate) packages: Vec<String>,
    /// The container's process, at each start.
    pub(crate) run: String,
    /// Succeeds when the program can be used; is repeated until then.
    pub(crate) ready: String,
    /// Uses the program. `$1` is the number of uses that the container's state must contain, including this
    /// one.
    #[serde(rename = "use")]
    pub(crate) usage: String,
    /// Whether earlier uses are still in the state after a stop and a start.
    #[serde(default = "yes")]
    pub(crate) durable: bool,
    /// Prints the limits that the program sees; without it the files of its control group are read.
    pub(crate) limits: Option<String>,
    /// What `limits` must print.
    pub(crate) sees: Option<String>,
    /// Further flags of `ctr run`.
    #[serde(default)]
    pub(crate) flags: Vec<String>,
    /// How /sys/fs/cgroup is mounted.
    #[serde(default = "read_only")]
    pub(crate) cgroup: String,
    /// Limit of memory, MiB.
    #[serde(default = "some_memory")]
    pub(crate) memory: u64,
    /// Longest that the program may take to get ready, or to be used.
    #[serde(default = "some_seconds")]
    pub(crate) seconds: u64,
    /// The signal that asks it to end.
    #[serde(default = "sigterm")]
    pub(crate) stop: String,
    /// Steps that must fail, with a part of the error.
    #[serde(default)]
    refused: BTreeMap<Runtime, BTreeMap<Step, String>>,
}

/// The runtime of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Runtime {
    Machinen,
    Runc,
}

/// The steps of each program, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Step {
    Start,
    Use,
    Limits,
    Checkpoint,
    Restore,
    Fork,
    Restart,
    /// The end: nothing of the containers is left.
    End,
}

fn yes() -> bool {
    true
}

fn read_only() -> String {
    "ro".to_owned()
}

fn some_memory() -> u64 {
    512
}

fn some_seconds() -> u64 {
    150
}

fn sigterm() -> String {
    "SIGTERM".to_owned()
}

impl Program {
    /// The expected part of a step's error, if the step must fail.
    pub(crate) fn refusal(&self, runtime: Runtime, step: Step) -> Option<&str> {
        self.refused.get(&runtime)?.get(&step).map(String::as_str)
    }
}

impl Runtime {
    /// The runtime's name in containerd.
    pub(crate) fn id(self) -> String {
        match self {
            Self::Machinen => paths::runtime(),
            Self::Runc => paths::RUNC.to_owned(),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Machinen => "machinen",
            Self::Runc => "runc",
        }
    }
}

impl Step {
    pub(crate) const ALL: [Self; 8] = [
        Self::Start,
        Self::Use,
        Self::Limits,
        Self::Checkpoint,
        Self::Restore,
        Self::Fork,
        Self::Restart,
        Self::End,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Use => "use",
            Self::Limits => "limits",
            Self::Checkpoint => "checkpoint",
            Self::Restore => "restore",
            Self::Fork => "fork",
            Self::Restart => "restart",
            Self::End => "end",
        }
    }
}

/// All programs: those of the same image follow each other.
///
/// # Errors
/// A file cannot be read, or does not describe a program.
pub(crate) fn load() -> Result<Vec<Program>> {
    let dir = paths::workspace().join("integration/programs");
    let mut programs = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            programs.push(read(&path).with_context(|| format!("{} is no program", path.display()))?);
        }
    }
    programs.sort_by(|one, other| (&one.image, &one.name).cmp(&(&other.image, &other.name)));
    Ok(programs)
}

fn read(path: &Path) -> Result<Program> {
    let mut program: Program = toml::from_str(&fs::read_to_string(path)?)?;
    program.name = path.file_stem().and_then(|stem| stem.to_str()).context("odd name")?.to_owned();
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_a_program() {
        let programs = load().expect("all of them can be read");
        assert!(programs.len() >= 20, "only {} programs", programs.len());
        for program in &programs {
            assert!(!program.about.is_empty() && !program.packages.is_empty(), "{program:?}");
            // Without a script, the memory limit is the only one that is read.
            assert!(
                program.limits.is_some() || program.sees.is_none(),
                "{} has expected limits and no script that prints them",
                program.name
            );
        }
        let short: Vec<_> = programs.iter().filter(|program| program.image == crate::SHORT).collect();
        assert!((4..=5).contains(&short.len()), "{} programs in the short form", short.len());
    }

    #[test]
    fn an_unknown_field_is_no_program() {
        let text = "about = 'a'\nimage = 'b'\npackages = []\nrun = ''\nready = ''\nuse = ''\n";
        assert!(toml::from_str::<Program>(text).is_ok());
        assert!(toml::from_str::<Program>(&format!("{text}umask = 1\n")).is_err());
        assert!(toml::from_str::<Program>(&format!("{text}[refused.machinen]\nfrok = 'x'\n")).is_err());
    }

    #[test]
    fn a_refusal_is_of_one_runtime_and_step() {
        let text = "about = 'a'\nimage = 'b'\npackages = []\nrun = ''\nready = ''\nuse = ''\n[refused.runc]\nfork = 'no'\n";
        let program: Program = toml::from_str(text).expect("a program");
        assert_eq!(program.refusal(Runtime::Runc, Step::Fork), Some("no"));
        assert_eq!(program.refusal(Runtime::Runc, Step::Start), None);
        assert_eq!(program.refusal(Runtime::Machinen, Step::Fork), None);
    }
}
