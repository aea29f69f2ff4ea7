//! The configuration of a container from that of its image and from options.

use std::path::{Path, PathBuf};

use machinen::{
    annotations::PREFIX,
    config::{
        copies::parse_copies,
        ports::{PORTS, PublishedPort, parse_ports},
    },
    pod::ContainerId,
    spec::OCI_VERSION,
};
use oci_spec::image::Config;
use serde_json::{Value, json};

use super::{
    BootArgs, BootError,
    user::{self, ProcessUser},
};
use crate::{
    image::ReadyImage,
    oci::{OciError, update},
};

/// The capabilities that docker gives.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];
/// The search path of a container whose image has none.
pub(crate) const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The period of a quota of processor time, microseconds.
const PERIOD: u64 = 100_000;
/// Most processors that can be asked for.
const MAX_CPUS: f64 = 1024.0;
/// What is hidden, and what is read-only, as with docker.
const MASKED: [&str; 8] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Options that are understood, before an image is unpacked.
#[derive(Debug, Default)]
pub(crate) struct SpecOptions {
    command: Vec<String>,
    entrypoint: Option<String>,
    env: Vec<String>,
    workdir: Option<String>,
    user: Option<String>,
    hostname: String,
    memory: Option<Value>,
    cpu_quota: Option<u64>,
    volumes: Vec<Value>,
    /// As the annotation has them.
    copies: Option<String>,
    netns: Option<PathBuf>,
    outside: bool,
    /// As the annotation has them.
    ports: Option<String>,
    read_only: bool,
    tty: bool,
    size: Option<(u16, u16)>,
    /// Most bytes that the container can write, MiB.
    scratch_mib: Option<u64>,
}

impl SpecOptions {
    /// # Errors
    /// An option is not understood, or names a file that does not exist.
    pub(super) fn check(args: &BootArgs, id: &ContainerId) -> Result<Self, BootError> {
        let odd = |option, text: &str, takes| BootError::Option { option, text: text.to_owned(), takes };
        if let Some(dir) = args.workdir.as_deref().filter(|dir| !dir.starts_with('/')) {
            return Err(odd("--workdir", dir, "an absolute path"));
        }
        let cpu_quota = args.cpus.map(|cpus| match (0.01..=MAX_CPUS).contains(&cpus) {
            true => Ok((cpus * PERIOD as f64) as u64),
            false => Err(odd("--cpus", &cpus.to_string(), "a number from 0.01 to 1024")),
        });
        Ok(Self {
            command: args.command.clone(),
            entrypoint: args.entrypoint.clone(),
            env: args.env.iter().map(|text| variable(text)).collect::<Result<Vec<_>, _>>()?,
            workdir: args.workdir.clone(),
            user: args.user.clone(),
            hostname: args.hostname.clone().unwrap_or_else(|| id.as_str().chars().take(63).collect()),
            memory: update::bytes("--memory", args.memory.as_deref())?,
            cpu_quota: cpu_quota.transpose()?,
            volumes: args.volume.iter().map(|text| volume(text)).collect::<Result<Vec<_>, _>>()?,
            copies: copies(&args.copy_mount)?,
            netns: args.netns.clone(),
            outside: args.network.is_some(),
            ports: published(&args.publish)?,
            read_only: args.read_only,
            tty: args.tty,
            size: args.terminal_size(),
            scratch_mib: None,
        })
    }

    /// For a container that is only there for the processes that are added to it, as that of a build. Its `init` never
    /// runs.
    ///
    /// # Errors
    /// The memory is not understood.
    pub(crate) fn of_builder(
        id: &ContainerId,
        init: &str,
        memory: Option<&str>,
        scratch_mib: Option<u64>,
        outside: bool,
    ) -> Result<Self, BootError> {
        Ok(Self {
            entrypoint: Some(init.to_owned()),
            user: Some("0:0".to_owned()),
            workdir: Some("/".to_owned()),
            hostname: id.as_str().chars().take(63).collect(),
            memory: update::bytes("--memory", memory)?,
            scratch_mib,
            outside,
            ..Self::default()
        })
    }
}

