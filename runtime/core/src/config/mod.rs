//! The configuration file. Every key has a default, and `config/machinen.toml` documents all of them.

pub mod annotations;

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use machinen_base::error::{ErrorKind, HasKind};
use machinen_vm::{ChannelMode, accel::AccelMode};
use serde::{Deserialize, Serialize};

/// The environment variable that names the configuration file.
const PATH_VARIABLE: &str = "MACHINEN_CONFIG";

/// Read when `MACHINEN_CONFIG` is not set; the file may be missing.
const DEFAULT_PATH: &str = "/etc/machinen/machinen.toml";

/// All settings. The names of the keys include the units.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub assets: AssetsConfig,
    pub vm: VmConfig,
    pub template: TemplateConfig,
    pub pool: PoolConfig,
    pub checkpoint: CheckpointConfig,
    pub restore: RestoreConfig,
    pub rootdisk: RootdiskConfig,
    pub annotations: AnnotationsConfig,
    pub task: TaskConfig,
    pub log: LogConfig,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AssetsConfig {
    pub dir: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmConfig {
    pub qemu: PathBuf,
    pub vhost_device_vsock: PathBuf,
    pub accel: AccelMode,
    pub memory_mib: u32,
    pub vcpus: u32,
    pub channel: ChannelMode,
    pub kernel_args: String,
    pub io_uring: bool,
    pub boot_timeout_s: u64,
    pub memory_reserve_percent: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TemplateConfig {
    pub mode: TemplateMode,
    pub dir: PathBuf,
    pub budget_mib: u64,
}

/// Whether templates are used and built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TemplateMode {
    /// Existing templates are used, and missing ones are built in the background.
    Auto,
    /// Existing templates are used; none is built.
    Use,
    Off,
}

/// The warm pool: clones that wait for the next starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolConfig {
    pub size: u32,
    pub dir: PathBuf,
    pub containerd_timeout_s: u64,
}

/// How checkpoints are taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    pub pre_dump: bool,
    pub verify: VerifyMode,
}

/// Whether a checkpoint is verified before its request succeeds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerifyMode {
    #[default]
    Off,
    /// The checkpoint is restored in a VM of its own.
    Restore,
}

/// How containers are restored from checkpoints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RestoreConfig {
    pub lazy: bool,
    pub tcp: TcpMode,
}

/// What happens to established TCP connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TcpMode {
    /// They are restored.
    #[default]
    Keep,
    /// They are closed.
    Close,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RootdiskConfig {
    pub dir: PathBuf,
    pub min_size_mib: u64,
    pub writable_size_mib: u64,
    pub layer_max_entries: u64,
    pub mke2fs: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AnnotationsConfig {
    pub allow: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TaskConfig {
    pub metrics: MetricsFormat,
}

/// The message that carries a container's metrics to containerd.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MetricsFormat {
    /// The one that matches the host's cgroups.
    #[default]
    Auto,
    Cgroup1,
    Cgroup2,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    pub level: String,
}

/// Turns io_uring off for all processes (kernel.io_uring_disabled in the kernel's sysctl documentation).
const NO_IO_URING: &str = "sysctl.kernel.io_uring_disabled=2";

impl VmConfig {
    /// What the configuration adds to the kernel's command line. The user's own text comes last, so that it
    /// takes precedence.
    pub(crate) fn all_kernel_args(&self) -> String {
        match (self.io_uring, self.kernel_args.as_str()) {
            (true, args) => args.to_owned(),
            (false, "") => NO_IO_URING.to_owned(),
            (false, args) => format!("{NO_IO_URING} {args}"),
        }
    }
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            qemu: "qemu-system-x86_64".into(),
            vhost_device_vsock: "vhost-device-vsock".into(),
            accel: AccelMode::Auto,
            memory_mib: 0,
            vcpus: 0,
            channel: ChannelMode::Auto,
            kernel_args: String::new(),
            io_uring: true,
            boot_timeout_s: 60,
            memory_reserve_percent: 1,
        }
    }
}

