//! The one place where an error becomes a ttrpc status. What an error means stands next to its definition.

use machinen_protocol::error::{HasKind, chain};
use ttrpc::{Code, get_status};

/// A failed call, ready to be answered.
#[derive(Debug)]
pub(crate) struct Failure(ttrpc::Error);

impl<E: HasKind> From<E> for Failure {
    fn from(err: E) -> Self {
        Self(ttrpc::Error::RpcStatus(get_status(Code::from(err.kind()), chain(&err))))
    }
}

impl From<Failure> for ttrpc::Error {
    fn from(Failure(error): Failure) -> Self {
        error
    }
}
