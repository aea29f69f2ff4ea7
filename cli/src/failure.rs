//! The failure of a verb: the error, and what it means for whoever has run the verb.

use std::error::Error;

use machinen::error::{ErrorKind, HasKind, chain};
use serde_json::{Value, json};

use crate::rights;

/// Why a verb has failed.
#[derive(Debug)]
pub(crate) struct Failure {
    error: Box<dyn Error>,
    kind: ErrorKind,
}

impl<E: HasKind + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let kind = error.kind();
        Self { error: Box::new(error), kind }
    }
}

impl Failure {
    /// The error with all its causes, in one line. What was not permitted may need another user.
    pub(crate) fn message(&self) -> String {
        let chain = chain(self.error.as_ref());
        match rights::missing().filter(|_| self.kind == ErrorKind::PermissionDenied) {
            Some(missing) => format!("{chain}; {missing}"),
            None => chain,
        }
    }

    /// For programs: what the log of an OCI runtime has, the code of the error, and whether the same command may succeed
    /// later.
    pub(crate) fn value(&self, time: &str) -> Value {
        json!({
            "level": "error", "msg": self.message(), "code": self.kind.code(),
            "retryable": self.kind.is_retryable(), "time": time,
        })
    }
}

#[cfg(test)]
mod tests {
    use machinen::fs::FileError;

    use super::*;

    #[test]
    fn a_failure_has_its_causes_once_and_a_code() {
        let cause = std::io::Error::from(std::io::ErrorKind::NotFound);
        let failure = Failure::from(FileError::new("open", "/x", cause));
        assert_eq!(failure.message(), "cannot open /x: entity not found");
        let value = failure.value("now");
        assert_eq!((value["code"].as_str(), value["retryable"].as_bool()), (Some("not-found"), Some(false)));
        assert_eq!((value["level"].as_str(), value["time"].as_str()), (Some("error"), Some("now")));
    }
}
