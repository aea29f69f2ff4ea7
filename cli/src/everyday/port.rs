//! `machinen port`: which ports of the host lead to a container.
//!
//! Those that machinen forwards are in the annotation `io.machinen.ports` of the container's configuration, and those that
//! nerdctl has published in one of nerdctl's. Other managers keep theirs to themselves.

use std::collections::HashMap;

use clap::Args;
use machinen::{
    annotations::PREFIX,
    config::ports::{Protocol, PublishedPort, parse_ports},
    spec::bundle,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{error::EverydayError, ls::ListFormat};
use crate::{
    find::{self, ContainerOwner, FoundContainer},
    oci::{GlobalArgs, OciError},
};

/// The annotation in which nerdctl has the ports that it has published.
const NERDCTL: &str = "nerdctl/ports";
/// The annotation of containers that Kubernetes has made by containerd.
const CRI: &str = "io.kubernetes.cri.container-type";

/// Arguments of `machinen port`.
#[derive(Debug, Args)]
pub(crate) struct PortArgs {
    /// How the ports are printed
    #[arg(long, short, value_enum, default_value_t = ListFormat::Table)]
    format: ListFormat,
    /// Id or name of the container, or the beginning of its id
    #[arg(value_name = "CONTAINER")]
    container: String,
    /// A port of the container; without it all are printed
    #[arg(value_name = "PORT[/udp]")]
    port: Option<String>,
}

/// An element of nerdctl's list.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NerdctlPort {
    host_port: u16,
    container_port: u16,
    protocol: String,
    #[serde(rename = "HostIP")]
    host_ip: String,
}

/// # Errors
/// The container does not exist, its ports are not known, or it does not publish the port.
pub(super) async fn run(global: &GlobalArgs, args: &PortArgs) -> Result<(), EverydayError> {
    let wanted = args.port.as_deref().map(wanted).transpose()?;
    let container = find::one(global, &args.container).await?;
    let spec = bundle::load(&container.bundle).map_err(OciError::from)?;
    let mut ports = published(&container, spec.annotations().as_ref().unwrap_or(&HashMap::new()))?;
    if let Some(wanted) = wanted {
        ports.retain(|port| (port.container, port.protocol) == wanted);
        if ports.is_empty() {
            let port = args.port.clone().unwrap_or_default();
            return Err(EverydayError::NotPublished { id: container.id, port });
        }
    }
    match args.format {
        ListFormat::Json => println!("{:#}", ports.iter().map(value).collect::<Value>()),
        ListFormat::Table => ports.iter().for_each(|port| println!("{}", line(port, wanted.is_some()))),
    }
    Ok(())
}

fn published(
    container: &FoundContainer,
    annotations: &HashMap<String, String>,
) -> Result<Vec<PublishedPort>, EverydayError> {
    let id = || container.id.clone();
    if let Some(text) = annotations.get(&format!("{PREFIX}ports")) {
        let name = "io.machinen.ports";
        return parse_ports(text).map_err(|_| EverydayError::PortAnnotation { id: id(), name });
    }
    if let Some(text) = annotations.get(NERDCTL) {
        let odd = || EverydayError::PortAnnotation { id: id(), name: NERDCTL };
        let listed: Vec<NerdctlPort> = serde_json::from_str(text).map_err(|_| odd())?;
        return listed.iter().map(|port| port.read().ok_or_else(odd)).collect();
    }
    let foreign = |hint| Err(EverydayError::ForeignPorts { id: id(), hint });
    match container.owner {
        ContainerOwner::Podman => foreign("podman port"),
        ContainerOwner::Docker => foreign("docker port"),
        ContainerOwner::Crio => foreign("the pod's ports in Kubernetes"),
        ContainerOwner::Containerd if annotations.contains_key(CRI) => {
            foreign("the pod's ports in Kubernetes")
        }
        ContainerOwner::Containerd | ContainerOwner::Machinen => Ok(Vec::new()),
    }
}

