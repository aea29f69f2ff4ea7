//! The options of the runtime: what a client of containerd asks of it beside a container's configuration. They name the
//! configuration file of the pod's shim.
//!
//! ```text
//!   who gives them                                         where they arrive
//!   the handler's section `options` in the CRI plugin      start, -info: an Any on standard input, or, at start and
//!   ctr run --runtime-config-path                            by containerd 2.3 and newer, BootstrapParams with the Any
//!   daemon.json of Docker, `runtimes.NAME.options`         Create: the field `options`
//! ```
//! All of them are `runtimeoptions.v1.Options`. The options of a task replace those of its container, so what restores
//! a container from a checkpoint, which is an option of a task, has to repeat the file ([`restoring`]). They are
//! runc's, as containerd 2 requires of the options of every runtime's tasks. nerdctl sends runc's options for its
//! containers, too.

use std::path::{Path, PathBuf};

use containerd_shim_protos::ttrpc;
use protobuf::{Message, well_known_types::any::Any};

use self::api::runtime_options::{BootstrapParams, Options, RuncOptions, TypedValue};
use crate::error::invalid;

/// Generated messages of `proto/runtime_options.proto`.
#[allow(
    clippy::all,
    clippy::allow_attributes,
    clippy::unwrap_used,
    missing_debug_implementations,
    missing_docs,
    rust_2018_idioms,
    unreachable_pub,
    unused_qualifications,
    reason = "generated code"
)]
mod api {
    include!(concat!(env!("OUT_DIR"), "/runtime_options/api.rs"));
}

/// The names of the messages in containerd's registry of types.
const TYPE: &str = "runtimeoptions.v1.Options";
const RUNC_TYPE: &str = "containerd.runc.v1.Options";

/// How many characters of a body are quoted.
const QUOTED: usize = 200;

/// Why the options of the runtime cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// The options are not the message that they claim to be.
    #[error("the options of the runtime cannot be decoded as {kind}")]
    Decode {
        /// The name of the message.
        kind: &'static str,
        /// The cause.
        source: protobuf::Error,
    },
    /// The options have something else than a configuration file.
    #[error(
        "the options of the runtime are {body:?}, without a ConfigPath; machinen takes the absolute path of its \
         configuration file there, as in ConfigPath = \"/etc/machinen/NAME.toml\", and no other option"
    )]
    NoPath {
        /// The beginning of the options, as containerd has them in its configuration.
        body: String,
    },
}

/// The options of the runtime.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeOptions {
    /// The configuration file, as the client names it.
    pub config: Option<PathBuf>,
    /// The directory of the checkpoint from which the container is restored.
    pub(crate) checkpoint: Option<PathBuf>,
}

impl RuntimeOptions {
    /// Decodes what containerd has written to the standard input of `start` for the container `id` in `namespace`.
    /// Empty input has no options.
    ///
    /// # Errors
    /// The input is no message of containerd's, or has other options than a configuration file.
    pub fn of_start(input: &[u8], id: &str, namespace: &str) -> Result<Self, OptionsError> {
        // containerd's own shims distinguish the two messages in this way.
        match BootstrapParams::parse_from_bytes(input) {
            Ok(params) if params.instance_id == id && params.namespace == namespace => {
                let known = |value: &&TypedValue| [TYPE, RUNC_TYPE].contains(&name(&value.type_url));
                let found = params.extensions.iter().map(|extension| &*extension.value).find(known);
                found.map_or_else(|| Ok(Self::default()), Self::of)
            }
            _ => Self::of_any(input),
        }
    }

    /// Decodes the bytes of an Any, which containerd writes to the standard input of `-info`. Empty input has no
    /// options.
    ///
    /// # Errors
    /// The input is no Any, or has other options than a configuration file.
    pub fn of_any(input: &[u8]) -> Result<Self, OptionsError> {
        let value = TypedValue::parse_from_bytes(input);
        Self::of(&value.map_err(|source| OptionsError::Decode { kind: "google.protobuf.Any", source })?)
    }

    fn of(value: &TypedValue) -> Result<Self, OptionsError> {
        Self::decode(&value.type_url, &value.value)
    }

