//! The statuses that containerd receives for errors.

use containerd_shim_protos::ttrpc::{self, Code, get_status};
use machinen::error::{HasKind, chain};

/// The error that containerd receives: the code of its kind, and the text with all causes.
pub(crate) fn to_ttrpc(error: &(impl HasKind + 'static)) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(error.kind().into(), chain(error)))
}

/// Refuses a request that this version does not support.
pub(crate) fn unimplemented<T>(what: &str) -> ttrpc::Result<T> {
    Err(ttrpc::Error::RpcStatus(get_status(Code::UNIMPLEMENTED, format!("{what} is not supported yet"))))
}

/// Refuses an invalid request.
pub(crate) fn invalid<T>(what: String) -> ttrpc::Result<T> {
    Err(ttrpc::Error::RpcStatus(get_status(Code::INVALID_ARGUMENT, what)))
}

/// Reports an answer that cannot be encoded.
pub(crate) fn encoding(error: protobuf::Error) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(
        Code::INTERNAL,
        format!("cannot encode the answer: {}", chain(&error)),
    ))
}
