//! What a test changes before its containerd starts: machinen's configuration file and the environment.

use std::{collections::BTreeMap, path::Path};

use crate::paths;

/// Configuration of a private containerd and of the machinen that it runs.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Section, then key, then the value as TOML.
    machinen: BTreeMap<String, BTreeMap<String, String>>,
    env: BTreeMap<String, String>,
}

impl Setup {
    /// For tests: the checkout's assets and tools, and a rootdisk cache that all tests share.
    pub fn new() -> Self {
        let cache = paths::workspace().join("target/test/rootdisk");
        Self::of_user().set("rootdisk", "dir", Value::path(&cache)).set("log", "level", Value::text("debug"))
    }

    /// Nothing but where the checkout's assets and tools are; all else as any user has it.
    pub fn of_user() -> Self {
        let vsock = paths::tools().join("vhost-device-vsock");
        Self::default().set("assets", "dir", Value::path(&paths::assets())).set(
            "vm",
            "vhost_device_vsock",
            Value::path(&vsock),
        )
    }

    /// Sets a key of `machinen.toml`.
    pub fn set(mut self, section: &str, key: &str, value: Value) -> Self {
        self.machinen.entry(section.to_owned()).or_default().insert(key.to_owned(), value.0);
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

    pub fn number(number: u64) -> Self {
        Self(number.to_string())
    }
}
