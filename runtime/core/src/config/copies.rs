//! Copy mounts: directories of the host that a container gets a copy of, as the annotation `io.machinen.copy-mount` and an
//! option of `machinen boot` name them.

use std::{
    fmt,
    path::{Component, Path, PathBuf},
    str::FromStr,
};

/// Most copy mounts of a container. Each has two disks.
pub const MAX_COPIES: usize = 16;
/// How copy mounts are written.
pub const COPIES: &str = "HOST:CONTAINER with two absolute paths without `..`, such as /srv/data:/data";

/// A directory of the host, and where the container gets a copy of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyMount {
    /// The directory of the host.
    pub source: PathBuf,
    /// The path in the container. It is not the root.
    pub destination: PathBuf,
}

/// Why a list of copy mounts is not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCopy {
    /// The text is not that of a copy mount.
    #[error("{0:?} is no copy mount: it takes {COPIES}")]
    Malformed(String),
    /// Two copy mounts have the same destination.
    #[error("two copy mounts have the destination {}", .0.display())]
    Duplicate(PathBuf),
    /// There are too many.
    #[error("there are more than {MAX_COPIES} copy mounts")]
    TooMany,
}

/// Reads a list of copy mounts, separated by commas.
///
/// # Errors
/// One is malformed, or has the destination of an earlier one, or there are more than [`MAX_COPIES`].
pub fn parse_copies(text: &str) -> Result<Vec<CopyMount>, InvalidCopy> {
    let mut copies: Vec<CopyMount> = Vec::new();
    for part in text.split(',') {
        let copy: CopyMount = part.trim().parse()?;
        if copies.iter().any(|other| other.destination == copy.destination) {
            return Err(InvalidCopy::Duplicate(copy.destination));
        }
        if copies.len() == MAX_COPIES {
            return Err(InvalidCopy::TooMany);
        }
        copies.push(copy);
    }
    Ok(copies)
}

impl FromStr for CopyMount {
    type Err = InvalidCopy;

    fn from_str(text: &str) -> Result<Self, InvalidCopy> {
        let malformed = || InvalidCopy::Malformed(text.chars().take(200).collect());
        let (source, destination) = text.split_once(':').ok_or_else(malformed)?;
        let (source, destination) = (plain(source), plain(destination));
        let (source, destination) = source.zip(destination).ok_or_else(malformed)?;
        match destination.parent() {
            Some(_) => Ok(Self { source, destination }),
            None => Err(malformed()),
        }
    }
}

impl fmt::Display for CopyMount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.source.display(), self.destination.display())
    }
}

/// An absolute path without `.`, `..`, a colon, a comma or a control character.
fn plain(text: &str) -> Option<PathBuf> {
    let path = Path::new(text);
    let is_plain = path.is_absolute()
        && !text.contains([':', ','])
        && !text.contains(char::is_control)
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    is_plain.then(|| path.components().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        let list = parse_copies("/srv/a:/data, /b/:/c//d/").unwrap();
        let shown: Vec<_> = list.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["/srv/a:/data", "/b:/c/d"]);
    }

    #[test]
    fn what_is_not_valid_is_named() {
        for text in
            ["", "/a", "/a:b", "a:/b", "/a:/", "/a:/../b", "/a/..:/b", "/a:/b:/c", "/a:/b\nc", "/a:/b,", ":"]
        {
            assert!(matches!(parse_copies(text), Err(InvalidCopy::Malformed(_))), "{text:?}");
        }
        assert_eq!(parse_copies("/a:/x,/b:/x/"), Err(InvalidCopy::Duplicate("/x".into())));
        let many = |count: usize| (0..count).map(|n| format!("/a:/{n}")).collect::<Vec<_>>().join(",");
        assert_eq!(parse_copies(&many(MAX_COPIES)).unwrap().len(), MAX_COPIES);
        assert_eq!(parse_copies(&many(MAX_COPIES + 1)), Err(InvalidCopy::TooMany));
    }
}
