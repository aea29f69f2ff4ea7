//! The configuration file. Every key has a default, and `config/machinen.toml` documents all of them.

pub mod annotations;
pub mod copies;
mod error;
pub mod ports;
mod vm;

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use machinen_base::{DATA_DIR, RUN_DIR, owner, space::DiskReserve};
use machinen_storage::{container_disk::ContainerDiskOptions, rootdisk::BuildOptions};
use machinen_vm::{MAX_NICS, accel::AccelMode};
use serde::{Deserialize, Serialize};

use crate::traces::Endpoint;
use copies::CopyMount;
pub use error::ConfigError;
use ports::PublishedPort;
pub use vm::VmConfig;

/// The environment variable that names the configuration file. The processes that a process starts have it too, so that
/// they have the same configuration.
pub const PATH_VARIABLE: &str = "MACHINEN_CONFIG";

/// Read when `MACHINEN_CONFIG` is not set; the file may be missing.
const DEFAULT_PATH: &str = "/etc/machinen/machinen.toml";

/// All settings. The names of the keys include the units.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The file that this was loaded from, which may be missing if it is the default one.
    #[serde(skip)]
    pub file: PathBuf,
    /// `[assets]`: where kernel and image are.
    pub assets: AssetsConfig,
    /// `[vm]`: how VMs are made.
    pub vm: VmConfig,
    /// `[network]`: how containers without a network namespace get a network.
    pub network: NetworkConfig,
    /// `[template]`: how templates are used.
    pub template: TemplateConfig,
    /// `[pool]`: how clones are made ahead of time.
    pub pool: PoolConfig,
    /// `[checkpoint]`: how checkpoints are taken.
    pub checkpoint: CheckpointConfig,
    /// `[restore]`: how containers are restored from checkpoints.
    pub restore: RestoreConfig,
    /// `[rootdisk]`: how root file systems become disks.
    pub rootdisk: RootdiskConfig,
    /// What `machinen boot` keeps.
    pub boot: BootConfig,
    /// `[annotations]`: what containers may override.
    pub annotations: AnnotationsConfig,
    /// `[task]`: what the shim answers.
    pub task: TaskConfig,
    /// `[log]`: what is logged.
    pub log: LogConfig,
    /// `[traces]`: where traces of operations are sent.
    pub traces: TracesConfig,
}

/// Where traces of operations are sent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TracesConfig {
    /// A receiver of OTLP by HTTP and JSON. If empty, OpenTelemetry's environment variables say it, or there are no traces.
    pub endpoint: String,
}

/// Where kernel and image are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AssetsConfig {
    /// The directory with `vmlinux` and `guest.img`. If empty, the usual directories are searched.
    pub dir: PathBuf,
}

/// How containers get a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// pasta, a path or a name that is looked up in PATH.
    pub pasta: PathBuf,
    /// What a container gets that asks for the host's own network.
    pub host: HostNetwork,
    /// Whether pasta connects the container with the outside, by an annotation.
    #[serde(skip)]
    pub outside: bool,
    /// Whether packets pass the network code of the container's namespace, by an annotation.
    #[serde(skip)]
    pub routed: bool,
    /// The published ports, by an annotation.
    #[serde(skip)]
    pub ports: Vec<PublishedPort>,
}

/// What a container gets that asks for the host's own network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostNetwork {
    /// An error.
    #[default]
    Refuse,
    /// A loopback interface only.
    Loopback,
    /// Connections to the outside by pasta.
    Pasta,
}

/// How templates are used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TemplateConfig {
    /// Whether templates are used and built.
    pub mode: TemplateMode,
    /// The directory of the templates.
    pub dir: PathBuf,
    /// Most memory that all templates may take, MiB.
    pub budget_mib: u64,
    /// Whether each of containerd's namespaces has templates of its own, so that its VMs share no memory with those of
    /// others.
    pub per_namespace: bool,
    /// Whether clones are twins of their template's QEMU, where that can be.
    pub twins: bool,
}

/// Whether templates are used and built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TemplateMode {
    /// Existing templates are used, and missing ones are built in the background.
    Auto,
    /// Existing templates are used; none is built.
    Use,
    /// No template is used, and none is built.
    Off,
}

/// The warm pool: clones that wait for the next starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolConfig {
    /// Number of clones that are kept ready; 0 disables the pool.
    pub size: u32,
    /// Clones are kept ready only while this part of the host's memory stays available to others, percent.
    pub memory_reserve_percent: u64,
    /// The directory of the pool's slots and sockets.
    pub dir: PathBuf,
    /// How long containerd may be absent before the clones end, seconds. Clones for the OCI command line, which has
    /// no containerd, wait for a start as long.
    pub containerd_timeout_s: u64,
}

