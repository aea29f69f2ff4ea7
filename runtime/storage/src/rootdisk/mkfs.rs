//! Finds mke2fs, checks its version, and runs it with arguments that make its result independent of the host.

use std::{
    env,
    ffi::OsStr,
    fs::File,
    io::{self, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use machinen_base::{
    fs::FileError,
    process::{ProcessError, ReservedUser, Spawn, Stdio, ToolOutput},
    space::DiskReserve,
};
use rustix::fs::{MemfdFlags, memfd_create};

use super::{
    RootdiskError,
    ext4::{BLOCK, INODE},
    mkfs_jail::{self, Reads},
    space_of,
};

/// The environment variable that overrides the configured program.
pub const MKE2FS_VARIABLE: &str = "MACHINEN_MKE2FS";

/// The first version that copies in sorted order, with the root's extended attributes, from any file system.
const LEAST: (u32, u32) = (1, 46);
/// Debian's directory of mke2fs, which may be missing in the PATH of a service or an unprivileged shell.
const SYSTEM_DIRS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Settings that are not arguments come from a configuration file: from this one, not from the host's. It has
/// only the sections that mke2fs requires for the types of file systems that it guesses.
const CONFIG: &str = "[fs_types]\n ext2 = {\n  blocksize = 4096\n }\n ext3 = {\n  blocksize = 4096\n }\n machinen = {\n  \
                      blocksize = 4096\n }\n";
const COMMON: [(&str, &str); 5] = [
    ("MKE2FS_CONFIG", "/proc/self/fd/4"),
    // It sees no mounts that the disk could be one of.
    ("EXT2FS_NO_MTAB_OK", "1"),
    ("E2FSPROGS_FAKE_TIME", "1"),
    ("SOURCE_DATE_EPOCH", "1"),
    ("LC_ALL", "C"),
];
/// Read-only in the guest: no journal, no checksums to keep, no room to grow.
const BASE: &str = "none,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super,large_file,huge_file,dir_nlink,\
                    extra_isize";
const WRITABLE: &str = "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,\
                        huge_file,dir_nlink,extra_isize,metadata_csum";
const UUID: &str = "6d616368-696e-656e-8000-000000000001";
const HASH_SEED: &str = "6d616368-696e-656e-8000-000000000002";

/// The program, whose version has been checked.
#[derive(Debug)]
pub(crate) struct Mke2fs {
    program: PathBuf,
    pub(crate) version: String,
}

/// A tree that is copied to a new file system.
#[derive(Debug)]
pub(crate) struct CopiedTree {
    /// The root of a mount, so that no path leads from it to the host's other files.
    pub(crate) root: OwnedFd,
    /// The number of files that the file system has room for.
    pub(crate) inodes: u64,
    /// The number of bytes that the disk will take, for the error of a full file system.
    pub(crate) needed: u64,
    /// Whether files may have attributes `trusted.*`. They are copied only then, since reading them takes a privilege.
    pub(crate) has_trusted: bool,
}

impl CopiedTree {
    fn reads(&self) -> Reads {
        if self.has_trusted { Reads::TreeWithTrusted } else { Reads::Tree }
    }
}

/// One run of the program.
struct Run<'a> {
    args: &'a [&'a str],
    /// More of the option -E, with a comma before it.
    extended: &'a str,
    reads: Reads,
    /// As of [`CopiedTree`].
    needed: u64,
}

/// The version of the mke2fs that would be used. Blocks.
///
/// # Errors
/// mke2fs is missing or too old.
pub fn mke2fs_version(configured: &Path) -> Result<String, RootdiskError> {
    Mke2fs::find(configured).map(|mke2fs| mke2fs.version)
}

impl Mke2fs {
    /// Finds `configured` (a path, or a name in PATH or the system's directories) and checks its version.
    ///
    /// # Errors
    /// mke2fs is missing or too old.
    pub(crate) fn find(configured: &Path) -> Result<Self, RootdiskError> {
        let named = env::var_os(MKE2FS_VARIABLE).map_or_else(|| configured.to_owned(), PathBuf::from);
        let missing = || RootdiskError::NoMke2fs { program: named.display().to_string() };
        let program = locate(&named).ok_or_else(missing)?;
        let output = match Spawn::new(&program).args(["-V"]).run() {
            Ok(output) => output,
            Err(ProcessError::NotFound { .. }) => return Err(missing()),
            Err(source) => return Err(RootdiskError::Mke2fs { dir: PathBuf::from("/"), source }),
        };
        let text = String::from_utf8_lossy(&output.stderr);
        let version = text.split_whitespace().nth(1).unwrap_or("unknown").to_owned();
        if parse(&version).is_none_or(|version| version < LEAST) {
            let (program, least) = (program.display().to_string(), format!("{}.{}", LEAST.0, LEAST.1));
            return Err(RootdiskError::OldMke2fs { program, found: version, least });
        }
        Ok(Self { program, version })
    }