impl Default for TemplateConfig {
    fn default() -> Self {
        Self { mode: TemplateMode::Auto, dir: "/run/machinen/template".into(), budget_mib: 1024 }
    }
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self { size: 0, dir: "/run/machinen/pool".into(), containerd_timeout_s: 600 }
    }
}

impl Default for RootdiskConfig {
    fn default() -> Self {
        Self {
            dir: "/var/lib/machinen/rootdisk".into(),
            min_size_mib: 2048,
            writable_size_mib: 16384,
            layer_max_entries: 2_000_000,
            mke2fs: "mke2fs".into(),
        }
    }
}

impl Default for AnnotationsConfig {
    fn default() -> Self {
        Self { allow: annotations::names().map(str::to_owned).collect() }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".to_owned() }
    }
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration file {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("the configuration file {} is not valid (see config/machinen.toml for every key)", path.display())]
    Parse { path: PathBuf, source: toml::de::Error },
    #[error("{} has an unknown annotation {name:?} in annotations.allow; known are {known}", path.display())]
    UnknownAnnotation { path: PathBuf, name: String, known: String },
}

impl HasKind for ConfigError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

/// The path of the configuration file: `MACHINEN_CONFIG`, or the default, which may be missing.
pub(crate) fn path() -> PathBuf {
    env::var_os(PATH_VARIABLE).map_or_else(|| DEFAULT_PATH.into(), PathBuf::from)
}

impl Config {
    /// Loads the file that `MACHINEN_CONFIG` names, or `/etc/machinen/machinen.toml`; the latter may be missing.
    ///
    /// # Errors
    /// The file cannot be read, or has a syntax error, an unknown key or an invalid value.
    pub fn load() -> Result<Self, ConfigError> {
        match (Self::read(&path()), env::var_os(PATH_VARIABLE)) {
            (Err(ConfigError::Read { source, .. }), None) if source.kind() == io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            (result, _) => result,
        }
    }

    fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse(&text, path)
    }

    /// Parses the text of the file at `path`, which is used in errors only.
    ///
    /// # Errors
    /// The text has a syntax error, an unknown key or an invalid value.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self =
            toml::from_str(text).map_err(|source| ConfigError::Parse { path: path.into(), source })?;
        for name in &config.annotations.allow {
            if !annotations::names().any(|known| known == name) {
                return Err(ConfigError::UnknownAnnotation {
                    path: path.into(),
                    name: name.clone(),
                    known: annotations::known_keys(),
                });
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_file_is_the_default() {
        let documented = Config::read(Path::new("../../config/machinen.toml")).unwrap();
        assert_eq!(documented, Config::default());
    }

    #[test]
    fn every_key_is_documented() {
        let text = fs::read_to_string("../../config/machinen.toml").unwrap();
        let all = toml::Table::try_from(Config::default()).unwrap();
        for (section, keys) in &all {
            for key in keys.as_table().unwrap().keys() {
                assert!(
                    text.contains(&format!("\n{key} = ")),
                    "{section}.{key} is not in config/machinen.toml"
                );
            }
        }
    }

    #[test]
    fn io_uring_is_turned_off_before_the_users_arguments() {
        let args = |io_uring, args: &str| {
            VmConfig { io_uring, kernel_args: args.into(), ..VmConfig::default() }.all_kernel_args()
        };
        assert_eq!(args(true, ""), "");
        assert_eq!(args(true, "debug"), "debug");
        assert_eq!(args(false, ""), NO_IO_URING);
        assert_eq!(args(false, "debug"), format!("{NO_IO_URING} debug"));
    }

    #[test]
    fn an_unknown_key_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "[vm]\nmemory = 3\n").unwrap();
        let error = machinen_base::error::chain(&Config::read(file.path()).unwrap_err());
        assert!(error.contains("unknown field `memory`"), "{error}");
    }
}
