//! What a hook reads on its stdin: the state of the container, as runc writes it.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{ContainerState, State};

use super::HookError;
use crate::spec::OCI_VERSION;

/// The parts of a container's state that never change.
#[derive(Debug, Clone, Default)]
pub(super) struct HookState {
    id: String,
    bundle: PathBuf,
    annotations: HashMap<String, String>,
}

impl HookState {
    pub(super) fn new(id: &str, bundle: &Path, annotations: HashMap<String, String>) -> Self {
        Self { id: id.to_owned(), bundle: bundle.to_owned(), annotations }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// The state in JSON (runtime-spec, runtime.md, "State"). A container that has stopped has no pid.
    pub(super) fn json(&self, status: ContainerState, pid: Option<u32>) -> Result<Vec<u8>, HookError> {
        let mut state = State::default();
        state
            .set_version(OCI_VERSION.to_owned())
            .set_id(self.id.clone())
            .set_status(status)
            .set_pid(pid.map(u32::cast_signed))
            .set_bundle(self.bundle.clone())
            .set_annotations(Some(self.annotations.clone()).filter(|all| !all.is_empty()));
        serde_json::to_vec(&state).map_err(HookError::Encode)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn the_state_has_the_members_of_the_specification() {
        let annotations = HashMap::from([("a/b".to_owned(), "c".to_owned())]);
        let json = |state: &HookState, status, pid| -> Value {
            serde_json::from_slice(&state.json(status, pid).unwrap()).unwrap()
        };
        let state = HookState::new("c1", Path::new("/run/c1"), annotations);
        assert_eq!(
            json(&state, ContainerState::Creating, Some(7)),
            json!({
                "ociVersion": OCI_VERSION, "id": "c1", "status": "creating", "pid": 7, "bundle": "/run/c1",
                "annotations": { "a/b": "c" },
            })
        );
        let bare = HookState::new("c1", Path::new("/run/c1"), HashMap::new());
        assert_eq!(
            json(&bare, ContainerState::Stopped, None),
            json!({ "ociVersion": OCI_VERSION, "id": "c1", "status": "stopped", "bundle": "/run/c1" })
        );
    }
}