/// `NAME=VALUE`, or `NAME` for the value that the caller has.
fn variable(text: &str) -> Result<String, BootError> {
    let takes = "NAME=VALUE, or NAME of a variable that is set";
    let odd = || BootError::Option { option: "--env", text: text.to_owned(), takes };
    match text.split_once('=') {
        Some(("", _)) => Err(odd()),
        Some(_) => Ok(text.to_owned()),
        None => std::env::var(text).map(|value| format!("{text}={value}")).map_err(|_| odd()),
    }
}

/// The ports as the annotation has them, if there are any.
fn published(options: &[String]) -> Result<Option<String>, BootError> {
    for text in options {
        let odd = |_| BootError::Option { option: "--publish", text: text.clone(), takes: PORTS };
        text.parse::<PublishedPort>().map_err(odd)?;
    }
    let all = options.join(",");
    let takes = "each port of the host once, and at most 128 ports";
    let odd = |_| BootError::Option { option: "--publish", text: all.clone(), takes };
    match options {
        [] => Ok(None),
        _ => parse_ports(&all).map(|_| Some(all.clone())).map_err(odd),
    }
}

/// The copy mounts as the annotation has them, if there are any. A relative source is relative to the working directory.
fn copies(options: &[String]) -> Result<Option<String>, BootError> {
    let absolute = |text: &String| match text.rsplit_once(':') {
        // One that does not exist is reported where it is copied.
        Some((source, destination)) => Path::new(source)
            .canonicalize()
            .or_else(|_| std::path::absolute(source))
            .map_or_else(|_| text.clone(), |source| format!("{}:{destination}", source.display())),
        None => text.clone(),
    };
    let all = options.iter().map(absolute).collect::<Vec<_>>().join(",");
    match options {
        [] => Ok(None),
        _ => match parse_copies(&all) {
            Ok(_) => Ok(Some(all)),
            Err(source) => Err(BootError::Copies(source)),
        },
    }
}

/// `SOURCE:DESTINATION[:ro]`.
fn volume(text: &str) -> Result<Value, BootError> {
    let takes =
        "SOURCE:DESTINATION or SOURCE:DESTINATION:ro, where SOURCE exists and DESTINATION is absolute";
    let odd = || BootError::Option { option: "--volume", text: text.to_owned(), takes };
    let (rest, access) = match text.rsplit_once(':') {
        Some((rest, access @ ("ro" | "rw"))) => (rest, access),
        _ => (text, "rw"),
    };
    let (source, destination) = rest.rsplit_once(':').ok_or_else(odd)?;
    let source = Path::new(source).canonicalize().map_err(|_| odd())?;
    if !destination.starts_with('/') {
        return Err(odd());
    }
    Ok(json!({
        "destination": destination, "type": "bind", "source": source, "options": ["rbind", "rprivate", access],
    }))
}

/// A process that is added to the container of a build, with the configuration that its image has so far.
pub(crate) fn added_process(config: &Config, user: &ProcessUser, args: &[String], hostname: &str) -> Value {
    process(config, user, args, &SpecOptions { hostname: hostname.to_owned(), ..Default::default() })
}

fn process(config: &Config, user: &ProcessUser, args: &[String], options: &SpecOptions) -> Value {
    let env = environment(config.env().as_deref().unwrap_or_default(), options, user.home.as_deref());
    let cwd = options.workdir.as_ref().or(config.working_dir().as_ref()).filter(|dir| !dir.is_empty());
    json!({
        "terminal": options.tty,
        "args": args,
        "env": env,
        "cwd": cwd.map_or("/", String::as_str),
        "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.further_gids },
        "capabilities": capabilities(user.uid),
        "noNewPrivileges": false,
    })
}