    /// Makes `image` the disk of a tree. The disk gets the length of `image`.
    pub(super) fn base(&self, tree: CopiedTree, image: &File, dir: &Path) -> Result<(), RootdiskError> {
        let inodes = tree.inodes.to_string();
        let args = ["-N", &inodes, "-O", BASE, "-L", "machinen-base", "-d", "/proc/self/fd/0/."];
        let run = Run { args: &args, extended: "", reads: tree.reads(), needed: tree.needed };
        self.run(run, Stdio::Fd(tree.root), image, dir)
    }

    /// Makes `image`, which is `size` bytes long, an empty file system with a journal. The guest has nothing
    /// to initialise: the parts of a sparse file that were not written are zero.
    pub(crate) fn writable(&self, image: &File, size: u64, dir: &Path) -> Result<(), RootdiskError> {
        let mut args = vec!["-O", WRITABLE, "-L", "machinen-rw", "-i", "16384"];
        // All blocks of the journal are in use sooner or later, so it is only as large as performance
        // requires. mke2fs gives small file systems less.
        if size >= 1 << 30 {
            args.extend(["-J", "size=32"]);
        }
        let run =
            Run { args: &args, extended: ",lazy_journal_init=1", reads: Reads::Nothing, needed: 1 << 20 };
        self.run(run, Stdio::Null, image, dir)
    }

    /// Makes `image` like [`Mke2fs::writable`], with a tree in it. It has no checksums, so
    /// that the tree's times can be corrected afterwards.
    pub(crate) fn seeded(&self, tree: CopiedTree, image: &File, dir: &Path) -> Result<(), RootdiskError> {
        let (features, inodes) = (format!("{BASE},has_journal"), tree.inodes.to_string());
        let args =
            ["-N", &inodes, "-O", &features, "-L", "machinen-rw", "-J", "size=32", "-d", "/proc/self/fd/0/."];
        let (reads, needed) = (tree.reads(), tree.needed);
        let run = Run { args: &args, extended: ",lazy_journal_init=1", reads, needed };
        self.run(run, Stdio::Fd(tree.root), image, dir)
    }

    fn run(&self, run: Run<'_>, stdin: Stdio, image: &File, dir: &Path) -> Result<(), RootdiskError> {
        let failed = |source: io::Error| FileError::new("write to", dir, source);
        let (block, inode) = (BLOCK.to_string(), INODE.to_string());
        let extended = format!("hash_seed={HASH_SEED},root_owner=0:0{}", run.extended);
        let size = image.metadata().map_err(failed)?.len();
        let user = ReservedUser::reserve()?;
        let mut spawn = Spawn::new(&self.program)
            .args([
                "-q", "-F", "-T", "machinen", "-b", &block, "-I", &inode, "-m", "0", "-G", "16", "-U", UUID,
            ])
            .args(["-o", "Linux", "-E", &extended])
            .args(run.args)
            .args(["/proc/self/fd/3"])
            .stdin(stdin)
            .jail(mkfs_jail::jail(size, run.reads, user.run_as(Vec::new())))
            .fd(image.try_clone().map_err(failed)?.into(), 3)
            .fd(config().map_err(failed)?.into(), 4);
        for (key, value) in COMMON {
            spawn = spawn.env(key, value);
        }
        let ran = mkfs_jail::lent(image, &user, || Ok(spawn.run().and_then(ToolOutput::success)));
        let Err(source) = ran.map_err(failed)? else { return Ok(()) };
        let full = matches!(&source, ProcessError::Failed { stderr, .. } if stderr.contains("No space left"));
        match space_of(DiskReserve::default(), image, dir) {
            Ok(space) if full || space.free == 0 => {
                Err(RootdiskError::NoSpace { dir: dir.to_owned(), needed: run.needed, space })
            }
            _ => Err(RootdiskError::Mke2fs { dir: dir.to_owned(), source }),
        }
    }
}

fn config() -> io::Result<File> {
    let mut file = File::from(memfd_create("mke2fs.conf", MemfdFlags::CLOEXEC)?);
    file.write_all(CONFIG.as_bytes())?;
    Ok(file)
}

fn locate(named: &Path) -> Option<PathBuf> {
    if named.components().count() > 1 {
        return Some(named.to_owned());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = env::split_paths(&path).chain(SYSTEM_DIRS.iter().map(PathBuf::from));
    dirs.map(|dir| dir.join(named)).find(|path| path.is_file() && path.file_name() == Some(OsStr::new(named)))
}

/// `1.47.0`, `1.47.2-rc1`
fn parse(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split(['.', '-']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(parse("1.47.0"), Some((1, 47)));
        assert_eq!(parse("2.0-rc1"), Some((2, 0)));
        assert_eq!(parse("unknown"), None);
        assert!(parse("1.5").unwrap() < LEAST && parse("1.100").unwrap() > LEAST);
    }
}
