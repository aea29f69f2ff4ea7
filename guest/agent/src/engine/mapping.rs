//! Shows a mounted file system again, with other owners of its files: those that a user namespace gives to the users inside
//! of it (mount_setattr(2), MOUNT_ATTR_IDMAP).
//!
//! The kernel takes the owners as a user namespace, and a namespace begins with a process. So this is done in a process of
//! its own, which has one more child for as long as the namespace is filled and opened.

use std::{
    fmt::Write as _,
    fs,
    io::{self, Read as _, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use machinen_protocol::error::chain;
use nix::{
    errno::Errno,
    sched::{CloneFlags, unshare},
    sys::wait::waitpid,
    unistd::{ForkResult, Pid, getpid},
};
use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    oci::{SpecError, items, number},
    report::{Report, Reporter},
};
use crate::sys;

/// Most ranges of ids, which a request has room for. Kubernetes and Docker use one or a few.
const MAX_RANGES: usize = 100;

/// The ids of a user namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IdMaps {
    uids: Vec<Range>,
    gids: Vec<Range>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Range {
    inside: u32,
    outside: u32,
    count: u32,
}

/// A file system that is to be shown with other owners.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct MapRequest {
    pub(super) source: PathBuf,
    pub(super) target: PathBuf,
    pub(super) ids: IdMaps,
}

#[derive(Debug, thiserror::Error)]
enum MappingError {
    #[error("cannot make a user namespace")]
    Namespace(#[source] io::Error),
    #[error("cannot set the ids of a user namespace")]
    Ids(#[source] io::Error),
    #[error("cannot show {path} with other owners")]
    Mount { path: PathBuf, source: io::Error },
}

impl IdMaps {
    /// The ids of the container's user namespace, by its OCI configuration.
    ///
    /// # Errors
    /// The configuration cannot be parsed, or has no ids or too many.
    pub(crate) fn of_config(config: &[u8]) -> Result<Self, SpecError> {
        let spec: Value = serde_json::from_slice(config).map_err(SpecError::Parse)?;
        let ranges = |what: &'static str| {
            let ranges: Vec<_> = items(&spec["linux"][what])
                .map(|map| Range {
                    inside: number(&map["containerID"]),
                    outside: number(&map["hostID"]),
                    count: number(&map["size"]),
                })
                .collect();
            match ranges.len() {
                1..=MAX_RANGES => Ok(ranges),
                count => Err(SpecError::IdRanges { what, count, most: MAX_RANGES }),
            }
        };
        Ok(Self { uids: ranges("uidMappings")?, gids: ranges("gidMappings")? })
    }
}

/// Does what is requested and ends the process.
pub(super) fn run(request: &MapRequest, reporter: &Reporter) -> ! {
    reporter.send(Report::Worker { pid: getpid().as_raw() });
    reporter.send(match map(request) {
        Ok(()) => Report::Mapped,
        Err(err) => Report::Failed { text: chain(&err) },
    });
    sys::exit_now(0)
}

fn map(MapRequest { source, target, ids }: &MapRequest) -> Result<(), MappingError> {
    let namespace = namespace(ids)?;
    let show = || -> io::Result<()> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let mount = open_tree(CWD, source, flags)?;
        sys::map_owners(mount.as_fd(), namespace.as_fd())?;
        Ok(move_mount(mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
    };
    show().map_err(|err| MappingError::Mount { path: source.clone(), source: err })
}

/// Makes a user namespace with these ids.
fn namespace(ids: &IdMaps) -> Result<OwnedFd, MappingError> {
    let failed = MappingError::Namespace;
    let (mut made, report) = io::pipe().map_err(failed)?;
    let (end, until) = io::pipe().map_err(failed)?;
    match sys::fork().map_err(|err| failed(err.into()))? {
        ForkResult::Child => {
            drop((made, until));
            wait_in_namespace(report, end)
        }
        ForkResult::Parent { child } => {
            drop((report, end));
            let errno = read_errno(&mut made).map_err(failed);
            let namespace = errno.and_then(|errno| match errno {
                0 => fill(child, ids).map_err(MappingError::Ids),
                errno => Err(failed(io::Error::from_raw_os_error(errno))),
            });
            // The child ends with the pipe.
            drop(until);
            waitpid(child, None).map_err(|err| failed(err.into()))?;
            namespace
        }
    }
}

fn read_errno(made: &mut io::PipeReader) -> io::Result<i32> {
    let mut bytes = [0; 4];
    made.read_exact(&mut bytes)?;
    Ok(i32::from_ne_bytes(bytes))
}

/// The child: enters a new namespace, reports that, and ends with the other end of a pipe.
fn wait_in_namespace(mut report: io::PipeWriter, mut end: io::PipeReader) -> ! {
    let made = unshare(CloneFlags::CLONE_NEWUSER).map_or_else(|err: Errno| err as i32, |()| 0);
    // The parent is gone if it does not read, and then the pipe ends.
    drop(report.write_all(&made.to_ne_bytes()));
    drop(end.read(&mut [0]));
    sys::exit_now(0)
}

fn fill(process: Pid, ids: &IdMaps) -> io::Result<OwnedFd> {
    let process = Path::new("/proc").join(process.to_string());
    fs::write(process.join("uid_map"), lines(&ids.uids))?;
    fs::write(process.join("gid_map"), lines(&ids.gids))?;
    Ok(fs::File::open(process.join("ns/user"))?.into())
}

/// The format of user_namespaces(7). The kernel takes it by one write.
fn lines(ranges: &[Range]) -> String {
    ranges.iter().fold(String::new(), |mut text, Range { inside, outside, count }| {
        writeln!(text, "{inside} {outside} {count}").expect("a String grows");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_the_configuration() {
        let config = r#"{"linux": {"uidMappings": [{"containerID": 0, "hostID": 65536, "size": 10}],
                        "gidMappings": [{"containerID": 1, "hostID": 7, "size": 2},
                                        {"containerID": 5, "hostID": 70, "size": 1}]}}"#;
        let ids = IdMaps::of_config(config.as_bytes()).unwrap();
        assert_eq!((lines(&ids.uids), lines(&ids.gids)), ("0 65536 10\n".into(), "1 7 2\n5 70 1\n".into()));
        let error = IdMaps::of_config(br#"{"linux": {}}"#).unwrap_err();
        assert_eq!(error.to_string(), "linux.uidMappings has 0 ranges of ids; 1 to 100 are possible");
    }
}