/// The text of `config.json`.
///
/// # Errors
/// There is no command, or the image has no such user.
pub(crate) fn spec(
    id: &ContainerId,
    image: &ReadyImage,
    options: &SpecOptions,
) -> Result<Vec<u8>, BootError> {
    let config = &image.config;
    let named = options.user.as_ref().or(config.user().as_ref()).map_or("", String::as_str);
    let user = user::find(image.root.path(), named)?;
    let mut spec = json!({
        "ociVersion": OCI_VERSION,
        "process": process(config, &user, &command(image, options)?, options),
        "root": { "path": "rootfs", "readonly": options.read_only },
        "hostname": options.hostname,
        "mounts": mounts(options),
        "annotations": { crate::find::IMAGE: image.name },
        "linux": {
            "cgroupsPath": format!("/machinen-boot/{id}"),
            "namespaces": namespaces(options),
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "resources": {},
        },
    });
    if let Some((width, height)) = options.size {
        spec["process"]["consoleSize"] = json!({ "width": width, "height": height });
    }
    if options.outside {
        spec["annotations"][format!("{PREFIX}network")] = "pasta".into();
    }
    if let Some(ports) = &options.ports {
        spec["annotations"][format!("{PREFIX}ports")] = ports.as_str().into();
    }
    if let Some(copies) = &options.copies {
        spec["annotations"][format!("{PREFIX}copy-mount")] = copies.as_str().into();
    }
    if let Some(mib) = options.scratch_mib {
        spec["annotations"][format!("{PREFIX}rootdisk-size")] = mib.to_string().into();
    }
    if let Some(memory) = &options.memory {
        spec["linux"]["resources"]["memory"] = json!({ "limit": memory });
    }
    if let Some(quota) = options.cpu_quota {
        spec["linux"]["resources"]["cpu"] = json!({ "quota": quota, "period": PERIOD });
    }
    Ok(serde_json::to_vec_pretty(&spec).map_err(OciError::Encode)?)
}

/// Entry point and command (image-spec, config.md): a command replaces that of the image, an entry point both.
fn command(image: &ReadyImage, options: &SpecOptions) -> Result<Vec<String>, BootError> {
    let list = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    let (mut args, default) = match &options.entrypoint {
        Some(program) => (vec![program.clone()], Vec::new()),
        None => (list(image.config.entrypoint()), list(image.config.cmd())),
    };
    args.extend(if options.command.is_empty() { default } else { options.command.clone() });
    if args.is_empty() { Err(BootError::NoCommand) } else { Ok(args) }
}

/// The image's variables, replaced by the options' ones of the same name.
fn environment(image: &[String], options: &SpecOptions, home: Option<&str>) -> Vec<String> {
    let mut env: Vec<String> = vec![PATH.to_owned(), format!("HOSTNAME={}", options.hostname)];
    env.extend(options.tty.then(|| "TERM=xterm".to_owned()));
    env.push(format!("HOME={}", home.unwrap_or("/")));
    for variable in image.iter().chain(&options.env) {
        let name = variable.split_once('=').map_or(variable.as_str(), |(name, _)| name);
        env.retain(|known| known.split_once('=').is_none_or(|(known, _)| known != name));
        env.push(variable.clone());
    }
    env
}

/// Those of docker, without inheritable and ambient ones; another user than root has none in effect.
fn capabilities(uid: u32) -> Value {
    let effective: &[&str] = if uid == 0 { &CAPABILITIES } else { &[] };
    json!({ "bounding": CAPABILITIES, "effective": effective, "permitted": effective })
}

fn namespaces(options: &SpecOptions) -> Vec<Value> {
    let mut all: Vec<Value> =
        ["pid", "ipc", "uts", "mount", "cgroup"].iter().map(|kind| json!({ "type": kind })).collect();
    all.push(match &options.netns {
        Some(path) => json!({ "type": "network", "path": path }),
        None => json!({ "type": "network" }),
    });
    all
}

