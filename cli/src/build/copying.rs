//! The step COPY: files of the context into the container of a build, by the view of the container's files.

use std::{
    ffi::OsString,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};

use machinen::fs::FileError;
use rustix::fs::{FileType, Mode, OFlags};

use super::error::BuildError;
use crate::copy::{CopyLimits, CopyOptions, LastLink, Place, TreeCopy, make_dirs, resolve};

/// Files that tell docker and buildah what is not part of the context.
const IGNORE_FILES: [&str; 2] = [".dockerignore", ".containerignore"];

/// What is copied.
#[derive(Debug)]
pub(super) struct Copied {
    pub(super) context: PathBuf,
    /// Relative to the context.
    pub(super) sources: Vec<String>,
    /// Absolute. With a slash at the end it is a directory.
    pub(super) destination: String,
    /// The working directory, which `.` means.
    pub(super) workdir: String,
}

/// Copies as docker does: a directory is its content, and several sources need a directory. Owners are root. Returns what
/// was left out.
///
/// # Errors
/// A source does not exist or is outside of the context, or a file cannot be copied.
pub(super) fn copy(root: &OwnedFd, copied: &Copied) -> Result<Vec<String>, BuildError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let context: OwnedFd = rustix::fs::open(&copied.context, flags, Mode::empty())
        .map_err(|errno| FileError::new("open", &copied.context, errno))?;
    let destination = copied.destination.as_str();
    let is_dir = destination.ends_with('/')
        || destination.ends_with("/.")
        || Path::new(destination) == Path::new(&copied.workdir);
    if copied.sources.len() > 1 && !is_dir {
        let what = "is the destination of several sources, so it has to end with /";
        return Err(BuildError::Source { source_path: destination.to_owned(), what });
    }
    let options = CopyOptions { owners: false, special_bits: true };
    let mut tree = TreeCopy::new(Vec::new(), options, CopyLimits::DEFAULT);
    for source in &copied.sources {
        let place = find(&context, copied, source)?;
        let (into, name) = match place.kind()? {
            Some(FileType::Directory) => {
                refuse_ignore_files(&copied.context)?;
                make_dirs(root, Path::new(destination))?;
                named(resolve(root, Path::new(destination), LastLink::Follow)?)
            }
            Some(_) => target(root, destination, is_dir, source)?,
            None => {
                let what = "is not in the context";
                return Err(BuildError::Source { source_path: source.clone(), what });
            }
        };
        tree.copy(&place, &into, &name)?;
    }
    Ok(tree.left_out().to_vec())
}

/// A source in the context. Links are followed in the context, and lead to nothing outside.
fn find(context: &OwnedFd, copied: &Copied, source: &str) -> Result<Place, BuildError> {
    let odd = |what| Err(BuildError::Source { source_path: source.to_owned(), what });
    if Path::new(source).components().any(|component| component == Component::ParentDir) {
        return odd("has the component .., and sources are in the context");
    }
    if source.contains(['*', '?', '[']) {
        return odd("has a pattern, which is not supported");
    }
    let found = resolve(context, &Path::new("/").join(source), LastLink::Follow)?;
    let shown = copied.context.join(source.trim_start_matches('/'));
    Ok(Place { shown, ..found })
}

/// Where one file goes.
fn target(
    root: &OwnedFd,
    destination: &str,
    is_dir: bool,
    source: &str,
) -> Result<(OwnedFd, OsString), BuildError> {
    let path = Path::new(destination);
    let above = if is_dir { path } else { path.parent().unwrap_or(Path::new("/")) };
    make_dirs(root, above)?;
    let found = resolve(root, path, LastLink::Follow)?;
    match found.kind()? {
        Some(FileType::Directory) => {
            let name = Path::new(source).file_name().unwrap_or_default();
            Ok(named(resolve(root, &path.join(name), LastLink::Follow)?))
        }
        _ => Ok(named(found)),
    }
}

fn named(place: Place) -> (OwnedFd, OsString) {
    (place.parent, place.name)
}

/// What these files keep out could be secrets.
fn refuse_ignore_files(context: &Path) -> Result<(), BuildError> {
    match IGNORE_FILES.iter().map(|name| context.join(name)).find(|path| path.exists()) {
        Some(path) => Err(BuildError::IgnoreFile { path }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, fs::File, os::unix::fs::symlink};

    use super::*;

    struct Dirs(tempfile::TempDir);

    impl Dirs {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(dir.path().join("context/d/e")).unwrap();
            fs::create_dir_all(dir.path().join("root/there")).unwrap();
            fs::write(dir.path().join("context/f"), "f").unwrap();
            fs::write(dir.path().join("context/d/e/g"), "g").unwrap();
            Self(dir)
        }

        fn copy(&self, sources: &[&str], destination: &str) -> Result<Vec<String>, BuildError> {
            let root: OwnedFd = File::open(self.0.path().join("root")).unwrap().into();
            copy(
                &root,
                &Copied {
                    context: self.0.path().join("context"),
                    sources: sources.iter().map(|source| (*source).to_owned()).collect(),
                    destination: destination.to_owned(),
                    workdir: "/".to_owned(),
                },
            )
        }

        fn read(&self, path: &str) -> String {
            fs::read_to_string(self.0.path().join("root").join(path))
                .unwrap_or_else(|error| error.to_string())
        }
    }

    #[test]
    fn files_and_the_content_of_directories_are_copied() {
        let dirs = Dirs::new();
        dirs.copy(&["f"], "/new/name").unwrap();
        assert_eq!(dirs.read("new/name"), "f");
        dirs.copy(&["./f"], "/there").unwrap();
        dirs.copy(&["f"], "/made/").unwrap();
        assert_eq!((dirs.read("there/f"), dirs.read("made/f")), ("f".into(), "f".into()));
        dirs.copy(&["d"], "/there").unwrap();
        assert_eq!(dirs.read("there/e/g"), "g");
        dirs.copy(&["."], "/all").unwrap();
        assert_eq!((dirs.read("all/f"), dirs.read("all/d/e/g")), ("f".into(), "g".into()));
        dirs.copy(&["f", "d"], "/both/").unwrap();
        assert_eq!((dirs.read("both/f"), dirs.read("both/e/g")), ("f".into(), "g".into()));
    }

    #[test]
    fn nothing_outside_is_reached() {
        let dirs = Dirs::new();
        symlink("/etc/passwd", dirs.0.path().join("context/out")).unwrap();
        symlink(dirs.0.path(), dirs.0.path().join("root/link")).unwrap();
        for source in ["../root", "d/../../root", "out", "none", "*"] {
            assert!(dirs.copy(&[source], "/x").is_err(), "{source}");
        }
        // The link leads to a path in the container.
        let _ = dirs.copy(&["f"], "/link/leaked");
        assert!(!dirs.0.path().join("leaked").exists());
        assert!(dirs.copy(&["f", "d"], "/no-slash").is_err());
        fs::write(dirs.0.path().join("context/.dockerignore"), "f").unwrap();
        assert!(matches!(dirs.copy(&["."], "/x"), Err(BuildError::IgnoreFile { .. })));
        dirs.copy(&["f"], "/x").unwrap();
    }
}