/// How checkpoints are taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Whether memory is copied before the container is frozen.
    pub pre_dump: bool,
    /// Whether a checkpoint is verified before its request succeeds.
    pub verify: VerifyMode,
}

/// Whether a checkpoint is verified before its request succeeds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerifyMode {
    /// Checkpoints are not verified.
    #[default]
    Off,
    /// The checkpoint is restored in a VM of its own.
    Restore,
}

/// How containers are restored from checkpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RestoreConfig {
    /// Whether a container runs before its memory is there, and fetches the memory.
    pub lazy: bool,
    /// What happens to established TCP connections.
    pub tcp: TcpMode,
    /// The digest that the checkpoint must have, by an annotation: `sha256:` and hexadecimal digits.
    #[serde(skip)]
    pub digest: Option<String>,
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

/// How root file systems become disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RootdiskConfig {
    /// The directory of the cache of base disks.
    pub dir: PathBuf,
    /// Smallest size of a base disk, MiB.
    pub min_size_mib: u64,
    /// Size of a container's writable disk, MiB.
    pub writable_size_mib: u64,
    /// The share of a file system of the host that disks and exports leave free, percent.
    pub disk_reserve_percent: u64,
    /// Most files that a container's changes may have when they are exported to its snapshot.
    pub layer_max_entries: u64,
    /// Longest time in which a container's changes may arrive from its VM, seconds.
    pub export_timeout_s: u64,
    /// mke2fs, a path or a name that is looked up in PATH.
    pub mke2fs: PathBuf,
    /// The directories of the host that the container gets copies of, by an annotation.
    #[serde(skip)]
    pub copies: Vec<CopyMount>,
    /// How much a container may write to each of its copies, MiB.
    pub copy_size_mib: u64,
    /// Whether annotations of Kubernetes pods may name directories of the host.
    pub copies_in_pods: bool,
}

/// What `machinen boot` keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BootConfig {
    /// The directory of unpacked images, and of the bundles of containers.
    pub dir: PathBuf,
}

/// What containers may override.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AnnotationsConfig {
    /// The annotations that are accepted, without their prefix.
    pub allow: Vec<String>,
    /// The largest `memory-ceiling`, MiB, unless `vm.memory_mib` is larger.
    pub max_memory_mib: u32,
    /// The most `vcpus`, unless `vm.vcpus` is more.
    pub max_vcpus: u32,
    /// The largest `rootdisk-size`, MiB, unless `rootdisk.writable_size_mib` is larger.
    pub max_rootdisk_size_mib: u64,
    /// Whether templates are built of VMs that annotations have shaped.
    pub templates: bool,
}

/// What the shim answers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TaskConfig {
    /// The message that carries a container's metrics.
    pub metrics: MetricsFormat,
}

/// The message that carries a container's metrics to containerd.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MetricsFormat {
    /// The one that matches the host's cgroups.
    #[default]
    Auto,
    /// The message of cgroup v1.
    Cgroup1,
    /// The message of cgroup v2.
    Cgroup2,
}

/// What is logged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// error, warn, info, debug or trace.
    pub level: String,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            pasta: "pasta".into(),
            host: HostNetwork::Refuse,
            outside: false,
            routed: false,
            ports: Vec::new(),
        }
    }
}

impl Default for TemplateConfig {
    fn default() -> Self {
        Self {
            mode: TemplateMode::Auto,
            dir: format!("{RUN_DIR}/template").into(),
            budget_mib: 1024,
            per_namespace: false,
            twins: true,
        }
    }
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            size: 1,
            memory_reserve_percent: 25,
            dir: format!("{RUN_DIR}/pool").into(),
            containerd_timeout_s: 600,
        }
    }
}

impl RootdiskConfig {
    /// How containers' writable disks are made.
    pub(crate) fn container_disks(&self) -> ContainerDiskOptions {
        let Self { dir, writable_size_mib, mke2fs, .. } = self.clone();
        ContainerDiskOptions { cache: dir, size: writable_size_mib << 20, mke2fs, reserve: self.reserve() }
    }

    /// How the disks are made to which containers write what they change in copies of the host's directories.
    pub(crate) fn copy_disks(&self) -> ContainerDiskOptions {
        ContainerDiskOptions { size: self.copy_size_mib << 20, ..self.container_disks() }
    }

