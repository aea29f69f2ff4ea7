//! Secrets of a running container: the guest keeps them in a tmpfs, and the host keeps none of them.

use std::fmt;

use machinen_protocol::{
    api::Secret,
    secrets::{MAX_SECRETS, check, check_name},
};

use super::{ContainerId, Pod, PodError, state::PodRequest};

/// A secret, whose value no log has.
#[derive(Clone, PartialEq, Eq)]
pub struct ContainerSecret {
    /// An identifier of the shell.
    pub name: String,
    /// One line, without its end.
    pub value: Vec<u8>,
}

impl fmt::Debug for ContainerSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContainerSecret").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Which secrets of a container are written, and which are removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SecretsRequest {
    /// They replace those of the same names.
    pub secrets: Vec<ContainerSecret>,
    /// The names; one that does not exist is no error.
    pub removed: Vec<String>,
}

impl SecretsRequest {
    /// # Errors
    /// A name or a value is not valid, or there are many.
    pub fn check(&self) -> Result<(), PodError> {
        let count = self.secrets.len() + self.removed.len();
        if count > MAX_SECRETS {
            return Err(PodError::ManySecrets { count, most: MAX_SECRETS });
        }
        self.secrets.iter().try_for_each(|secret| check(&secret.name, &secret.value))?;
        Ok(self.removed.iter().try_for_each(|name| check_name(name))?)
    }
}

impl Pod {
    /// Writes and removes secrets of a container, all or none of them. It has them in `/run/secrets` until it ends.
    ///
    /// # Errors
    /// A secret is not valid, the container is paused or has stopped, or it has something else in that place.
    pub async fn set_secrets(&self, id: &ContainerId, request: SecretsRequest) -> Result<(), PodError> {
        request.check()?;
        let container = self.container(id)?;
        // A checkpoint or a pause finds the files as they are before or after.
        let _thawed = container.freezing.read().await;
        container.check(PodRequest::Secrets)?;
        let secret = |ContainerSecret { name, value }| Secret { name, value, ..Default::default() };
        let secrets = request.secrets.into_iter().map(secret).collect();
        let set = self.agent(id).await?.set_secrets(id, secrets, request.removed).await;
        set.map_err(|source| PodError::guest("set secrets of", id, source))
    }
}

#[cfg(test)]
mod tests {
    use machinen_base::error::{ErrorKind, HasKind as _};

    use super::*;

    #[test]
    fn a_request_is_checked_and_its_values_are_in_no_text() {
        let secret = |name: &str, value: &str| ContainerSecret { name: name.into(), value: value.into() };
        let request = |secrets: Vec<ContainerSecret>, removed: &[&str]| SecretsRequest {
            secrets,
            removed: removed.iter().map(|name| (*name).to_owned()).collect(),
        };
        let good = request(vec![secret("A", "hush")], &["B"]);
        assert!(good.check().is_ok() && !format!("{good:?}").contains("hush"));
        let many: Vec<_> = (0..=MAX_SECRETS).map(|number| secret(&format!("A{number}"), "")).collect();
        for odd in [request(vec![secret("a-b", "hush")], &[]), request(vec![], &["../x"]), request(many, &[])]
        {
            let error = odd.check().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
            assert!(!error.to_string().contains("hush"));
        }
    }
}
