//! Finds keys by their first digits.

use machinen::error::{ErrorKind, HasKind};

/// Why a prefix does not name exactly one key.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrefixError {
    #[error("{prefix:?} is not a {thing}; see `machinen {thing} ls`")]
    NoSuchKey { prefix: String, thing: &'static str },
    #[error("{prefix:?} could be several {thing}s; give more digits")]
    Ambiguous { prefix: String, thing: &'static str },
}

impl HasKind for PrefixError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoSuchKey { .. } => ErrorKind::NotFound,
            Self::Ambiguous { .. } => ErrorKind::InvalidArgument,
        }
    }
}

/// Finds the one entry of `all` whose key begins with `prefix`. `thing` names what the entries are, and the
/// verb that lists them.
///
/// # Errors
/// No entry has that prefix, or several have it.
pub(super) fn find<'a, T>(
    all: &'a [T],
    key: impl Fn(&T) -> String,
    prefix: &str,
    thing: &'static str,
) -> Result<&'a T, PrefixError> {
    let mut found = all.iter().filter(|candidate| !prefix.is_empty() && key(candidate).starts_with(prefix));
    let prefix = || prefix.to_owned();
    match (found.next(), found.next()) {
        (Some(found), None) => Ok(found),
        (None, _) => Err(PrefixError::NoSuchKey { prefix: prefix(), thing }),
        (Some(_), Some(_)) => Err(PrefixError::Ambiguous { prefix: prefix(), thing }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_names_one_or_none() {
        let find = |prefix| find(&["ab1", "ab2", "c"], |key| (*key).to_owned(), prefix, "disk");
        assert_eq!(*find("ab2").unwrap(), "ab2");
        assert_eq!(*find("c").unwrap(), "c");
        assert_eq!(find("d").unwrap_err().to_string(), "\"d\" is not a disk; see `machinen disk ls`");
        assert!(matches!(find(""), Err(PrefixError::NoSuchKey { .. })));
        assert_eq!(find("ab").unwrap_err().to_string(), "\"ab\" could be several disks; give more digits");
    }
}
