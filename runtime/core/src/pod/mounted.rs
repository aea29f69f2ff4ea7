//! Finds the overlay that a caller has mounted at the root of a container, as dockerd does.
//!
//! A mounted overlay is of no use to a VM, but its directories are: the lower ones have the image, and the upper one gets
//! what the container writes. The kernel lists them in /proc/self/mountinfo (proc_pid_mountinfo(5)).

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

use super::rootfs::RootfsMount;

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// The overlay that is mounted at `root`, as a caller would describe it. None: another file system, or no mount.
///
/// # Errors
/// The path does not exist, or /proc is not mounted.
pub(super) fn overlay_at(root: &Path) -> io::Result<Option<RootfsMount>> {
    let root = fs::canonicalize(root)?;
    Ok(find(&fs::read(MOUNTINFO)?, &root))
}

/// Whether the file system that is mounted last at `point` is of this type. `point` has no links, and is not accessed.
///
/// # Errors
/// /proc is not mounted.
pub(super) fn is_of_type(point: &Path, kind: &str) -> io::Result<bool> {
    let mountinfo = fs::read(MOUNTINFO)?;
    Ok(last_at(&mountinfo, point).is_some_and(|mount| mount.kind == kind.as_bytes()))
}

/// The last mount at the path covers the others.
fn last_at<'a>(mountinfo: &'a [u8], point: &Path) -> Option<MountLine<'a>> {
    mountinfo.split(|&byte| byte == b'\n').filter_map(MountLine::parse).rfind(|mount| mount.point == point)
}

fn find(mountinfo: &[u8], root: &Path) -> Option<RootfsMount> {
    let mount = last_at(mountinfo, root).filter(|mount| mount.kind == b"overlay")?;
    let options: Vec<_> = mount.options.split(|&byte| byte == b',').filter_map(option).collect();
    let options = absolute(options, root)?;
    Some(RootfsMount { kind: "overlay".to_owned(), source: "overlay".into(), options })
}

#[derive(Debug)]
struct MountLine<'a> {
    point: PathBuf,
    kind: &'a [u8],
    /// Those of the file system, not those of the mount.
    options: &'a [u8],
}

impl<'a> MountLine<'a> {
    /// `id parent device root point options fields... - kind source options`.
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut fields = line.split(|&byte| byte == b' ');
        let point = fields.nth(4)?;
        let mut rest = fields.skip_while(|&field| field != b"-").skip(1);
        let (kind, options) = (rest.next()?, rest.nth(1)?);
        Some(Self { point: OsString::from_vec(unescape(point)).into(), kind, options })
    }
}

fn option(option: &[u8]) -> Option<String> {
    String::from_utf8(unescape(option)).ok()
}

/// The kernel shows some bytes as a backslash and three octal digits.
fn unescape(text: &[u8]) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::new(), text);
    while let Some((&first, others)) = rest.split_first() {
        let digits = others.first_chunk::<3>().filter(|_| first == b'\\');
        let code = digits.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                rest = &others[3..];
            }
            None => {
                bytes.push(first);
                rest = others;
            }
        }
    }
    bytes
}

/// dockerd mounts an overlay of many layers by relative paths, from the directory that has a directory for each layer
/// and container: `CONTAINER/merged` is the root then, and `CONTAINER/diff` the upper directory. Returns None if that is
/// not how the paths are meant.
fn absolute(options: Vec<String>, root: &Path) -> Option<Vec<String>> {
    let upper = options.iter().find_map(|option| option.strip_prefix("upperdir=")).unwrap_or("/");
    if Path::new(upper).is_absolute() {
        return Some(options);
    }
    let container = root.parent()?;
    let home = container.parent()?;
    if home.join(upper).parent() != Some(container) {
        return None;
    }
    let home = home.to_str()?;
    let complete = |option: String| match option.split_once('=') {
        Some((name @ ("upperdir" | "workdir"), path)) => format!("{name}={home}/{path}"),
        Some((name @ "lowerdir", paths)) => {
            let paths: Vec<_> = paths.split(':').map(|path| Path::new(home).join(path)).collect();
            let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
            format!("{name}={}", paths.join(":"))
        }
        _ => option,
    };
    Some(options.into_iter().map(complete).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(mountinfo: &str, root: &str) -> Option<Vec<String>> {
        find(mountinfo.as_bytes(), Path::new(root)).map(|mount| mount.options)
    }

    #[test]
    fn the_last_mount_at_the_path_counts() {
        let text = "22 1 0:21 / / rw - ext4 /dev/vda rw\n\
                    40 22 0:50 / /c/merged rw,relatime - tmpfs none rw\n\
                    41 40 0:51 / /c/merged rw,relatime shared:7 master:1 - overlay overlay \
                    rw,lowerdir=/l/a\\054b:/l/c\\040d,upperdir=/c/diff,workdir=/c/work,index=off\n\
                    42 22 0:52 / /d rw - overlay overlay rw,lowerdir=/x\n";
        let wanted = ["rw", "lowerdir=/l/a,b:/l/c d", "upperdir=/c/diff", "workdir=/c/work", "index=off"];
        assert_eq!(options(text, "/c/merged").unwrap(), wanted);
        assert_eq!(options(text, "/d").unwrap(), ["rw", "lowerdir=/x"]);
        assert_eq!(options(text, "/"), None);
        assert_eq!(options(text, "/none"), None);
        let covered = format!("{text}43 42 0:53 / /d rw - tmpfs none rw\n");
        assert_eq!(options(&covered, "/d"), None);
        assert_eq!(options("nonsense\n\n1 2 3", "/d"), None);
    }

    #[test]
    fn relative_paths_are_dockers() {
        let line =
            "9 1 0:9 / /o/C/merged rw - overlay overlay rw,lowerdir=l/A:l/B,upperdir=C/diff,workdir=C/work";
        let wanted = ["rw", "lowerdir=/o/l/A:/o/l/B", "upperdir=/o/C/diff", "workdir=/o/C/work"];
        assert_eq!(options(line, "/o/C/merged").unwrap(), wanted);
        assert_eq!(options(&line.replace("/o/C/merged", "/elsewhere/D/merged"), "/elsewhere/D/merged"), None);
    }
}
