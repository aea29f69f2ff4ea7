//! The names of containers and processes in requests and events. Callers parse them from their own protocol,
//! in which the init may be an empty text; below that, an id is valid because of its type.

use std::{borrow::Borrow, fmt, ops::Deref, sync::Arc};

use machinen_base::error::{ErrorKind, HasKind};
use machinen_protocol::process::{MAX_ID, is_id};

/// The id of a container, unique in its pod: 1 to 255 of A-Z a-z 0-9 _ + - . and not only dots.
///
/// The host uses it in the names of disks, and the guest in the names of directories.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerId(Arc<str>);

/// The id of a process that was added to a container, unique in that container: any text that is not empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExecId(Arc<str>);

/// One process of a container.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProcessId {
    /// The container of the process.
    pub container: ContainerId,
    /// The id under which the process was added; None for the container's init.
    pub exec: Option<ExecId>,
}

/// The processes that a signal is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SignalScope {
    /// One process.
    One(ProcessId),
    /// Every process of the container, also those that its processes have started.
    All(ContainerId),
}

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The text cannot be the id of a container.
    #[error("container id {id:?} is not usable: 1 to {MAX_ID} of A-Z a-z 0-9 _ + - . and not only dots")]
    Container {
        /// The first characters of the text.
        id: String,
    },
    /// A process was to be added to a container without an id.
    #[error("a process that is added to a container needs an id")]
    NoExecId,
}

impl HasKind for IdError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Container { .. } | Self::NoExecId => ErrorKind::InvalidArgument,
        }
    }
}

impl ContainerId {
    /// # Errors
    /// The text is empty or too long, or has other characters than those of an id.
    pub fn parse(id: &str) -> Result<Self, IdError> {
        match is_id(id) {
            true => Ok(Self(id.into())),
            false => Err(IdError::Container { id: id.chars().take(MAX_ID).collect() }),
        }
    }

    /// The container's first process.
    pub fn init(&self) -> ProcessId {
        ProcessId { container: self.clone(), exec: None }
    }

    /// The process that was added to the container as `exec`.
    pub fn exec(&self, exec: &ExecId) -> ProcessId {
        ProcessId { container: self.clone(), exec: Some(exec.clone()) }
    }
}

impl ExecId {
    /// # Errors
    /// The text is empty.
    pub fn parse(id: &str) -> Result<Self, IdError> {
        if id.is_empty() { Err(IdError::NoExecId) } else { Ok(Self(id.into())) }
    }
}

impl SignalScope {
    /// The container of the processes.
    pub fn container(&self) -> &ContainerId {
        match self {
            Self::One(process) => &process.container,
            Self::All(container) => container,
        }
    }

    /// Whether the container's init is among the processes.
    pub fn includes_init(&self) -> bool {
        match self {
            Self::One(process) => process.exec.is_none(),
            Self::All(_) => true,
        }
    }
}

/// The process in messages: `c1`, or `c1, process e1`.
impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            None => write!(f, "{}", self.container),
            Some(exec) => write!(f, "{}, process {exec}", self.container),
        }
    }
}

impl fmt::Display for SignalScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(process) => process.fmt(f),
            Self::All(container) => container.fmt(f),
        }
    }
}

/// Makes an id usable as text and as the key of a map.
macro_rules! is_text {
    ($id:ty) => {
        impl $id {
            /// The text of the id.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl Deref for $id {
            type Target = str;

            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $id {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<$id> for String {
            fn from(id: $id) -> Self {
                id.to_string()
            }
        }
    };
}

is_text!(ContainerId);
is_text!(ExecId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ids_are_parsed() {
        assert_eq!(ContainerId::parse("c-1").unwrap().to_string(), "c-1");
        let error = ContainerId::parse("../c").unwrap_err();
        assert!(error.to_string().contains("\"../c\" is not usable"), "{error}");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert_eq!(ExecId::parse(""), Err(IdError::NoExecId));
        assert_eq!(&*ExecId::parse("any text / \u{e4}").unwrap(), "any text / \u{e4}");
    }

    #[test]
    fn a_scope_has_a_container_and_a_name() {
        let (container, exec) = (ContainerId::parse("c").unwrap(), ExecId::parse("e").unwrap());
        let scopes = [
            (SignalScope::One(container.init()), true, "c"),
            (SignalScope::One(container.exec(&exec)), false, "c, process e"),
            (SignalScope::All(container.clone()), true, "c"),
        ];
        for (scope, includes_init, name) in scopes {
            assert_eq!(scope.container(), &container);
            assert_eq!((scope.includes_init(), scope.to_string().as_str()), (includes_init, name));
        }
    }
}
