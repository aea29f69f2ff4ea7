//! The name of a pod's cgroup on the host: `linux.cgroupsPath` of the runtime-spec, checked.
//!
//! ```text
//!   /a/b  or  a/b          the same group, counted from the root of each hierarchy
//!   slice:prefix:name      the scope prefix-name.scope in a slice of systemd
//! ```

use std::{
    fmt,
    path::{Component, Path, PathBuf},
};

/// Longest name of a directory on Linux, bytes.
const MAX_NAME: usize = 255;

/// Why `linux.cgroupsPath` is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("linux.cgroupsPath {text:?} {problem}")]
pub struct CgroupPathError {
    text: String,
    problem: &'static str,
}

/// The name of a cgroup, which is never the root of a hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CgroupPath {
    /// Absolute and normal; counted from the root of each hierarchy.
    Directory(PathBuf),
    /// A scope of systemd.
    Scope {
        /// The slice, `system.slice` if the specification names none.
        slice: String,
        /// The first part of the scope's name.
        prefix: String,
        /// The last part of the scope's name.
        name: String,
    },
}

impl CgroupPath {
    /// # Errors
    /// The path is the root, has `..`, or is of no known form.
    pub fn parse(path: &Path) -> Result<Self, CgroupPathError> {
        let text = path.to_string_lossy();
        let refused = |problem| CgroupPathError { text: text.chars().take(500).collect(), problem };
        if path.to_str().is_none_or(|text| text.chars().any(char::is_control)) {
            return Err(refused("has characters that no cgroup's name has"));
        }
        if text.contains(':') && !text.contains('/') {
            return scope(&text).ok_or_else(|| {
                refused("is not of the form slice:prefix:name, such as system.slice:machinen:web")
            });
        }
        let mut normal = PathBuf::from("/");
        for component in path.components() {
            match component {
                Component::Normal(name) if name.len() > MAX_NAME => {
                    return Err(refused("has a name of more than 255 bytes"));
                }
                Component::Normal(name) => normal.push(name),
                Component::ParentDir => return Err(refused("has `..`")),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
        if normal.parent().is_none() {
            return Err(refused("is the root of the cgroups, which has all processes of the host"));
        }
        Ok(Self::Directory(normal))
    }

    /// The group's directory, counted from the root of each hierarchy. systemd nests slices by the dashes in their
    /// names.
    pub fn directory(&self) -> PathBuf {
        match self {
            Self::Directory(path) => path.clone(),
            Self::Scope { slice, prefix, name } => {
                let mut path = PathBuf::from("/");
                let stem = slice.strip_suffix(SLICE).unwrap_or(slice);
                let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
                path.extend(ends.filter(|_| stem != "-").map(|end| format!("{}{SLICE}", &stem[..end])));
                path.join(unit(prefix, name))
            }
        }
    }

    /// Another group next to this one, for a pod that must not share this one.
    pub fn beside(&self, id: &str) -> Self {
        match self {
            Self::Directory(path) => {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                Self::Directory(path.with_file_name(format!("{name}.{id}")))
            }
            Self::Scope { slice, prefix, name } => {
                Self::Scope { slice: slice.clone(), prefix: prefix.clone(), name: format!("{name}.{id}") }
            }
        }
    }

    /// The name of the scope, if it is one, and of its slice.
    pub(super) fn unit(&self) -> Option<(String, &str)> {
        match self {
            Self::Directory(_) => None,
            Self::Scope { slice, prefix, name } => Some((unit(prefix, name), slice)),
        }
    }
}

impl fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
            Self::Scope { slice, prefix, name } => write!(f, "{slice}:{prefix}:{name}"),
        }
    }
}

const SLICE: &str = ".slice";

fn unit(prefix: &str, name: &str) -> String {
    match prefix {
        "" => format!("{name}.scope"),
        prefix => format!("{prefix}-{name}.scope"),
    }
}

fn scope(text: &str) -> Option<CgroupPath> {
    let [slice, prefix, name] = text.split(':').collect::<Vec<_>>().try_into().ok()?;
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(SLICE)?;
    let whole = stem == "-" || stem.split('-').all(|part| !part.is_empty());
    let plain =
        |part: &str| part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-@\\".contains(&byte));
    let fits = whole && !name.is_empty() && [slice, prefix, name].into_iter().all(plain);
    let short = slice.len() <= MAX_NAME && unit(prefix, name).len() <= MAX_NAME;
    (fits && short && !name.ends_with(SLICE)).then(|| CgroupPath::Scope {
        slice: slice.to_owned(),
        prefix: prefix.to_owned(),
        name: name.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(text: &str) -> String {
        CgroupPath::parse(Path::new(text)).unwrap().directory().display().to_string()
    }

    #[test]
    fn every_form_names_a_directory() {
        for (text, expected) in [
            ("/default/web", "/default/web"),
            ("default/web", "/default/web"),
            ("//a/./b/", "/a/b"),
            ("/kubepods/burstable/pod1/c:1", "/kubepods/burstable/pod1/c:1"),
            ("system.slice:machinen:web", "/system.slice/machinen-web.scope"),
            (":machinen:web", "/system.slice/machinen-web.scope"),
            ("a-b-c.slice:cri:x", "/a.slice/a-b.slice/a-b-c.slice/cri-x.scope"),
            ("-.slice:cri:x", "/cri-x.scope"),
            ("a.slice::x", "/a.slice/x.scope"),
        ] {
            assert_eq!(directory(text), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_group_is_refused_by_name() {
        for (text, problem) in [
            ("/", "root"),
            ("", "root"),
            ("/./", "root"),
            (".", "root"),
            ("/a/../b", "`..`"),
            ("..", "`..`"),
            ("a:b", "slice:prefix:name"),
            ("a:b:c", "slice:prefix:name"),
            ("a.slice:b:", "slice:prefix:name"),
            ("a--b.slice:b:c", "slice:prefix:name"),
            (".slice:b:c", "slice:prefix:name"),
            ("a.slice:b:c d", "slice:prefix:name"),
            ("a.slice:b:c.slice", "slice:prefix:name"),
            ("/a\nb", "characters"),
        ] {
            let error = CgroupPath::parse(Path::new(text)).unwrap_err().to_string();
            assert!(error.contains(problem) && error.starts_with("linux.cgroupsPath"), "{text:?}: {error}");
        }
        let long = "x".repeat(256);
        assert!(CgroupPath::parse(Path::new(&long)).unwrap_err().to_string().contains("255"));
    }

    #[test]
    fn a_group_beside_another_has_the_containers_id() {
        let beside = |text: &str| CgroupPath::parse(Path::new(text)).unwrap().beside("two").directory();
        assert_eq!(beside("/default/one"), Path::new("/default/one.two"));
        assert_eq!(beside("a.slice:m:one"), Path::new("/a.slice/m-one.two.scope"));
    }
}
