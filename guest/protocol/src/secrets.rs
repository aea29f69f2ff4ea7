//! Secrets of a container: where they are, and which are valid. Host and guest check both.

/// The directory of a container that has its secrets, one file for each.
pub const SECRETS: &str = "/run/secrets";

/// The source of the mount at [`SECRETS`] in the facts of a checkpoint: a container that is restored has an empty tmpfs there.
pub const MOUNT_SOURCE: &str = "secrets";

/// Most bytes of a name.
pub const MAX_NAME: usize = 255;
/// Most bytes of a value.
pub const MAX_VALUE: usize = 64 << 10;
/// Most secrets of one call.
pub const MAX_SECRETS: usize = 128;

/// Why a secret is not valid. The value is part of no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// The name is not an identifier.
    #[error(
        "the name of a secret is an identifier of the shell (letters, digits and _, no digit first, at most 255 of them), \
         not {name:?}"
    )]
    Name {
        /// The beginning of the name.
        name: String,
    },
    /// The value has several lines.
    #[error("the value of the secret {name} has more than one line")]
    Lines {
        /// The name.
        name: String,
    },
    /// The value has a NUL.
    #[error("the value of the secret {name} has a NUL")]
    Nul {
        /// The name.
        name: String,
    },
    /// The value is long.
    #[error("the value of the secret {name} is longer than 64 KiB")]
    Long {
        /// The name.
        name: String,
    },
}

/// Checks the name of a secret, which becomes the name of a file.
///
/// # Errors
/// The name is not an identifier of the shell, or is long.
pub fn check_name(name: &str) -> Result<(), SecretError> {
    let mut bytes = name.bytes();
    let begins = bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
    match begins && name.len() <= MAX_NAME && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        true => Ok(()),
        false => Err(SecretError::Name { name: name.chars().take(64).collect() }),
    }
}

/// Checks a secret.
///
/// # Errors
/// The name is not valid, or the value is not one line or is long.
pub fn check(name: &str, value: &[u8]) -> Result<(), SecretError> {
    check_name(name)?;
    let name = name.to_owned();
    if value.len() > MAX_VALUE {
        return Err(SecretError::Long { name });
    }
    if value.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
        return Err(SecretError::Lines { name });
    }
    if value.contains(&0) {
        return Err(SecretError::Nul { name });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_an_identifier_and_a_value_is_one_line() {
        for name in ["A", "_", "db_password", "X9", &"a".repeat(MAX_NAME)] {
            assert_eq!(check(name, b"any text = \"x\""), Ok(()), "{name}");
        }
        for name in ["", "9x", "a-b", "a.b", "../x", "a/b", "\u{e4}", "a ", &"a".repeat(MAX_NAME + 1)] {
            assert!(matches!(check(name, b""), Err(SecretError::Name { .. })), "{name}");
        }
        let name = || "A".to_owned();
        assert_eq!(check("A", b"a\nb"), Err(SecretError::Lines { name: name() }));
        assert_eq!(check("A", b"a\r"), Err(SecretError::Lines { name: name() }));
        assert_eq!(check("A", b"a\0b"), Err(SecretError::Nul { name: name() }));
        assert_eq!(check("A", &vec![b'a'; MAX_VALUE]), Ok(()));
        let error = check("A", &vec![b's'; MAX_VALUE + 1]).unwrap_err();
        assert_eq!(error, SecretError::Long { name: name() });
        assert!(!error.to_string().contains("ss"), "{error}");
    }
}
