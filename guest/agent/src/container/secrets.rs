//! Secrets of a container: small files in a tmpfs, so that they are on no disk.
//!
//! ```text
//!   <dir>/secrets   tmpfs in the VM, to which the agent writes
//!   /run/secrets    the same file system in the container, from its first secret on
//! ```
//! To CRIU the mount is an external one, whose files it does not look at (`criu/mounts.rs`). A restored container has an
//! empty tmpfs there.

use std::{
    fs::{self, File, Permissions},
    io,
    io::Write as _,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown},
    },
    path::{Path, PathBuf},
    thread,
};

use machinen_protocol::{
    api::{Secret, SetSecretsRequest},
    error::{ErrorKind, HasKind},
    secrets::{self, SECRETS, SecretError},
};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    unistd::Pid,
};
use pathrs::Root;
use rustix::{
    fs::{CWD, StatxAttributes, StatxFlags, statx},
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};
use tokio::sync::oneshot;

use super::{Container, ContainerError};
use crate::{criu::SECRETS_DIR, process::ProcessError};

/// Everyone may search it; each file has an owner. The size bounds what a container can keep there.
const OPTIONS: &str = "mode=0755,size=4m,nr_inodes=1k";
/// Only the user of the container's command may read a secret.
const MODE: u32 = 0o400;
/// The end of the name of a file that is not complete. It is no name of a secret.
const NEW: &str = ".new";

#[derive(Debug, thiserror::Error)]
pub(crate) enum SecretsError {
    #[error(transparent)]
    Invalid(#[from] SecretError),
    #[error("{SECRETS} of the container is not empty; secrets would hide what is there")]
    Occupied,
    #[error("cannot find {SECRETS} in the container")]
    Find(#[source] Box<pathrs::error::Error>),
    #[error("cannot {what} {path}")]
    File { what: &'static str, path: PathBuf, source: io::Error },
    #[error("a thread that mounts the secrets has ended early")]
    Thread,
}

impl SecretsError {
    fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { what, path, source }
    }
}

impl HasKind for SecretsError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid(_) => ErrorKind::InvalidArgument,
            Self::Occupied | Self::Find(_) => ErrorKind::FailedPrecondition,
            Self::File { source, .. } => ErrorKind::of_io(source),
            Self::Thread => ErrorKind::Internal,
        }
    }
}

impl Container {
    /// Writes and removes secrets. All are written or none.
    ///
    /// # Errors
    /// A secret is not valid or does not fit, the container has ended, or has something else in their place.
    pub(crate) async fn set_secrets(&self, request: SetSecretsRequest) -> Result<(), ContainerError> {
        for secret in &request.secrets {
            secrets::check(&secret.name, &secret.value).map_err(SecretsError::from)?;
        }
        for name in &request.removed {
            secrets::check_name(name).map_err(SecretsError::from)?;
        }
        if self.init.has_exited() {
            return Err(ProcessError::Finished.into());
        }
        // One call after the other.
        let _turn = self.secrets.lock().await;
        let (dir, init, owner) = (self.dir.join(SECRETS_DIR), self.init.pid(), self.owner);
        // Not on the main thread, which may serve what is mounted in the container.
        let (sender, done) = oneshot::channel();
        thread::spawn(move || sender.send(set(&dir, init, owner, &request)));
        Ok(done.await.unwrap_or(Err(SecretsError::Thread))?)
    }
}