    /// Options of another type are those of another runtime, which their client sends to all of them.
    fn decode(type_url: &str, value: &[u8]) -> Result<Self, OptionsError> {
        let path = |path: &str| Some(path).filter(|path| !path.is_empty()).map(PathBuf::from);
        match name(type_url) {
            TYPE => {
                let decoded = Options::parse_from_bytes(value);
                let options = decoded.map_err(|source| OptionsError::Decode { kind: TYPE, source })?;
                let body = String::from_utf8_lossy(&options.config_body);
                if options.config_path.is_empty() && !body.trim().is_empty() && !is_implied(&body) {
                    return Err(OptionsError::NoPath { body: body.trim().chars().take(QUOTED).collect() });
                }
                Ok(Self { config: path(&options.config_path), checkpoint: None })
            }
            RUNC_TYPE => {
                let decoded = RuncOptions::parse_from_bytes(value);
                let options = decoded.map_err(|source| OptionsError::Decode { kind: RUNC_TYPE, source })?;
                Ok(Self {
                    config: path(&options.machinen_config),
                    checkpoint: path(&options.criu_image_path),
                })
            }
            _ => Ok(Self::default()),
        }
    }
}

/// Whether options, as TOML, are only runc's `SystemdCgroup`, which many copy to every handler: the form of a container's
/// `cgroupsPath`, which follows from kubelet's driver, already says whether systemd makes the cgroup.
fn is_implied(body: &str) -> bool {
    let Ok(options) = body.parse::<toml::Table>() else { return false };
    options.iter().all(|(key, value)| key == "SystemdCgroup" && value.is_bool())
}

/// The options of a task that is restored from the checkpoint in a directory, as the type and the bytes of an Any. The
/// options of its container, in the same form, name the configuration file, if there is one.
///
/// # Errors
/// The options of the container cannot be decoded.
pub fn restoring(container: Option<(&str, &[u8])>, checkpoint: &str) -> Result<Any, OptionsError> {
    let container = container.map(|(type_url, value)| RuntimeOptions::decode(type_url, value)).transpose()?;
    let config = container.and_then(|options| options.config).unwrap_or_default();
    let options = RuncOptions {
        criu_image_path: checkpoint.to_owned(),
        machinen_config: config.to_string_lossy().into_owned(),
        ..Default::default()
    };
    let value = options.write_to_bytes().expect("the message has no required fields");
    Ok(Any { type_url: RUNC_TYPE.to_owned(), value, ..Default::default() })
}

/// The options in a request to a pod whose configuration was loaded from `config`.
///
/// # Errors
/// The options cannot be used, or name another configuration file.
pub(crate) fn of_request(options: Option<&Any>, config: &Path) -> ttrpc::Result<RuntimeOptions> {
    let Some(Any { type_url, value, .. }) = options else { return Ok(RuntimeOptions::default()) };
    let options = match RuntimeOptions::decode(type_url, value) {
        Ok(options) => options,
        Err(error) => return invalid(machinen::error::chain(&error)),
    };
    match &options.config {
        Some(named) if named != config => invalid(format!(
            "the options of the runtime name the configuration file {}, and this pod has {}: all containers of a pod \
             have the configuration that its first container was started with",
            named.display(),
            config.display()
        )),
        Some(_) | None => Ok(options),
    }
}

/// Whether an Any has options that name a configuration file.
pub(crate) fn is_options(options: &Any) -> bool {
    name(&options.type_url) == TYPE
}

