//! How the command line gives a running container secrets. The method decodes, and calls the pod.

use async_trait::async_trait;
use containerd_shim_protos::ttrpc::{self, asynchronous::TtrpcContext};
use machinen::pod::{ContainerSecret, Pod, SecretsRequest};

use crate::{
    api::{Secrets, SetSecretsRequest, SetSecretsResponse},
    error::to_ttrpc,
    id,
};

/// The service of one pod.
pub(crate) struct SecretsService {
    pod: Pod,
}

impl SecretsService {
    pub(crate) fn new(pod: Pod) -> Self {
        Self { pod }
    }
}

#[async_trait]
impl Secrets for SecretsService {
    async fn set(&self, _: &TtrpcContext, req: SetSecretsRequest) -> ttrpc::Result<SetSecretsResponse> {
        let id = id::container(&req.container_id)?;
        let secret = |secret: crate::api::SecretValue| ContainerSecret {
            name: secret.name.clone(),
            value: secret.value.clone(),
        };
        let secrets = req.secrets.into_iter().map(secret).collect();
        let request = SecretsRequest { secrets, removed: req.removed };
        self.pod.set_secrets(&id, request).await.map_err(|error| to_ttrpc(&error))?;
        Ok(SetSecretsResponse::new())
    }
}
