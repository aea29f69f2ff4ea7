//! `machinen cp`: copies files between a running container and the host.
//!
//! The container's files are those below `/proc/PID/root` of its process on the host, a file system that the guest serves
//! (docs/design/view.md). The guest is not trusted: no link of it is followed by the host's kernel ([`resolve`]), and what
//! is copied is made with *at calls that never go through a link ([`tree`]).

mod error;
mod files;
mod resolve;
mod tree;

use std::{
    ffi::{OsStr, OsString},
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    path::{Path, PathBuf},
};

use clap::Args;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};

pub(crate) use self::{
    error::CopyError,
    files::{make_dirs, open_root, read_small},
    resolve::{LastLink, Place, resolve},
    tree::{CopyLimits, CopyOptions, TreeCopy},
};
use crate::{
    find::{self, FoundContainer},
    oci::GlobalArgs,
};

/// Arguments of `machinen cp`.
#[derive(Debug, Args)]
pub(crate) struct CpArgs {
    /// Leave out files whose name, or path below SRC, matches this pattern (*, ?, [...]); may be repeated
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Keep owners and groups, by number
    #[arg(long, short)]
    archive: bool,
    /// Most bytes that are copied, with K, M, G or T (powers of 1024)
    #[arg(long, value_name = "SIZE", value_parser = crate::rootdisk::size, default_value = "64G")]
    max_size: u64,
    /// What to copy: PATH on the host or CONTAINER:PATH. A directory that ends with /. is its content
    #[arg(value_name = "SRC")]
    source: String,
    /// Where to: a directory that exists, or a new name
    #[arg(value_name = "DST")]
    destination: String,
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    Host(PathBuf),
    Container { name: String, path: PathBuf },
}

impl Side {
    /// A colon before the first slash separates a container from a path, as with docker cp; so does `:/` after
    /// NAMESPACE/ID. `./` makes a path of anything.
    fn parse(text: &str) -> Self {
        let Some((name, path)) = text.split_once(':') else { return Self::Host(text.into()) };
        let is_name = match name.matches('/').count() {
            0 => true,
            1 => path.starts_with('/'),
            _ => false,
        };
        match is_name && !name.is_empty() && !name.starts_with(['.', '/']) {
            true => Self::Container { name: name.to_owned(), path: Path::new("/").join(path) },
            false => Self::Host(text.into()),
        }
    }
}

/// # Errors
/// A side does not exist, or a file cannot be copied. Files that were copied before stay.
pub(crate) async fn run(global: &GlobalArgs, args: &CpArgs) -> Result<(), CopyError> {
    let excludes = args.exclude.iter().map(|pattern| {
        glob::Pattern::new(pattern)
            .map_err(|source| CopyError::Pattern { pattern: pattern.clone(), source: Box::new(source) })
    });
    let excludes = excludes.collect::<Result<Vec<_>, _>>()?;
    let (source, destination) = (Side::parse(&args.source), Side::parse(&args.destination));
    let (root, to_container) = match (&source, &destination) {
        (Side::Container { name, .. }, Side::Host(_)) => (container_root(global, name).await?, false),
        (Side::Host(_), Side::Container { name, .. }) => (container_root(global, name).await?, true),
        (Side::Host(_), Side::Host(_)) => return Err(CopyError::NoContainer),
        (Side::Container { .. }, Side::Container { .. }) => return Err(CopyError::TwoContainers),
    };
    let options = CopyOptions { owners: args.archive, special_bits: to_container };
    let mut copy =
        TreeCopy::new(excludes, options, CopyLimits { bytes: args.max_size, ..CopyLimits::DEFAULT });
    let place = |side: &Side, last| match side {
        Side::Container { path, .. } => resolve(&root, path, last),
        Side::Host(path) => host_place(path),
    };
    let from = place(&source, LastLink::Keep)?;
    let (into, name) = destination_of(place(&destination, LastLink::Follow)?, &from, &args.destination)?;
    copy.copy(&from, &into, &name)?;
    for left_out in copy.left_out() {
        eprintln!("machinen: left out {left_out}");
    }
    Ok(())
}