/// The name of a message in the type of an Any.
fn name(type_url: &str) -> &str {
    type_url.rsplit('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;

    use super::{api::runtime_options::Extension, *};

    fn options(path: &str, body: &str) -> Vec<u8> {
        let (config_path, config_body) = (path.to_owned(), body.into());
        Options { config_path, config_body, ..Default::default() }.write_to_bytes().unwrap()
    }

    fn value(type_url: &str, value: Vec<u8>) -> TypedValue {
        TypedValue { type_url: type_url.to_owned(), value, ..Default::default() }
    }

    fn bytes(type_url: &str, options: Vec<u8>) -> Vec<u8> {
        value(type_url, options).write_to_bytes().unwrap()
    }

    fn bootstrap(id: &str, values: impl IntoIterator<Item = TypedValue>) -> Vec<u8> {
        let extension = |value| Extension { value: MessageField::some(value), ..Default::default() };
        let extensions = values.into_iter().map(extension).collect();
        let (instance_id, namespace) = (id.to_owned(), "k8s.io".to_owned());
        BootstrapParams { instance_id, namespace, extensions, ..Default::default() }.write_to_bytes().unwrap()
    }

    fn started(input: &[u8]) -> Option<PathBuf> {
        RuntimeOptions::of_start(input, "c1", "k8s.io").unwrap().config
    }

    #[test]
    fn the_file_is_found_in_every_form_of_start() {
        let file = || options("/etc/machinen/nopool.toml", "");
        let found = Some("/etc/machinen/nopool.toml".into());
        assert_eq!(started(&bytes(TYPE, file())), found);
        assert_eq!(started(&bytes(&format!("type.googleapis.com/{TYPE}"), file())), found);
        let other = || value("containerd.io/other", vec![0xff]);
        assert_eq!(started(&bootstrap("c1", [other(), value(TYPE, file())])), found);
        assert_eq!(started(&bootstrap("c1", [other()])), None);
        assert_eq!(started(&bootstrap("c1", [])), None);
        assert_eq!(started(b""), None);
        // The golden bytes of `ctr run --runtime-config-path /x` of containerd 1.6.
        let golden = b"\x0a\x19runtimeoptions.v1.Options\x12\x04\x12\x02/x";
        assert_eq!(started(golden), Some("/x".into()));
    }

    #[test]
    fn options_of_other_runtimes_name_no_file() {
        let runc = containerd_shim_protos::shim::oci::Options { systemd_cgroup: true, ..Default::default() };
        let runc = runc.write_to_bytes().unwrap();
        assert_eq!(started(&bytes(RUNC_TYPE, runc.clone())), None);
        assert_eq!(started(&bootstrap("c1", [value(RUNC_TYPE, runc)])), None);
        assert_eq!(started(&bytes("io.containerd.runhcs.v1.Options", vec![0xff])), None);
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let error = |input: &[u8]| {
            let error = RuntimeOptions::of_start(input, "c1", "k8s.io").unwrap_err();
            machinen::error::chain(&error)
        };
        let text = error(&bytes(TYPE, options("", "NoPivotRoot = true\n")));
        assert!(text.contains("\"NoPivotRoot = true\", without a ConfigPath"), "{text}");
        assert!(error(&bytes(TYPE, options("", "SystemdCgroup = 1"))).contains("without a ConfigPath"));
        assert_eq!(started(&bytes(TYPE, options("", "SystemdCgroup = true\n"))), None);
        assert!(error(&[0xff]).contains("cannot be decoded as google.protobuf.Any"));
        assert!(error(&bytes(TYPE, vec![0xff])).contains(TYPE));
        // Parameters of another container are none of this one's, and not an Any with options either.
        assert_eq!(started(&bootstrap("c2", [value(TYPE, options("/x", ""))])), None);
        // A body is for those who name no file.
        assert_eq!(started(&bytes(TYPE, options("/x", "a = 1"))), Some("/x".into()));
    }

    #[test]
    fn a_restored_task_keeps_the_file_of_its_container() {
        let file = options("/etc/x.toml", "");
        let runc = RuncOptions { machinen_config: "/etc/x.toml".to_owned(), ..Default::default() };
        let runc = runc.write_to_bytes().unwrap();
        for (container, config) in [
            (Some((TYPE, &file[..])), Some("/etc/x.toml".into())),
            (Some((RUNC_TYPE, &runc)), Some("/etc/x.toml".into())),
            (Some((RUNC_TYPE, &[])), None),
            (Some(("", &[])), None),
            (None, None),
        ] {
            let Any { type_url, value, .. } = restoring(container, "/c").unwrap();
            // What containerd reads of it.
            let read = containerd_shim_protos::shim::oci::Options::parse_from_bytes(&value).unwrap();
            assert_eq!((type_url.as_str(), read.criu_image_path.as_str()), (RUNC_TYPE, "/c"));
            let decoded = RuntimeOptions::decode(&type_url, &value).unwrap();
            assert_eq!(decoded, RuntimeOptions { config, checkpoint: Some("/c".into()) });
        }
    }

    #[test]
    fn a_request_has_the_file_of_its_pod_or_none() {
        let any =
            |path: &str| Any { type_url: TYPE.to_owned(), value: options(path, ""), ..Default::default() };
        let pod = Path::new("/etc/machinen/machinen.toml");
        assert!(of_request(None, pod).is_ok() && of_request(Some(&Any::new()), pod).is_ok());
        assert!(of_request(Some(&any("/etc/machinen/machinen.toml")), pod).is_ok());
        let refused = of_request(Some(&any("/etc/other.toml")), pod).unwrap_err().to_string();
        assert!(refused.contains("/etc/other.toml") && refused.contains("machinen.toml"), "{refused}");
    }
}
