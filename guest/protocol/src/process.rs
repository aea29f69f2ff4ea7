//! How the calls of the agent name containers and their processes.
//!
//! On the wire a process is the `exec_id` of a message, which is empty for the init. This is the only place
//! where the empty text has that meaning: both sides decode and encode it here.

/// Longest id of a container or process, bytes. The agent uses ids as names of directories.
pub const MAX_ID: usize = 255;

/// Whether the agent accepts `id` as the id of a container or process: 1 to [`MAX_ID`] of A-Z a-z 0-9 _ + - .
/// and not only dots.
pub fn is_id(id: &str) -> bool {
    (1..=MAX_ID).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte))
        && !id.bytes().all(|byte| byte == b'.')
}

/// A process of a container in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessRef {
    /// The container's first process.
    Init,
    /// The process that was added to the container under this id.
    Exec(String),
}

impl ProcessRef {
    /// Decodes the `exec_id` of a message.
    pub fn from_wire(exec_id: String) -> Self {
        if exec_id.is_empty() { Self::Init } else { Self::Exec(exec_id) }
    }

    /// Encodes the `exec_id` of a message.
    pub fn to_wire(&self) -> String {
        match self {
            Self::Init => String::new(),
            Self::Exec(id) => id.clone(),
        }
    }

    /// Whether this is the container's first process.
    pub fn is_init(&self) -> bool {
        *self == Self::Init
    }
}

/// The processes of a container that a signal is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SignalTarget {
    /// One process.
    One(ProcessRef),
    /// Every process of the container, also those that its processes have started.
    All,
}

impl SignalTarget {
    /// Decodes `exec_id` and `all` of a message.
    pub fn from_wire(exec_id: String, all: bool) -> Self {
        if all { Self::All } else { Self::One(ProcessRef::from_wire(exec_id)) }
    }

    /// Encodes `exec_id` and `all` of a message.
    pub fn to_wire(&self) -> (String, bool) {
        match self {
            Self::One(process) => (process.to_wire(), false),
            Self::All => (String::new(), true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_empty_exec_id_is_the_init() {
        for (process, exec_id) in [(ProcessRef::Init, ""), (ProcessRef::Exec("exec-1".to_owned()), "exec-1")]
        {
            assert_eq!(process.to_wire(), exec_id);
            assert_eq!(ProcessRef::from_wire(exec_id.to_owned()), process);
            let one = SignalTarget::One(process);
            assert_eq!(one.to_wire(), (exec_id.to_owned(), false));
            assert_eq!(SignalTarget::from_wire(exec_id.to_owned(), false), one);
            assert_eq!(SignalTarget::from_wire(exec_id.to_owned(), true), SignalTarget::All);
        }
        assert_eq!(SignalTarget::All.to_wire(), (String::new(), true));
    }

    #[test]
    fn ids_that_mean_something_to_a_path_or_a_mount_are_refused() {
        for id in ["", ".", "..", "a/b", "a:b", "a,b", "a b", "a\0", "\u{e4}"] {
            assert!(!is_id(id), "{id:?}");
        }
        assert!(is_id("Az09_+-.") && is_id(&"x".repeat(MAX_ID)) && !is_id(&"x".repeat(MAX_ID + 1)));
    }
}