fn set(dir: &Path, init: Pid, owner: u32, request: &SetSecretsRequest) -> Result<(), SecretsError> {
    if !request.secrets.is_empty() {
        mount_tmpfs(dir)?;
        // In a thread of its own, since it enters the container's mount namespace.
        let shown = dir.to_owned();
        thread::spawn(move || show(&shown, init)).join().map_err(|_| SecretsError::Thread)??;
    }
    write(dir, owner, &request.secrets)?;
    for name in &request.removed {
        let path = dir.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(SecretsError::file("remove", &path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Mounts the tmpfs in the VM, unless it is there.
///
/// # Errors
/// Those of mount(2).
pub(crate) fn mount_tmpfs(dir: &Path) -> Result<(), SecretsError> {
    if is_mounted(dir)? {
        return Ok(());
    }
    fs::create_dir_all(dir).map_err(SecretsError::file("create", dir))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let mounted = mount(Some("secrets"), dir, Some("tmpfs"), flags, Some(OPTIONS));
    mounted.map_err(|errno| SecretsError::file("mount", dir)(errno.into()))
}

/// Whether the tmpfs is mounted in the VM.
fn is_mounted(dir: &Path) -> Result<bool, SecretsError> {
    match statx(CWD, dir, rustix::fs::AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE) {
        Ok(status) => Ok(status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(rustix::io::Errno::NOENT) => Ok(false),
        Err(errno) => Err(SecretsError::file("look up", dir)(errno.into())),
    }
}

/// Unmounts the tmpfs, with all secrets, and removes its mount point. May be called again.
///
/// # Errors
/// Those of umount2(2).
pub(super) fn unmount(dir: &Path) -> Result<(), SecretsError> {
    match umount2(dir, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(errno) => return Err(SecretsError::file("unmount", dir)(errno.into())),
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(SecretsError::file("remove", dir)(error))
        }
        _ => Ok(()),
    }
}

/// Mounts the tmpfs in the container as well, unless it is there. The thread is in the container's mount namespace
/// afterwards, and must end.
fn show(dir: &Path, init: Pid) -> Result<(), SecretsError> {
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |errno: Errno| SecretsError::File { what, path, source: errno.into() }
    };
    let process = Path::new("/proc").join(init.to_string());
    let root = rustix::fs::open(
        process.join("root"),
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    );
    let root = root.map_err(|errno| SecretsError::file("open", &process)(errno.into()))?;
    let place = Root::from_fd(root).mkdir_all(SECRETS, &Permissions::from_mode(0o755));
    let place: OwnedFd = place.map_err(|source| SecretsError::Find(Box::new(source)))?.into();
    let device = |path: &Path| fs::metadata(path).map(|status| status.dev());
    let there = by_descriptor(&place);
    let own = device(dir).map_err(SecretsError::file("look up", dir))?;
    if device(&there).map_err(SecretsError::file("look up", Path::new(SECRETS)))? == own {
        return Ok(());
    }
    let is_empty = fs::read_dir(&there).map(|mut entries| entries.next().is_none());
    if !is_empty.map_err(SecretsError::file("list", Path::new(SECRETS)))? {
        return Err(SecretsError::Occupied);
    }
    let tree = open_tree(CWD, dir, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC);
    let tree = tree.map_err(|errno| SecretsError::file("open the mount", dir)(errno.into()))?;
    let namespace = process.join("ns/mnt");
    let theirs = File::open(&namespace).map_err(SecretsError::file("open", &namespace))?;
    // The kernel refuses a namespace for a thread that shares its root with others.
    unshare(CloneFlags::CLONE_FS).map_err(failed("leave the root of", dir))?;
    setns(theirs, CloneFlags::CLONE_NEWNS).map_err(failed("enter", &namespace))?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree.as_fd(), "", place.as_fd(), "", flags)
        .map_err(|errno| SecretsError::file("mount", Path::new(SECRETS))(errno.into()))
}

fn by_descriptor(fd: &OwnedFd) -> PathBuf {
    use std::os::fd::AsRawFd as _;
    // The number means the same in each thread.
    Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string())
}

/// Writes all files before the first one gets its name.
fn write(dir: &Path, owner: u32, secrets: &[Secret]) -> Result<(), SecretsError> {
    let new = |secret: &Secret| dir.join(format!("{}{NEW}", secret.name));
    let written = secrets.iter().try_for_each(|secret| {
        let path = new(secret);
        write_one(&path, owner, &secret.value).map_err(SecretsError::file("write", &dir.join(&secret.name)))
    });
    for secret in secrets {
        let path = new(secret);
        if written.is_err() {
            // The first failure is reported. Those that were not written do not exist.
            let _ = fs::remove_file(&path);
            continue;
        }
        fs::rename(&path, dir.join(&secret.name)).map_err(SecretsError::file("rename", &path))?;
    }
    written
}

fn write_one(path: &Path, owner: u32, value: &[u8]) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(value)?;
    fchown(&file, Some(owner), None)?;
    file.set_permissions(Permissions::from_mode(MODE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(name: &str, value: &str) -> Secret {
        Secret { name: name.to_owned(), value: value.as_bytes().to_vec(), ..Default::default() }
    }

    #[test]
    fn all_secrets_are_written_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let own = fs::metadata(dir.path()).unwrap().uid();
        write(dir.path(), own, &[secret("A", "1"), secret("B", "2")]).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("B")).unwrap(), "2");
        assert_eq!(fs::metadata(dir.path().join("A")).unwrap().mode() & 0o7777, MODE);
        write(dir.path(), own, &[secret("A", "3")]).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("A")).unwrap(), "3");
        // The second one is in the way of itself.
        assert!(write(dir.path(), own, &[secret("C", "1"), secret("C", "2")]).is_err());
        assert!(!dir.path().join("C").exists() && !dir.path().join("C.new").exists());
    }
}
