//! The network namespace of a fork. Its source's is of no use to it: two machines cannot have one address.

use std::{convert::Infallible, path::PathBuf, str::FromStr};

use machinen::{annotations::PREFIX, config::ports::parse_ports, network};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde_json::{Map, Value, json};

use super::{error::ForkError, spec::ForkOptions};

/// The network of the new container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NetworkChoice {
    /// A loopback interface only.
    None,
    /// That of the namespace with this path.
    Namespace(PathBuf),
}

impl FromStr for NetworkChoice {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(if text == "none" { Self::None } else { Self::Namespace(text.into()) })
    }
}

/// Checks the choice for a fork of the container `id`, before anything is changed.
///
/// # Errors
/// The source has a network namespace and there is no choice, or the choice is the source's or no namespace.
pub(super) fn check(id: &str, source: &Spec, choice: Option<&NetworkChoice>) -> Result<(), ForkError> {
    let of_source = path(source);
    match (choice, of_source) {
        (None, Some(path)) => Err(ForkError::NeedsNetwork { id: id.to_owned(), path }),
        (None, None) | (Some(NetworkChoice::None), _) => Ok(()),
        (Some(NetworkChoice::Namespace(path)), of_source) => {
            if !path.is_absolute() {
                return Err(ForkError::RelativeNetwork { path: path.clone() });
            }
            let same = network::same_namespace(path, of_source.as_deref());
            let same = same.map_err(|source| ForkError::Network { path: path.clone(), source })?;
            if same { Err(ForkError::SameNetwork { id: id.to_owned(), path: path.clone() }) } else { Ok(()) }
        }
    }
}

fn path(spec: &Spec) -> Option<PathBuf> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    let network = namespaces.iter().find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
    network.and_then(|namespace| namespace.path().clone())
}

/// Sets the network namespace in a configuration.
pub(super) fn set(spec: &mut Map<String, Value>, choice: &NetworkChoice) {
    let namespace = match choice {
        NetworkChoice::None => json!({ "type": "network" }),
        NetworkChoice::Namespace(path) => json!({ "type": "network", "path": path }),
    };
    let linux = spec.entry("linux").or_insert_with(|| json!({}));
    let Some(linux) = linux.as_object_mut() else { return };
    let namespaces = linux.entry("namespaces").or_insert_with(|| json!([]));
    if let Some(namespaces) = namespaces.as_array_mut() {
        namespaces.retain(|namespace| namespace["type"] != "network");
        namespaces.push(namespace);
    }
}

/// Sets the published ports in a configuration.
///
/// # Errors
/// The source has published ports and there is no choice, or the choice is malformed.
pub(super) fn publish(options: &ForkOptions<'_>, spec: &mut Map<String, Value>) -> Result<(), ForkError> {
    let (network, ports) = (format!("{PREFIX}network"), format!("{PREFIX}ports"));
    let of_source = spec.get("annotations").and_then(|all| all.get(&ports)?.as_str()).map(str::to_owned);
    let mut set = |name: &str, value: Option<&str>| set_annotation(spec, name, value);
    match (options.publish, options.netns) {
        (Some("none"), _) if of_source.is_some() => {
            // The container keeps its connections to the outside.
            set(&network, Some("pasta"));
            set(&ports, None);
        }
        (Some("none"), _) => {}
        (Some(text), _) => {
            parse_ports(text).map_err(|_| ForkError::Ports { text: text.to_owned() })?;
            set(&ports, Some(text));
        }
        // The namespace that was chosen is the whole network.
        (None, Some(_)) => [&network, &ports].into_iter().for_each(|name| set(name, None)),
        (None, None) => {
            if let Some(ports) = of_source {
                return Err(ForkError::NeedsPorts { id: options.source.to_owned(), ports });
            }
        }
    }
    Ok(())
}

fn set_annotation(spec: &mut Map<String, Value>, name: &str, value: Option<&str>) {
    match value {
        Some(value) => spec.entry("annotations").or_insert(Value::Null)[name] = value.into(),
        None => {
            if let Some(annotations) = spec.get_mut("annotations").and_then(Value::as_object_mut) {
                annotations.remove(name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(namespace: &Value) -> (Map<String, Value>, Spec) {
        let spec =
            json!({ "ociVersion": "1.0.2", "linux": { "namespaces": [{ "type": "pid" }, namespace] } });
        (serde_json::from_value(spec.clone()).unwrap(), serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn a_source_with_a_namespace_needs_a_choice() {
        let own = "/proc/self/ns/net";
        let (_, with) = spec(&json!({ "type": "network", "path": own }));
        let (_, without) = spec(&json!({ "type": "network" }));
        let choice = |text: &str| text.parse::<NetworkChoice>().unwrap();
        assert!(matches!(check("a", &with, None), Err(ForkError::NeedsNetwork { .. })));
        check("a", &without, None).unwrap();
        check("a", &with, Some(&choice("none"))).unwrap();
        check("a", &without, Some(&choice(own))).unwrap();
        assert!(matches!(check("a", &with, Some(&choice(own))), Err(ForkError::SameNetwork { .. })));
        assert!(matches!(check("a", &with, Some(&choice("net"))), Err(ForkError::RelativeNetwork { .. })));
        for other in ["/nowhere/net", "/dev/null"] {
            assert!(matches!(check("a", &without, Some(&choice(other))), Err(ForkError::Network { .. })));
        }
    }

    #[test]
    fn the_choice_replaces_the_sources_namespace() {
        let (mut with, _) = spec(&json!({ "type": "network", "path": "/a" }));
        set(&mut with, &NetworkChoice::Namespace("/b".into()));
        assert_eq!(
            with["linux"]["namespaces"],
            json!([{ "type": "pid" }, { "type": "network", "path": "/b" }])
        );
        set(&mut with, &NetworkChoice::None);
        assert_eq!(with["linux"]["namespaces"], json!([{ "type": "pid" }, { "type": "network" }]));
        let mut bare = Map::new();
        set(&mut bare, &NetworkChoice::None);
        assert_eq!(bare["linux"]["namespaces"], json!([{ "type": "network" }]));
    }
    #[test]
    fn a_fork_publishes_other_ports_or_none() {
        let publish = |annotations: Value, publish: Option<&'static str>, netns: Option<&NetworkChoice>| {
            let mut spec: Map<String, Value> =
                serde_json::from_value(json!({ "annotations": annotations })).unwrap();
            let options = ForkOptions { publish, netns, ..crate::fork::spec::tests::OPTIONS };
            super::publish(&options, &mut spec).map(|()| spec["annotations"].clone())
        };
        let with = || json!({ "a": "b", "io.machinen.ports": "80:80" });
        let error = publish(with(), None, None).unwrap_err().to_string();
        assert!(error.contains("80:80") && error.contains("--publish"), "{error}");
        assert_eq!(
            publish(with(), Some("81:80"), None).unwrap(),
            json!({ "a": "b", "io.machinen.ports": "81:80" })
        );
        assert_eq!(
            publish(with(), Some("none"), None).unwrap(),
            json!({ "a": "b", "io.machinen.network": "pasta" })
        );
        assert_eq!(publish(with(), None, Some(&NetworkChoice::None)).unwrap(), json!({ "a": "b" }));
        assert_eq!(publish(json!({ "a": "b" }), Some("none"), None).unwrap(), json!({ "a": "b" }));
        assert_eq!(publish(Value::Null, None, None).unwrap(), Value::Null);
        assert!(matches!(publish(Value::Null, Some("80"), None), Err(ForkError::Ports { .. })));
    }
}
