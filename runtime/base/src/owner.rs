//! Who this process works for: the host's root, or an ordinary user, as whom it is root of a user namespace.
//!
//! Under rootless Podman every process is root of such a namespace. It may do there what root may do, but with the files,
//! ids and devices of its user only. Directories of the host's root are not for it, so it has its own.

use std::{
    env, fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use nix::unistd::{Uid, User, geteuid};

use crate::fs::{FileError, create_private_dirs};

/// The user's number outside of the user namespace; None for the host's root.
static USER: LazyLock<Option<u32>> = LazyLock::new(|| {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    user_of(geteuid().as_raw(), &map)
});

/// The ordinary user for whom this process works, by the number outside of the user namespace; None for the host's root.
///
/// Only the initial user namespace maps all users (user_namespaces(7)). One that maps root to root, as that of a container
/// with the host's users, counts as the host's.
pub fn user() -> Option<u32> {
    *USER
}

fn user_of(uid: u32, map: &str) -> Option<u32> {
    let first: Vec<u32> = map.split_ascii_whitespace().take(2).filter_map(|word| word.parse().ok()).collect();
    match first[..] {
        [0, outside] if uid == 0 => (outside != 0).then_some(outside),
        _ => (uid != 0).then_some(uid),
    }
}

/// The directory of everything that is valid until the host reboots.
pub fn run_dir() -> &'static Path {
    static DIR: LazyLock<PathBuf> = LazyLock::new(|| match user() {
        None => crate::RUN_DIR.into(),
        Some(_) => {
            variable("XDG_RUNTIME_DIR").map_or_else(|| data_dir().join("run"), |dir| dir.join("machinen"))
        }
    });
    &DIR
}

/// The directory of everything that outlives a reboot.
pub fn data_dir() -> &'static Path {
    static DIR: LazyLock<PathBuf> = LazyLock::new(|| match user() {
        None => crate::DATA_DIR.into(),
        Some(user) => {
            let data = variable("XDG_DATA_HOME").unwrap_or_else(|| home(user).join(".local/share"));
            data.join("machinen")
        }
    });
    &DIR
}

/// The directory of the user's own configuration; None for the host's root, whose is `/etc`.
pub fn config_dir() -> Option<PathBuf> {
    let user = user()?;
    Some(variable("XDG_CONFIG_HOME").unwrap_or_else(|| home(user).join(".config")).join("machinen"))
}

/// Makes [`run_dir`], in which locks and sockets are, unless it exists already.
///
/// # Errors
/// It cannot be made, belongs to another user, or others may enter it.
pub fn make_run_dir() -> Result<(), FileError> {
    let dir = run_dir();
    create_private_dirs(dir).map_err(FileError::at("make the directory", dir))?;
    if user().is_none() {
        return Ok(());
    }
    let status = fs::symlink_metadata(dir).map_err(FileError::at("examine", dir))?;
    if !status.is_dir() || status.uid() != geteuid().as_raw() || status.mode() & 0o077 != 0 {
        let text = "it has to be a directory of this user that no other user may enter (mode 0700)";
        return Err(FileError::new("use", dir, io::Error::new(io::ErrorKind::PermissionDenied, text)));
    }
    Ok(())
}

/// An absolute path of the environment. Others are to be ignored (XDG Base Directory Specification).
fn variable(name: &str) -> Option<PathBuf> {
    env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// Callers such as Podman do not pass HOME to each command.
fn home(user: u32) -> PathBuf {
    let account = || User::from_uid(Uid::from_raw(user)).ok().flatten().map(|account| account.dir);
    variable("HOME").or_else(account).unwrap_or_else(|| format!("/var/tmp/machinen-{user}").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_namespace_that_maps_root_to_root_is_the_hosts() {
        let all = "         0          0 4294967295\n";
        assert_eq!((user_of(0, all), user_of(1001, all)), (None, Some(1001)));
        assert_eq!(user_of(0, "0 0 65536\n"), None);
        assert_eq!(user_of(0, "0 1001 1\n1 100000 65536\n"), Some(1001));
        assert_eq!((user_of(0, ""), user_of(7, "")), (None, Some(7)));
    }
}
