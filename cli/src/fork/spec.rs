//! The configuration of a fork: that of its source, with the fork's own identity.

use clap::ValueEnum;
use machinen::{
    annotations::PREFIX,
    spec::{MAX_HOSTNAME, guest, has_own},
};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde_json::{Map, Value};

use super::{
    error::ForkError,
    network::{self, NetworkChoice},
};

/// What happens to established TCP connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum TcpChoice {
    /// NEW finds them closed
    Close,
    /// NEW has them too
    Keep,
}

/// What happens to a container with volumes that it may write to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum VolumesChoice {
    /// SRC is not forked
    Refuse,
    /// SRC and NEW have the same files, and both may write; locks on files do not hold between the two
    Share,
}

/// The options of a fork.
#[derive(Debug)]
pub(super) struct ForkOptions<'a> {
    pub(super) source: &'a str,
    pub(super) new: &'a str,
    pub(super) hostname: Option<&'a str>,
    pub(super) tcp: TcpChoice,
    pub(super) volumes: VolumesChoice,
    pub(super) lazy: bool,
    pub(super) netns: Option<&'a NetworkChoice>,
    pub(super) publish: Option<&'a str>,
}

/// The configurations of a fork.
#[derive(Debug)]
pub(super) struct ForkSpec {
    /// The configuration that the container keeps.
    pub(super) lasting: Vec<u8>,
    /// The same, with the annotations for this one restore.
    pub(super) restoring: Vec<u8>,
    /// None if the container has the hostname of its VM.
    pub(super) hostname: Option<String>,
}

impl ForkSpec {
    /// # Errors
    /// The source's configuration is not an OCI configuration, the hostname is not possible, or the two containers would
    /// write to the same files of the host.
    pub(super) fn new(source: &[u8], options: &ForkOptions<'_>) -> Result<Self, ForkError> {
        let id = || options.source.to_owned();
        let failed = |source| ForkError::Spec { id: id(), source };
        let typed: Spec = serde_json::from_slice(source).map_err(failed)?;
        if options.volumes == VolumesChoice::Refuse {
            refuse_writable_volumes(&typed, options.source)?;
        }
        let mut spec: Map<String, Value> = serde_json::from_slice(source).map_err(failed)?;
        let hostname = match (has_own(&typed, LinuxNamespaceType::Uts), options.hostname) {
            (true, Some(name)) => Some(checked(name)?),
            (true, None) => Some(options.new.chars().take(MAX_HOSTNAME).collect()),
            (false, None) => None,
            (false, Some(_)) => return Err(ForkError::Hostname { id: id() }),
        };
        network::check(options.source, &typed, options.netns)?;
        if let Some(netns) = options.netns {
            network::set(&mut spec, netns);
        }
        network::publish(options, &mut spec)?;
        if let Some(hostname) = &hostname {
            spec.insert("hostname".to_owned(), hostname.as_str().into());
        }
        if let Some(path) = spec.get_mut("linux").and_then(|linux| linux.get_mut("cgroupsPath"))
            && let Some(above) = path.as_str().and_then(|path| path.strip_suffix(options.source))
        {
            *path = format!("{above}{}", options.new).into();
        }
        // The digest of the checkpoint that the source was restored from. The fork is restored from another one.
        if let Some(annotations) = spec.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove(&format!("{PREFIX}checkpoint-digest"));
        }
        let lasting = serde_json::to_vec(&spec).map_err(failed)?;
        let annotations = spec.entry("annotations").or_insert(Value::Null);
        let tcp = if options.tcp == TcpChoice::Keep { "keep" } else { "close" };
        annotations[format!("{PREFIX}tcp")] = tcp.into();
        if options.lazy {
            annotations[format!("{PREFIX}lazy")] = "true".into();
        }
        let restoring = serde_json::to_vec(&spec).map_err(failed)?;
        Ok(Self { lasting, restoring, hostname })
    }
}

fn refuse_writable_volumes(spec: &Spec, id: &str) -> Result<(), ForkError> {
    let volumes =
        guest::volumes(spec.clone()).map_err(|source| ForkError::Mounts { id: id.to_owned(), source })?;
    let writable = volumes.iter().filter(|volume| !volume.options.read_only);
    let shown: Vec<_> = writable
        .map(|volume| format!("{} from {}", volume.destination.display(), volume.source.display()))
        .collect();
    match shown.is_empty() {
        true => Ok(()),
        false => Err(ForkError::WritableVolumes { id: id.to_owned(), volumes: shown.join(", ") }),
    }
}

