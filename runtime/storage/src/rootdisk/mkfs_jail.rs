//! What mke2fs may see, use and call: the trees that it copies are those of images and of containers.
//!
//! It gets the tree, the disk and its configuration as descriptors, and sees no other file of the host.

use std::{
    fs::File,
    io,
    os::unix::fs::{MetadataExt as _, fchown},
};

use machinen_base::process::{Jail, ReservedUser, ResourceLimits, RunAs, SystemCalls};

/// Far more than a tree of the largest size takes.
const CPU_SECONDS: u64 = 30 * 60;
/// The tree, a directory on each level of it, the file that is copied, and the disk.
const OPEN_FILES: u64 = 4096;

/// Reads files of any owner, and enters any directory (capabilities(7)).
const DAC_READ_SEARCH: u8 = 2;
/// Lists and reads the attributes `trusted.*` (xattr(7)).
const SYS_ADMIN: u8 = 21;

/// What mke2fs calls besides what every program does.
const CALLS: [i64; 12] = [
    libc::SYS_fallocate,
    libc::SYS_fchdir,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_sync_file_range,
];
/// FS_IOC_FIEMAP (linux/fs.h), which finds the holes of a file.
const FIEMAP: u32 = 0xc020_660b;

/// Whose files a run of mke2fs reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reads {
    /// Nothing but its configuration.
    Nothing,
    /// All files of a tree, with the attributes that every user can read.
    Tree,
    /// All files of a tree, with all attributes.
    TreeWithTrusted,
}

impl Reads {
    fn capabilities(self) -> Vec<u8> {
        match self {
            Self::Nothing => Vec::new(),
            Self::Tree => vec![DAC_READ_SEARCH],
            Self::TreeWithTrusted => vec![DAC_READ_SEARCH, SYS_ADMIN],
        }
    }
}

/// The restrictions of mke2fs, which writes a file of `size` bytes.
pub(super) fn jail(size: u64, reads: Reads, identity: RunAs) -> Jail {
    // The only thing that it asks of itself by this call is whether its environment can be relied on.
    let calls = SystemCalls::basic().and(&CALLS).and_requests(&[FIEMAP]).and_with_argument(
        libc::SYS_prctl,
        0,
        u64::MAX,
        libc::PR_GET_DUMPABLE as u64,
    );
    let limits = ResourceLimits {
        file_size: Some(size),
        open_files: Some(OPEN_FILES),
        processes: Some(1),
        locked_memory: Some(0),
        cpu_seconds: Some(CPU_SECONDS),
    };
    Jail {
        capabilities: Some(reads.capabilities()),
        limits,
        system_calls: Some(calls),
        ..Jail::strict(identity)
    }
}

/// Lends a file to a user, who can open it for writing meanwhile, although it is in a directory that the user cannot
/// enter and has no capability for files of others.
///
/// # Errors
/// Those of fchown(2), or of `work`.
pub(super) fn lent<T>(
    file: &File,
    user: &ReservedUser,
    work: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let owner = file.metadata()?;
    let RunAs { uid, gid, .. } = user.run_as(Vec::new());
    fchown(file, Some(uid), Some(gid))?;
    let result = work();
    fchown(file, Some(owner.uid()), Some(owner.gid()))?;
    result
}

#[cfg(test)]
mod tests {
    use std::fs;

    use machinen_base::process::{Spawn, Stdio, probe};

    use super::*;
    use crate::rootdisk::source_mount::SourceMount;

    #[test]
    fn a_taken_over_mke2fs_reaches_nothing_but_its_descriptors() {
        for (reads, kept) in
            [(Reads::Nothing, 0), (Reads::Tree, 1 << 2), (Reads::TreeWithTrusted, 1 << 2 | 1 << 21)]
        {
            let user = ReservedUser::reserve().unwrap();
            let jail = jail(1 << 20, reads, user.run_as(Vec::new()));
            assert_eq!(jail.system_calls.as_ref().unwrap().forbidden(), None);
            assert_eq!(probe(&jail, kept).unwrap(), Vec::<String>::new(), "{reads:?}");
        }
    }

    /// With the built-in commands of a shell, which are those of a program that was taken over.
    #[test]
    fn nothing_above_the_tree_is_reached_and_nothing_in_it_is_changed() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        fs::create_dir(&root).unwrap();
        fs::write(root.join("inside"), "").unwrap();
        fs::write(&outside, "").unwrap();
        let everyone = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        fs::set_permissions(&root, everyone).unwrap();
        std::os::unix::fs::symlink(&outside, root.join("link")).unwrap();
        let mount = SourceMount::of_dir(&root).unwrap();
        let user = ReservedUser::reserve().unwrap();
        let script = "cd /proc/self/fd/0/. && [ -e inside ] && echo reads; \
            for name in ../outside ../../etc/passwd link; do [ -e $name ] && echo $name; done; \
            echo x > new && echo writes; exit 0";
        let shell = Spawn::new("/bin/sh").args(["-c", script]).stdin(Stdio::Fd(mount.share().unwrap()));
        let jail = jail(1 << 20, Reads::TreeWithTrusted, user.run_as(Vec::new()));
        let output = shell.jail(jail).run().unwrap().success().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "reads\n");
    }

    #[test]
    fn a_file_is_lent_for_the_time_of_the_work_only() {
        let file = tempfile::tempfile().unwrap();
        let user = ReservedUser::reserve().unwrap();
        let owner = || file.metadata().map(|metadata| (metadata.uid(), metadata.gid()));
        let before = owner().unwrap();
        let lent_to = lent(&file, &user, owner).unwrap();
        assert_eq!(lent_to, (user.run_as(Vec::new()).uid, user.run_as(Vec::new()).gid));
        let failed: io::Result<()> = lent(&file, &user, || Err(io::ErrorKind::Other.into()));
        assert_eq!((failed.unwrap_err().kind(), owner().unwrap()), (io::ErrorKind::Other, before));
    }
}
