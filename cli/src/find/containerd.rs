//! What containerd knows of its containers: image, name and lineage. A containerd that does not answer in time leaves that
//! out, because the list of containers must not depend on it.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_client::{
    services::v1::{Container, ListContainersRequest, containers_client::ContainersClient},
    tonic::{Request, metadata::AsciiMetadataValue, transport::Channel},
};
use tokio::time::timeout;

use super::FoundContainer;

/// How long containerd may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// Where containerd listens unless it is configured otherwise.
const DEFAULT_ADDRESS: &str = "/run/containerd/containerd.sock";
/// What containerd adds to its address for the socket that takes events.
const EVENTS: &str = ".ttrpc";

/// The label of a container that was made by a fork: the id of its source.
pub(crate) const FORKED_FROM: &str = "io.machinen.forked-from";
/// The label with the name that nerdctl has given.
const NERDCTL_NAME: &str = "nerdctl/name";

/// The address of containerd, from that of the socket for events.
pub(super) fn address(events: &str) -> PathBuf {
    match events.strip_suffix(EVENTS) {
        Some(address) => address.into(),
        None => DEFAULT_ADDRESS.into(),
    }
}

/// Adds what containerd knows.
pub(super) async fn complete(found: &mut [FoundContainer]) {
    let mut lists: BTreeMap<(PathBuf, String), Vec<Container>> = BTreeMap::new();
    for container in found.iter() {
        let Some(key) = key(container) else { continue };
        if let Entry::Vacant(vacant) = lists.entry(key) {
            let (address, namespace) = vacant.key();
            let listed = timeout(PATIENCE, list(address, namespace)).await.ok().flatten();
            vacant.insert(listed.unwrap_or_default());
        }
    }
    for container in found {
        let known =
            key(container).and_then(|key| lists.get(&key)?.iter().find(|known| known.id == container.id));
        let Some(known) = known else { continue };
        let label = |name: &str| known.labels.get(name).filter(|value| !value.is_empty()).cloned();
        container.image =
            Some(known.image.clone()).filter(|image| !image.is_empty()).or(container.image.take());
        container.name = label(NERDCTL_NAME).or(container.name.take());
        container.forked_from = label(FORKED_FROM);
    }
}

fn key(container: &FoundContainer) -> Option<(PathBuf, String)> {
    Some((container.containerd.clone()?, container.namespace.clone()?))
}

async fn list(address: &Path, namespace: &str) -> Option<Vec<Container>> {
    let channel: Channel = containerd_client::connect(address).await.ok()?;
    let mut request = Request::new(ListContainersRequest::default());
    request.metadata_mut().insert("containerd-namespace", namespace.parse::<AsciiMetadataValue>().ok()?);
    Some(ContainersClient::new(channel).list(request).await.ok()?.into_inner().containers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerds_address_follows_from_that_for_events() {
        assert_eq!(address("/run/x/c.sock.ttrpc"), PathBuf::from("/run/x/c.sock"));
        assert_eq!(address(""), PathBuf::from(DEFAULT_ADDRESS));
    }

    #[tokio::test]
    async fn a_containerd_that_is_not_there_changes_nothing() {
        let mut found = vec![crate::find::example("c", None, Some("default"))];
        found[0].containerd = Some("/no/such/socket".into());
        complete(&mut found).await;
        assert_eq!((found[0].image.as_deref(), found[0].name.as_deref()), (None, None));
    }
}