fn checked(name: &str) -> Result<String, ForkError> {
    let fits = (1..=MAX_HOSTNAME).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic());
    if fits { Ok(name.to_owned()) } else { Err(ForkError::BadHostname { name: name.to_owned() }) }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    pub(in crate::fork) const OPTIONS: ForkOptions<'_> = ForkOptions {
        source: "one",
        new: "two",
        hostname: None,
        tcp: TcpChoice::Close,
        volumes: VolumesChoice::Refuse,
        lazy: false,
        netns: None,
        publish: None,
    };

    fn source() -> Value {
        json!({
            "ociVersion": "1.0.2", "hostname": "was", "x-unknown": 1,
            "linux": {"namespaces": [{"type": "uts"}], "cgroupsPath": "/default/one"},
        })
    }

    fn of(source: &Value, options: &ForkOptions<'_>) -> Result<(Value, Value), ForkError> {
        let spec = ForkSpec::new(source.to_string().as_bytes(), options)?;
        let parse = |bytes: &[u8]| serde_json::from_slice(bytes).unwrap();
        Ok((parse(&spec.lasting), parse(&spec.restoring)))
    }

    #[test]
    fn a_fork_is_its_source_except_for_its_identity() {
        let mut expected = source();
        expected["hostname"] = "two".into();
        expected["linux"]["cgroupsPath"] = "/default/two".into();
        let (lasting, mut restoring) = of(&source(), &OPTIONS).unwrap();
        assert_eq!(lasting, expected);
        let annotations = restoring.as_object_mut().unwrap().remove("annotations").unwrap();
        assert_eq!(annotations, json!({"io.machinen.tcp": "close"}));
        assert_eq!(restoring, expected);
    }

    #[test]
    fn restore_options_are_temporary_and_hostnames_are_kept() {
        let mut source = source();
        source["annotations"] =
            json!({"io.machinen.tcp": "close", "mine": "x", "io.machinen.checkpoint-digest": "sha256:0"});
        let options = ForkOptions { tcp: TcpChoice::Keep, lazy: true, hostname: Some("web"), ..OPTIONS };
        let (lasting, restoring) = of(&source, &options).unwrap();
        assert_eq!(lasting["annotations"], json!({"io.machinen.tcp": "close", "mine": "x"}));
        assert_eq!(lasting["hostname"], "web");
        assert_eq!(
            restoring["annotations"],
            json!({"io.machinen.tcp": "keep", "io.machinen.lazy": "true", "mine": "x"})
        );
    }

    #[test]
    fn writable_volumes_are_shared_on_request_only() {
        let mut source = source();
        let mount = |destination: &str, options: &[&str]| json!({"destination": destination, "type": "bind", "source": "/srv", "options": options});
        source["mounts"] = json!([mount("/ro", &["rbind", "ro"])]);
        assert!(of(&source, &OPTIONS).is_ok());
        source["mounts"] = json!([mount("/ro", &["ro"]), mount("/rw", &["rbind"]), mount("/w", &["rw"])]);
        let error = of(&source, &OPTIONS).unwrap_err().to_string();
        assert!(
            error.contains("(/rw from /srv, /w from /srv)") && error.contains("--volumes share"),
            "{error}"
        );
        let share = ForkOptions { volumes: VolumesChoice::Share, ..OPTIONS };
        assert_eq!(of(&source, &share).unwrap().0["mounts"], source["mounts"]);
    }

    #[test]
    fn hostnames_fit() {
        let long = "x".repeat(76);
        let (lasting, _) = of(&source(), &ForkOptions { new: &long, ..OPTIONS }).unwrap();
        assert_eq!(lasting["hostname"], long[..64]);
        for name in ["", "a b", &long] {
            let refused = of(&source(), &ForkOptions { hostname: Some(name), ..OPTIONS });
            assert!(matches!(refused, Err(ForkError::BadHostname { .. })), "{name:?}");
        }
        let mut shares = source();
        shares["linux"]["namespaces"] = json!([{"type": "pid"}]);
        assert_eq!(of(&shares, &OPTIONS).unwrap().0["hostname"], "was");
        let refused = of(&shares, &ForkOptions { hostname: Some("x"), ..OPTIONS });
        assert!(matches!(refused, Err(ForkError::Hostname { .. })));
    }
}
