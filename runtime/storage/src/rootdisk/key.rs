//! The name of a disk in the cache.

use std::{fmt, str::FromStr};

use machinen_base::fs::hex;

/// A SHA-256 digest: of a tree's manifest (the key of a disk), or of what identifies a source without reading
/// it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootdiskKey([u8; 32]);

/// The text is not 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a rootdisk key (64 hexadecimal digits)")]
pub struct RootdiskKeyError {
    text: String,
}

impl RootdiskKey {
    /// The key of a tree or source with this digest.
    pub fn new(digest: [u8; 32]) -> Self {
        Self(digest)
    }
}

impl fmt::Display for RootdiskKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for RootdiskKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RootdiskKey({self})")
    }
}

impl FromStr for RootdiskKey {
    type Err = RootdiskKeyError;

    fn from_str(text: &str) -> Result<Self, RootdiskKeyError> {
        let error = || RootdiskKeyError { text: text.to_owned() };
        let digits = text.as_bytes();
        if digits.len() != 64 || !digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(error());
        }
        let mut key = [0; 32];
        for (byte, pair) in key.iter_mut().zip(text.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| error())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| error())?;
        }
        Ok(Self(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let key = RootdiskKey::new(std::array::from_fn(|index| index as u8 * 7));
        assert_eq!(key.to_string().parse(), Ok(key));
        for bad in ["", "00", &"0".repeat(65), &"A".repeat(64), &format!("+{}", "0".repeat(63))] {
            assert!(bad.parse::<RootdiskKey>().is_err(), "{bad}");
        }
    }
}
