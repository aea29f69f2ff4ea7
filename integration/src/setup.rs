//! Settings that a test changes before its containerd starts: machinen's configuration file and the
//! environment.

use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
};

use machinen::config::annotations;

use crate::paths;

/// Names the directory with the templates of the tests' VMs.
const TEMPLATES: &str = "MACHINEN_TEST_TEMPLATES";

/// Configuration of a private containerd and of the machinen that it runs.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Section, then key, then the value as TOML.
    machinen: BTreeMap<String, BTreeMap<String, String>>,
    env: BTreeMap<String, String>,
    /// The file system of the blockfile snapshotter's disks, if containerd gets it.
    pub(crate) blockfile: Option<&'static str>,
    /// The snapshotter of machinen's handlers of pods, if it is not that of all others.
    pub(crate) snapshotter: Option<&'static str>,
    pub(crate) cri: bool,
    /// Directories of programs that containerd and the runtimes find before the host's.
    pub(crate) programs: Vec<PathBuf>,
}

impl Setup {
    /// For tests: the checkout's assets and tools, all annotations, a rootdisk cache that all tests share, and
    /// the templates that `MACHINEN_TEST_TEMPLATES` names, a directory in which `make test` has built one;
    /// without it every VM boots.
    pub fn new() -> Self {
        let cache = paths::workspace().join("target/test/rootdisk");
        let setup = Self::of_user().all_annotations().set("rootdisk", "dir", Value::path(&cache)).set(
            "log",
            "level",
            Value::text("debug"),
        );
        match env::var_os(TEMPLATES) {
            Some(dir) => setup.templates(Path::new(&dir), "use"),
            None => setup.set("template", "mode", Value::text("off")),
        }
    }

    /// The directory of templates, and the mode of their use: `auto`, `use` or `off`.
    pub fn templates(self, dir: &Path, mode: &str) -> Self {
        self.set("template", "dir", Value::path(dir)).set("template", "mode", Value::text(mode))
    }

    /// Only the paths of the checkout's assets and tools, and no warm pool, whose clones outlive the starts that they
    /// are made after; all other keys have their defaults.
    pub fn of_user() -> Self {
        let vsock = paths::tools().join("vhost-device-vsock");
        Self::default()
            .set("assets", "dir", Value::path(&paths::assets()))
            .set("vm", "vhost_device_vsock", Value::path(&vsock))
            .set("pool", "size", Value::number(0))
    }

    /// Allows every annotation, also those that change how a VM works.
    pub fn all_annotations(self) -> Self {
        let allow: Vec<_> = annotations::names().collect();
        self.set("annotations", "allow", Value(format!("{allow:?}")))
    }

    /// Sets a key of `machinen.toml`.
    pub fn set(mut self, section: &str, key: &str, value: Value) -> Self {
        self.machinen.entry(section.to_owned()).or_default().insert(key.to_owned(), value.0);
        self
    }

    /// Gives containerd (1.7 and newer) the snapshotter whose snapshots are disks in files.
    pub fn blockfile(self) -> Self {
        self.blockfile_of("ext4")
    }

    /// The same with another file system on the disks, which mke2fs can make and the host can mount.
    pub fn blockfile_of(mut self, kind: &'static str) -> Self {
        self.blockfile = Some(kind);
        self
    }

    /// Gives pods of machinen (containerd 1.7 and newer) a snapshotter of their own.
    pub fn snapshotter(mut self, name: &'static str) -> Self {
        self.snapshotter = Some(name);
        self
    }

    /// Gives containerd the interface of Kubernetes, and a network namespace of its own.
    pub(crate) fn cri(mut self) -> Self {
        self.cri = true;
        self
    }

    /// Adds a directory of programs that containerd and the runtimes find before the host's.
    pub fn programs(mut self, dir: &Path) -> Self {
        self.programs.push(dir.to_owned());
        self
    }

    /// Sets a variable of containerd's environment, which its shims inherit.
    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.env.insert(name.to_owned(), value.to_string());
        self
    }

    pub(crate) fn environment(&self) -> impl Iterator<Item = (&String, &String)> {
        self.env.iter()
    }

    pub(crate) fn machinen_toml(&self) -> String {
        let section = |(name, keys): (&String, &BTreeMap<String, String>)| {
            let lines: String = keys.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
            format!("[{name}]\n{lines}")
        };
        self.machinen.iter().map(section).collect()
    }
}

/// A TOML value.
#[derive(Debug, Clone)]
pub struct Value(String);

impl Value {
    pub fn text(text: &str) -> Self {
        Self(format!("{text:?}"))
    }

    pub fn path(path: &Path) -> Self {
        Self::text(&path.display().to_string())
    }

    pub fn paths(paths: &[&Path]) -> Self {
        let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
        Self(format!("{paths:?}"))
    }

    pub fn number(number: u64) -> Self {
        Self(number.to_string())
    }

    pub fn flag(flag: bool) -> Self {
        Self(flag.to_string())
    }
}