    /// How base disks are made.
    pub fn base_disks(&self) -> BuildOptions {
        let Self { min_size_mib, mke2fs, .. } = self.clone();
        BuildOptions { min_size: min_size_mib << 20, mke2fs, reserve: self.reserve() }
    }

    /// What disks and exports leave free.
    pub(crate) fn reserve(&self) -> DiskReserve {
        DiskReserve::percent(self.disk_reserve_percent)
    }
}

impl Default for RootdiskConfig {
    fn default() -> Self {
        Self {
            dir: format!("{DATA_DIR}/rootdisk").into(),
            min_size_mib: 2048,
            writable_size_mib: 16384,
            disk_reserve_percent: 1,
            layer_max_entries: 300_000,
            export_timeout_s: 900,
            mke2fs: "mke2fs".into(),
            copies: Vec::new(),
            copy_size_mib: 4096,
            copies_in_pods: false,
        }
    }
}

impl Default for BootConfig {
    fn default() -> Self {
        Self { dir: format!("{DATA_DIR}/boot").into() }
    }
}

impl Default for AnnotationsConfig {
    fn default() -> Self {
        Self {
            allow: annotations::harmless().map(str::to_owned).collect(),
            max_memory_mib: 2048,
            max_vcpus: 8,
            max_rootdisk_size_mib: 16384,
            templates: false,
        }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".to_owned() }
    }
}

/// The path of the configuration file if no client names one: `MACHINEN_CONFIG`, the user's own, or the default, which
/// may be missing.
fn path() -> PathBuf {
    let own = || owner::config_dir().map(|dir| dir.join("machinen.toml")).filter(|path| path.exists());
    env::var_os(PATH_VARIABLE).map(PathBuf::from).or_else(own).unwrap_or_else(|| DEFAULT_PATH.into())
}

impl Config {
    /// Loads the file that `MACHINEN_CONFIG` names, that of an ordinary user (`~/.config/machinen/machinen.toml`), or
    /// `/etc/machinen/machinen.toml`; the latter may be missing.
    ///
    /// # Errors
    /// The file cannot be read, or has a syntax error, an unknown key or an invalid value.
    pub fn load() -> Result<Self, ConfigError> {
        let file = path();
        let config = match (Self::read(&file), env::var_os(PATH_VARIABLE)) {
            (Err(ConfigError::Read { source, .. }), None) if source.kind() == io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            (result, _) => result,
        }?;
        Ok(config.loaded_from(file))
    }

    /// Loads the file that a client names by an absolute path, or, if it names none, the same as [`Config::load`].
    /// Processes that are to have the same configuration are started with this path in [`PATH_VARIABLE`].
    ///
    /// # Errors
    /// The path is not absolute, or the same as for [`Config::load`]; the file may not be missing.
    pub fn load_named(file: Option<&Path>) -> Result<Self, ConfigError> {
        let Some(file) = file else { return Self::load() };
        if !file.is_absolute() {
            return Err(ConfigError::Relative { path: file.into() });
        }
        Ok(Self::read(file)?.loaded_from(file.into()))
    }

    fn loaded_from(self, file: PathBuf) -> Self {
        let config = Self { file, ..self };
        match owner::user() {
            Some(_) => config.with_directories(owner::run_dir(), owner::data_dir()),
            None => config,
        }
    }

    /// Has these directories instead of the host's root's, where the configuration has those.
    fn with_directories(mut self, run: &Path, data: &Path) -> Self {
        let dirs = [&mut self.template.dir, &mut self.pool.dir, &mut self.rootdisk.dir, &mut self.boot.dir];
        for dir in dirs {
            for (of_root, own) in [(RUN_DIR, run), (DATA_DIR, data)] {
                if let Ok(below) = dir.strip_prefix(of_root) {
                    *dir = own.join(below);
                    break;
                }
            }
        }
        self
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
        if !config.traces.endpoint.is_empty() {
            let endpoint = Endpoint::parse(&config.traces.endpoint);
            endpoint.map_err(|source| ConfigError::Traces { path: path.to_owned(), source })?;
        }
        if config.vm.network_devices > MAX_NICS {
            let given = config.vm.network_devices;
            return Err(ConfigError::NetworkDevices { path: path.into(), given });
        }
        if (config.vm.accel == AccelMode::Pvm) == config.vm.pvm_kernel.as_os_str().is_empty() {
            return Err(ConfigError::PvmKernel { path: path.into() });
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests;
