//! Decodes the configuration of a pod, as containerd's CRI plugin passes it to CreateSandbox.

use std::path::Path;

use containerd_shim_protos::{sandbox_api::CreateSandboxRequest, ttrpc};
use machinen::pod::{DnsConfig, IdMapping, SandboxRequest};
use protobuf::{EnumOrUnknown, Message};

use self::api::pod_sandbox::{IDMapping, NamespaceMode, NamespaceOption, PodSandboxConfig};
use crate::{
    error::{invalid, unimplemented},
    options,
};

/// Generated messages of `proto/pod_sandbox.proto`.
#[allow(
    clippy::all,
    clippy::allow_attributes,
    clippy::semicolon_if_nothing_returned,
    clippy::unwrap_used,
    missing_debug_implementations,
    missing_docs,
    rust_2018_idioms,
    unreachable_pub,
    unused_qualifications,
    reason = "generated code"
)]
mod api {
    include!(concat!(env!("OUT_DIR"), "/pod_sandbox/api.rs"));
}

/// The name of the configuration in containerd's registry of types.
const CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";

/// # Errors
/// The request has a root file system, which the sandbox of a VM has itself, or another kind of configuration. Without a
/// configuration all defaults apply. containerd's CRI plugin passes the options of the runtime to `start` only; those
/// of another client must name the file that the pod's configuration was loaded from, `file`.
pub(crate) fn decode(request: &CreateSandboxRequest, file: &Path) -> ttrpc::Result<SandboxRequest> {
    if !request.rootfs.is_empty() {
        return unimplemented("a root file system of the sandbox");
    }
    let config = match request.options.as_ref() {
        Some(options) if options::is_options(options) => {
            options::of_request(Some(options), file)?;
            PodSandboxConfig::new()
        }
        Some(options) if !options.type_url.is_empty() => {
            if !options.type_url.ends_with(CONFIG_TYPE) {
                return invalid(format!(
                    "a sandbox is configured by {CONFIG_TYPE}, not by {:?}",
                    options.type_url
                ));
            }
            match PodSandboxConfig::parse_from_bytes(&options.value) {
                Ok(config) => config,
                Err(error) => {
                    return invalid(format!("the {CONFIG_TYPE} of the sandbox cannot be decoded: {error}"));
                }
            }
        }
        Some(_) | None => PodSandboxConfig::new(),
    };
    Ok(sandbox_request(request, config))
}

fn sandbox_request(request: &CreateSandboxRequest, mut config: PodSandboxConfig) -> SandboxRequest {
    let dns = config.dns_config.take().unwrap_or_default();
    let linux = config.linux.take().unwrap_or_default();
    let options = linux.security_context.namespace_options.clone().unwrap_or_default();
    let resources = linux.resources.unwrap_or_default();
    let users = match options.userns_options.as_ref() {
        Some(users) if is(users.mode, NamespaceMode::POD) => Some(users),
        Some(_) | None => None,
    };
    let mappings = |ids: &[IDMapping]| ids.iter().map(id_mapping).collect();
    SandboxRequest {
        netns: request.netns_path.clone().into(),
        hostname: config.hostname,
        dns: DnsConfig { servers: dns.servers, searches: dns.searches, options: dns.options },
        cgroup_parent: linux.cgroup_parent,
        sysctls: linux.sysctls.into_iter().collect(),
        annotations: config.annotations.into_iter().chain(request.annotations.clone()).collect(),
        namespaces: namespaces(&options, users.is_some()),
        uid_mappings: users.map(|users| mappings(&users.uids)).unwrap_or_default(),
        gid_mappings: users.map(|users| mappings(&users.gids)).unwrap_or_default(),
        memory_bytes: resources.memory_limit_in_bytes,
        cpu_quota: resources.cpu_quota,
        cpu_period: resources.cpu_period,
    }
}

fn is(mode: EnumOrUnknown<NamespaceMode>, wanted: NamespaceMode) -> bool {
    mode.enum_value() == Ok(wanted)
}

fn id_mapping(ids: &IDMapping) -> IdMapping {
    IdMapping { host: ids.host_id, container: ids.container_id, size: ids.length }
}

/// The namespaces that the sandbox has of its own. A kind that is the node's is missing, which is refused where the
/// sandbox is started.
fn namespaces(options: &NamespaceOption, users: bool) -> Vec<&'static str> {
    let kinds = [
        ("mount", true),
        ("uts", true),
        ("network", !is(options.network, NamespaceMode::NODE)),
        ("ipc", !is(options.ipc, NamespaceMode::NODE)),
        ("pid", !is(options.pid, NamespaceMode::NODE)),
        ("user", users),
    ];
    kinds.into_iter().filter_map(|(kind, has)| has.then_some(kind)).collect()
}

#[cfg(test)]
mod tests {
    use protobuf::{MessageField, well_known_types::any::Any};

    use super::{
        api::pod_sandbox::{LinuxContainerResources, LinuxPodSandboxConfig, LinuxSandboxSecurityContext},
        *,
    };

    /// The file of the pod's configuration.
    const FILE: &str = "/m";

    fn request(type_url: &str, value: Vec<u8>) -> CreateSandboxRequest {
        CreateSandboxRequest {
            sandbox_id: "s".into(),
            netns_path: "/run/netns/n".into(),
            options: MessageField::some(Any { type_url: type_url.to_owned(), value, ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn a_pod_has_what_its_configuration_says() {
        let options = NamespaceOption { network: NamespaceMode::NODE.into(), ..Default::default() };
        let security = LinuxSandboxSecurityContext {
            namespace_options: MessageField::some(options),
            ..Default::default()
        };
        let resources = LinuxContainerResources { memory_limit_in_bytes: 5, ..Default::default() };
        let config = PodSandboxConfig {
            hostname: "web-0".into(),
            linux: MessageField::some(LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/p".into(),
                security_context: MessageField::some(security),
                resources: MessageField::some(resources),
                ..Default::default()
            }),
            ..Default::default()
        };
        let decoded = decode(&request(CONFIG_TYPE, config.write_to_bytes().unwrap()), FILE.as_ref()).unwrap();
        assert_eq!((decoded.hostname.as_str(), decoded.cgroup_parent.as_str()), ("web-0", "/kubepods/p"));
        assert_eq!((decoded.memory_bytes, decoded.namespaces), (5, vec!["mount", "uts", "ipc", "pid"]));
    }

    #[test]
    fn what_is_no_configuration_is_refused() {
        let decode = |request: &_| decode(request, FILE.as_ref());
        assert!(decode(&request("runtime.v1.Other", Vec::new())).is_err());
        assert!(decode(&request(CONFIG_TYPE, vec![0xff])).is_err());
        // The file /x, in the field 2.
        assert!(decode(&request("runtimeoptions.v1.Options", b"\x12\x02/x".to_vec())).is_err());
        assert!(decode(&request("runtimeoptions.v1.Options", b"\x12\x02/m".to_vec())).is_ok());
        let defaults = decode(&CreateSandboxRequest::new()).unwrap();
        assert_eq!(defaults.namespaces, ["mount", "uts", "network", "ipc", "pid"]);
    }
}