impl NerdctlPort {
    fn read(&self) -> Option<PublishedPort> {
        let protocol = match self.protocol.as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return None,
        };
        let address = if self.host_ip.is_empty() { "0.0.0.0" } else { &self.host_ip };
        let (host, container) = (self.host_port, self.container_port);
        Some(PublishedPort { protocol, address: address.parse().ok()?, host, container })
    }
}

fn wanted(text: &str) -> Result<(u16, Protocol), EverydayError> {
    let odd = || EverydayError::Port { port: text.to_owned() };
    let (number, protocol) = match text.split_once('/') {
        None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Protocol::Tcp),
        Some((number, "udp")) => (number, Protocol::Udp),
        Some(_) => return Err(odd()),
    };
    let number = number.parse().ok().filter(|number| *number > 0).ok_or_else(odd)?;
    Ok((number, protocol))
}

fn name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}

/// A port as docker prints it.
fn line(port: &PublishedPort, host_only: bool) -> String {
    let host = std::net::SocketAddr::new(port.address, port.host);
    match host_only {
        true => host.to_string(),
        false => format!("{}/{} -> {host}", port.container, name(port.protocol)),
    }
}

fn value(port: &PublishedPort) -> Value {
    json!({
        "containerPort": port.container,
        "protocol": name(port.protocol),
        "hostAddress": port.address.to_string(),
        "hostPort": port.host,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::find::example;

    fn ports(owner: ContainerOwner, annotation: Option<(&str, &str)>) -> Result<Vec<String>, EverydayError> {
        let container = FoundContainer { owner, ..example("c1", None, None) };
        let annotations = annotation.map(|(name, text)| (name.to_owned(), text.to_owned()));
        let found = published(&container, &annotations.into_iter().collect())?;
        Ok(found.iter().map(|port| line(port, false)).collect())
    }

    #[test]
    fn ports_are_printed_as_docker_prints_them() {
        let own = ("io.machinen.ports", "8080:80,[::1]:53:53/udp");
        let printed = ports(ContainerOwner::Machinen, Some(own)).unwrap();
        assert_eq!(printed, ["80/tcp -> 127.0.0.1:8080", "53/udp -> [::1]:53"]);
        let list = r#"[{"HostPort":8080,"ContainerPort":80,"Protocol":"tcp","HostIP":"0.0.0.0"}]"#;
        let printed = ports(ContainerOwner::Containerd, Some((NERDCTL, list))).unwrap();
        assert_eq!(printed, ["80/tcp -> 0.0.0.0:8080"]);
        assert_eq!(ports(ContainerOwner::Machinen, None).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn ports_that_are_not_known_are_no_empty_list() {
        for owner in [ContainerOwner::Podman, ContainerOwner::Docker, ContainerOwner::Crio] {
            assert!(matches!(ports(owner, None), Err(EverydayError::ForeignPorts { .. })));
        }
        let cri = ports(ContainerOwner::Containerd, Some((CRI, "container")));
        assert!(matches!(cri, Err(EverydayError::ForeignPorts { .. })));
        for odd in [(NERDCTL, "{"), (NERDCTL, "[{}]"), ("io.machinen.ports", "x")] {
            let odd = ports(ContainerOwner::Containerd, Some(odd));
            assert!(matches!(odd, Err(EverydayError::PortAnnotation { .. })));
        }
    }

    #[test]
    fn a_port_of_the_container_is_chosen() {
        assert_eq!(wanted("80").unwrap(), (80, Protocol::Tcp));
        assert_eq!(wanted("80/tcp").unwrap(), (80, Protocol::Tcp));
        assert_eq!(wanted("53/udp").unwrap(), (53, Protocol::Udp));
        for odd in ["", "0", "80/sctp", "x", "70000"] {
            assert!(matches!(wanted(odd), Err(EverydayError::Port { .. })), "{odd}");
        }
    }
}