fn mounts(options: &SpecOptions) -> Vec<Value> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": source, "options": options });
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
    ];
    mounts.extend(options.volumes.iter().cloned());
    mounts
}

#[cfg(test)]
mod tests {
    use oci_spec::image::ConfigBuilder;

    use super::*;
    use crate::image::ImageRoot;

    fn image(config: Config) -> (tempfile::TempDir, ReadyImage) {
        let dir = tempfile::tempdir().unwrap();
        let root = ImageRoot::Dir(dir.path().to_owned());
        (dir, ReadyImage { root, config, name: "x".to_owned() })
    }

    fn parsed(image: &ReadyImage, options: &SpecOptions) -> Result<Value, BootError> {
        let id = ContainerId::parse("c1").unwrap();
        spec(&id, image, options).map(|text| serde_json::from_slice(&text).unwrap())
    }

    #[test]
    fn options_come_before_the_image_and_the_image_before_defaults() {
        let config = ConfigBuilder::default()
            .entrypoint(vec!["/entry".to_owned()])
            .cmd(vec!["a".to_owned()])
            .env(vec!["A=1".to_owned(), "PATH=/x".to_owned()])
            .working_dir("/work".to_owned())
            .user("7:8".to_owned())
            .build()
            .unwrap();
        let (_dir, image) = image(config);
        let spec = parsed(&image, &SpecOptions::default()).unwrap();
        assert_eq!(spec["process"]["args"], json!(["/entry", "a"]));
        assert_eq!(spec["process"]["cwd"], "/work");
        assert_eq!(
            (spec["process"]["user"]["uid"].as_u64(), spec["process"]["user"]["gid"].as_u64()),
            (Some(7), Some(8))
        );
        let env = spec["process"]["env"].as_array().unwrap();
        assert!(env.contains(&json!("PATH=/x")) && !env.contains(&json!(PATH)));
        let options = SpecOptions {
            command: vec!["b".to_owned()],
            env: vec!["A=2".to_owned()],
            workdir: Some("/other".to_owned()),
            user: Some("0".to_owned()),
            ..Default::default()
        };
        let spec = parsed(&image, &options).unwrap();
        assert_eq!(spec["process"]["args"], json!(["/entry", "b"]));
        assert_eq!(
            (spec["process"]["cwd"].as_str(), spec["process"]["user"]["uid"].as_u64()),
            (Some("/other"), Some(0))
        );
        let env = spec["process"]["env"].as_array().unwrap();
        assert!(env.contains(&json!("A=2")) && !env.contains(&json!("A=1")));
        let options = SpecOptions { entrypoint: Some("/new".to_owned()), ..Default::default() };
        assert_eq!(parsed(&image, &options).unwrap()["process"]["args"], json!(["/new"]));
    }

    #[test]
    fn an_image_without_a_command_needs_one() {
        let (_dir, image) = image(Config::default());
        assert!(matches!(parsed(&image, &SpecOptions::default()), Err(BootError::NoCommand)));
        let options = SpecOptions { command: vec!["sh".to_owned()], ..Default::default() };
        let spec = parsed(&image, &options).unwrap();
        let typed: oci_spec::runtime::Spec = serde_json::from_value(spec).unwrap();
        assert_eq!(typed.process().as_ref().unwrap().cwd(), Path::new("/"));
    }

    #[test]
    fn odd_options_are_named() {
        for text in ["/a", "/no/such/dir:/b", "/tmp:b", ":/x"] {
            let error = volume(text).unwrap_err().to_string();
            assert!(error.contains("--volume") && error.contains(text), "{error}");
        }
        assert_eq!(volume("/tmp:/b:ro").unwrap()["options"][2], "ro");
        assert!(variable("=x").is_err() && variable("MACHINEN_NO_SUCH").is_err());
        assert_eq!(variable("A=b=c").unwrap(), "A=b=c");
    }
}
