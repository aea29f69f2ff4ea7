//! The command of a container's own manager, for what only the manager can do.

use super::{ContainerOwner, FoundContainer};

/// containerd's namespace of the containers that Kubernetes has made.
const KUBERNETES: &str = "k8s.io";

/// What a user wants of a container, and only its manager can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ManagersVerb {
    Logs,
    Attach,
}

impl FoundContainer {
    /// What is to be done instead, as a clause of an error.
    pub(crate) fn instead(&self, verb: ManagersVerb) -> String {
        let name = match verb {
            ManagersVerb::Logs => "logs",
            ManagersVerb::Attach => "attach",
        };
        let id = self.name.as_deref().unwrap_or(&self.id);
        let namespace = self.namespace.as_deref().unwrap_or("default");
        let command = match self.owner {
            ContainerOwner::Podman => format!("podman {name} {id}"),
            ContainerOwner::Docker => format!("docker {name} {}", self.id),
            ContainerOwner::Crio => format!("crictl {name} {}", self.id),
            ContainerOwner::Containerd if namespace == KUBERNETES => format!("crictl {name} {}", self.id),
            // Only nerdctl gives names.
            ContainerOwner::Containerd if self.name.is_some() => {
                format!("nerdctl --namespace {namespace} {name} {id}")
            }
            ContainerOwner::Containerd if verb == ManagersVerb::Attach => {
                format!("ctr --namespace {namespace} tasks attach {id}")
            }
            ContainerOwner::Containerd => {
                return "its output goes to the client of containerd that has created it, and ctr keeps none"
                    .to_owned();
            }
            ContainerOwner::Machinen => {
                return "its streams are those of the command that has created it; `machinen boot --detach` keeps them"
                    .to_owned();
            }
        };
        format!("use `{command}`")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::find::example;

    #[test]
    fn each_manager_has_a_command_that_names_the_container() {
        let text = |owner, name, namespace, verb| {
            FoundContainer { owner, ..example("c1", name, namespace) }.instead(verb)
        };
        use ContainerOwner::{Containerd, Crio, Docker, Machinen, Podman};
        use ManagersVerb::{Attach, Logs};
        for (owner, name, namespace, verb, expected) in [
            (Podman, Some("web"), None, Logs, "use `podman logs web`"),
            (Docker, None, Some("moby"), Attach, "use `docker attach c1`"),
            (Crio, Some("web"), None, Logs, "use `crictl logs c1`"),
            (Containerd, None, Some("k8s.io"), Attach, "use `crictl attach c1`"),
            (Containerd, Some("web"), Some("n"), Logs, "use `nerdctl --namespace n logs web`"),
            (Containerd, None, Some("n"), Attach, "use `ctr --namespace n tasks attach c1`"),
        ] {
            assert_eq!(text(owner, name, namespace, verb), expected);
        }
        assert!(text(Containerd, None, Some("n"), Logs).contains("client of containerd"));
        assert!(text(Machinen, None, None, Logs).contains("boot --detach"));
    }
}
