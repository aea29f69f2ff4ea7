//! ID-mapped volumes: the files of a user on the host are those of another user in the guest (mount_setattr(2)).
//!
//! The kernel takes a mapping as a user namespace that has it, and a namespace begins with a process. So a process is started
//! that does nothing, and ended as soon as its namespace is open.

use std::{fmt::Write as _, fs, io, os::fd::OwnedFd, thread};

use machinen_base::{
    process::{Jail, Namespaces},
    reexec::EntryPoint,
};
use rustix::fs::{CWD, Mode, OFlags, openat};

use super::ShareError;
use crate::spec::volumes::{IdMapping, IdMappings};

/// The process whose user namespace has a mapping; it waits until it is killed.
pub const MAPPING_ENTRY_POINT: EntryPoint = EntryPoint {
    name: "id-mapping",
    main: |_| loop {
        thread::park();
    },
};

/// Makes a user namespace with these mappings.
///
/// # Errors
/// The process cannot be started, or the kernel refuses the mappings.
pub(super) async fn namespace(mappings: &IdMappings) -> Result<OwnedFd, ShareError> {
    let namespaces = Namespaces { user: true, ..Namespaces::default() };
    let jail = Jail { namespaces, ..Jail::default() };
    let process = MAPPING_ENTRY_POINT.spawn().jail(jail).start().map_err(ShareError::Mapper)?;
    let made = fill(process.pid(), mappings);
    process.kill().await.map_err(ShareError::Mapper)?;
    made.map_err(ShareError::Mappings)
}

fn fill(pid: u32, mappings: &IdMappings) -> io::Result<OwnedFd> {
    fs::write(format!("/proc/{pid}/uid_map"), lines(&mappings.uids))?;
    fs::write(format!("/proc/{pid}/gid_map"), lines(&mappings.gids))?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(openat(CWD, format!("/proc/{pid}/ns/user"), flags, Mode::empty())?)
}

/// The format of user_namespaces(7). The kernel takes it by one write.
fn lines(mappings: &[IdMapping]) -> String {
    mappings.iter().fold(String::new(), |mut text, IdMapping { source, shown, count }| {
        writeln!(text, "{source} {shown} {count}").expect("a String grows");
        text
    })
}