/// The root directory of a container that runs.
async fn container_root(global: &GlobalArgs, name: &str) -> Result<OwnedFd, CopyError> {
    let FoundContainer { id, pid, status, .. } = find::one(global, name).await?;
    if pid == 0 || !["running", "paused", "created"].contains(&status.as_str()) {
        return Err(CopyError::NotRunning { id, status });
    }
    open_root(pid)
}

/// A path of the host, whose owner is the user.
fn host_place(path: &Path) -> Result<Place, CopyError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let ends_in_dot = path.as_os_str().as_bytes().ends_with(b"/.");
    let (parent, name) = match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if !ends_in_dot => (parent, name),
        // A path such as `.`, `..`, `/` or `dir/.`.
        _ => (path, OsStr::new(".")),
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let dir = rustix::fs::open(parent, flags, Mode::empty())
        .map_err(|errno| CopyError::at("open the directory", parent, errno))?;
    Ok(Place { parent: dir, name: name.to_owned(), shown: path.to_owned() })
}

/// The directory and the name for a copy. A directory that exists gets the source under the source's name, or, if the
/// source ends with `/.`, its content.
fn destination_of(to: Place, from: &Place, text: &str) -> Result<(OwnedFd, OsString), CopyError> {
    let source = from.kind()?.ok_or_else(|| CopyError::Missing { path: from.shown.clone() })?;
    // A link to a directory of the host is followed, since the user has named it.
    let is_dir = match rustix::fs::statat(&to.parent, &to.name, AtFlags::empty()) {
        Ok(stat) => Some(FileType::from_raw_mode(stat.st_mode) == FileType::Directory),
        Err(rustix::io::Errno::NOENT) => None,
        Err(errno) => return Err(CopyError::at("look up", &to.shown, errno)),
    };
    match (is_dir, source) {
        (Some(true), _) => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let dir = rustix::fs::openat(&to.parent, &to.name, flags, Mode::empty())
                .map_err(|errno| CopyError::at("open the directory", &to.shown, errno))?;
            Ok((dir, from.name.clone()))
        }
        (Some(false), FileType::Directory) => Err(CopyError::NotADirectory { path: to.shown }),
        (None, kind) if text.ends_with('/') && kind != FileType::Directory => {
            Err(CopyError::Missing { path: to.shown })
        }
        _ => Ok((to.parent, to.name)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_colon_before_a_slash_separates_a_container() {
        let container = |name: &str, path: &str| Side::Container { name: name.into(), path: path.into() };
        assert_eq!(Side::parse("c:/a"), container("c", "/a"));
        assert_eq!(Side::parse("c:a"), container("c", "/a"));
        assert_eq!(Side::parse("default/c:/a"), container("default/c", "/a"));
        for host in ["/a:b", "./c:x", "a/b:c", "file", ":x"] {
            assert_eq!(Side::parse(host), Side::Host(host.into()), "{host}");
        }
    }

    fn copy(from: &str, to: &str) -> Result<(), CopyError> {
        let from = host_place(from.as_ref())?;
        let (into, name) = destination_of(host_place(to.as_ref())?, &from, to)?;
        let options = CopyOptions { owners: false, special_bits: false };
        TreeCopy::new(Vec::new(), options, CopyLimits::DEFAULT).copy(&from, &into, &name)
    }

    #[test]
    fn a_directory_that_exists_receives_and_a_new_name_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::create_dir_all(path("tree/deep")).unwrap();
        fs::write(path("tree/deep/f"), "1").unwrap();
        fs::create_dir(path("there")).unwrap();
        copy(&path("tree"), &path("there")).unwrap();
        assert!(dir.path().join("there/tree/deep/f").exists());
        copy(&path("tree"), &path("new")).unwrap();
        assert!(dir.path().join("new/deep/f").exists());
        copy(&path("tree/."), &path("there")).unwrap();
        assert!(dir.path().join("there/deep/f").exists());
        copy(&path("tree/deep/f"), &path("there/g")).unwrap();
        assert_eq!(fs::read_to_string(path("there/g")).unwrap(), "1");
        let error = |from: &str, to: &str| copy(&path(from), &path(to)).unwrap_err().to_string();
        assert!(error("none", "there").contains("none does not exist"));
        assert!(error("tree", "there/g").contains("is not a directory"));
        assert!(error("tree/deep/f", "no/").contains("does not exist"));
        assert!(error("tree/deep/f", "no/such/dir").contains("cannot open the directory"));
    }
}
