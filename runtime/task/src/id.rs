//! Decodes how containerd names containers and processes: by two texts, of which the second is empty for a
//! container's init.

use containerd_shim_protos::ttrpc;
use machinen::pod::{ContainerId, ExecId, ProcessId, SignalScope};

use crate::error::to_ttrpc;

/// # Errors
/// The text cannot be the id of a container.
pub(crate) fn container(id: &str) -> ttrpc::Result<ContainerId> {
    ContainerId::parse(id).map_err(|error| to_ttrpc(&error))
}

/// Decodes the id of a process that is to be added to a container.
///
/// # Errors
/// The text is empty.
pub(crate) fn exec(exec_id: &str) -> ttrpc::Result<ExecId> {
    ExecId::parse(exec_id).map_err(|error| to_ttrpc(&error))
}

/// # Errors
/// The first text cannot be the id of a container.
pub(crate) fn process(id: &str, exec_id: &str) -> ttrpc::Result<ProcessId> {
    let exec = if exec_id.is_empty() { None } else { Some(exec(exec_id)?) };
    Ok(ProcessId { container: container(id)?, exec })
}

/// Decodes the processes that a signal is for. With `all` the second text has no meaning.
///
/// # Errors
/// The first text cannot be the id of a container.
pub(crate) fn signal_scope(id: &str, exec_id: &str, all: bool) -> ttrpc::Result<SignalScope> {
    if all { container(id).map(SignalScope::All) } else { process(id, exec_id).map(SignalScope::One) }
}

/// Encodes the second text of a process.
pub(crate) fn exec_id(process: &ProcessId) -> String {
    process.exec.as_ref().map(ExecId::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::ttrpc::Code;

    use super::*;

    #[test]
    fn an_empty_exec_id_is_the_init() {
        let init = process("c", "").unwrap();
        assert_eq!((init.container.as_str(), &init.exec), ("c", &None));
        let added = process("c", "any text").unwrap();
        assert_eq!(added.exec.as_ref().map(ExecId::as_str), Some("any text"));
        assert_eq!((exec_id(&init).as_str(), exec_id(&added).as_str()), ("", "any text"));
        assert_eq!(signal_scope("c", "", false).unwrap(), SignalScope::One(init.clone()));
        assert_eq!(signal_scope("c", "", true).unwrap(), SignalScope::All(init.container));
    }

    #[test]
    fn what_cannot_be_an_id_is_an_invalid_argument() {
        let refusals = [
            container("a/b").err(),
            process("", "e").err(),
            signal_scope("..", "", true).err(),
            exec("").err(),
        ];
        for refusal in refusals {
            let Some(ttrpc::Error::RpcStatus(status)) = refusal else { panic!("{refusal:?}") };
            assert_eq!(status.code.enum_value(), Ok(Code::INVALID_ARGUMENT));
        }
    }
}
