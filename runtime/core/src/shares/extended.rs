//! Requests whose replies tell the guest more than the library would.
//!
//! | request | what more |
//! |---|---|
//! | OPEN | whether the kernel keeps the data that it has of the file ([`kept`](super::kept)), whether it need say nothing at close(2), whether the file has capabilities |
//! | CREATE | the same |
//! | RELEASE, RELEASEDIR | there is no reply |
//! | READDIRPLUS | nothing more, but less while few descriptors are left ([`listing`](super::listing)) |
//!
//! | message of linux/fuse.h | content |
//! |---|---|
//! | fuse_open_in | the flags of open(2) 0..4, FUSE's own 4..8 |
//! | fuse_create_in | the flags 0..4, mode 4..8, umask 8..12, FUSE's own flags 12..16; then the name and a NUL |
//! | fuse_release_in | handle 0..8, flags 8..12 |
//! | fuse_open_out | handle 0..8, what the kernel may do 8..12, unused 12..16 |
//! | fuse_entry_out | node 0..8, lifetimes 16..40, attributes 40..128 |

use std::{ffi::CStr, io};

use fuse_backend_rs::{
    abi::fuse_abi::CreateIn,
    api::filesystem::{Context, Entry, FileSystem as _},
    passthrough::PassthroughFs,
};
use machinen_protocol::{
    fuse::{REPLY_HEADER, RequestHeader, opcode, refusal},
    shares::FOPEN_NO_CAPABILITIES,
};
use rustix::fs::{OFlags, fstatfs};

use super::{
    kept::{FileState, KeptData, closes_without_work, trusted_state},
    listing::{descriptors_are_scarce, names_only},
    reopen::reopen,
};

const FOPEN_KEEP_CACHE: u32 = 1 << 1;
const FOPEN_NOFLUSH: u32 = 1 << 5;

/// Answers these requests, and knows what the guest has of its files.
#[derive(Debug)]
pub(super) struct Extended {
    root: &'static str,
    kept: KeptData,
}

impl Extended {
    /// For files below the directory `root`.
    pub(super) fn new(root: &'static str) -> Self {
        Self { root, kept: KeptData::default() }
    }

    /// The reply to a request of a process of this user, without one if it has none; None if the library answers it.
    pub(super) fn answer(
        &self,
        files: &PassthroughFs,
        header: RequestHeader,
        user: (u32, u32),
        body: &[u8],
    ) -> Option<Vec<u8>> {
        let answered = match header.opcode {
            opcode::OPEN => self.open(files, header.node, body),
            opcode::CREATE => self.create(files, header.node, user, body),
            opcode::RELEASE | opcode::RELEASEDIR => {
                self.release(files, header, body);
                return Some(Vec::new());
            }
            opcode::READDIRPLUS if descriptors_are_scarce(io::stderr()) => {
                names_only(files, header.node, body)
            }
            opcode::READ => {
                self.uses(body);
                return None;
            }
            _ => return None,
        };
        Some(match answered {
            Ok(body) => {
                let length = (REPLY_HEADER + body.len()) as u32;
                [&length.to_le_bytes()[..], &[0; 4], &header.unique.to_le_bytes(), &body].concat()
            }
            Err(error) => refusal(header.unique, error.raw_os_error().unwrap_or(libc::EIO)).to_vec(),
        })
    }

    fn open(&self, files: &PassthroughFs, node: u64, body: &[u8]) -> io::Result<Vec<u8>> {
        let [flags, own] = words(body)?;
        let (handle, ..) = files.open(&Context::new(), node, flags, own)?;
        let handle = handle.unwrap_or_default();
        let may = self.cache(files, node, handle, flags) | self.close(files, node, flags);
        Ok(open_out(files, node, handle, may).to_vec())
    }

    fn create(
        &self,
        files: &PassthroughFs,
        directory: u64,
        (uid, gid): (u32, u32),
        body: &[u8],
    ) -> io::Result<Vec<u8>> {
        let [flags, mode, umask, own] = words(body)?;
        let name = name(body.get(16..).unwrap_or_default())?;
        let user = Context { uid, gid, ..Context::new() };
        let request = CreateIn { flags, mode, umask, fuse_flags: own };
        let (entry, handle, ..) = files.create(&user, directory, name, request)?;
        let may = self.close(files, entry.inode, flags);
        let mut out = entry_out(&entry);
        out.extend(open_out(files, entry.inode, handle.unwrap_or_default(), may));
        Ok(out)
    }

    fn release(&self, files: &PassthroughFs, header: RequestHeader, body: &[u8]) {
        self.uses(body);
        let Some(handle) = body.first_chunk().map(|handle| u64::from_le_bytes(*handle)) else { return };
        let context = Context::new();
        // An error says that there is no such handle. Nothing waits for it.
        drop(match header.opcode {
            opcode::RELEASEDIR => files.releasedir(&context, header.node, 0, handle),
            _ => files.release(&context, header.node, 0, handle, false, false, None),
        });
    }

    /// The guest reads from a handle or releases it: `body` is that of the request.
    fn uses(&self, body: &[u8]) {
        if let Some(handle) = body.first_chunk() {
            self.kept.has_dropped(u64::from_le_bytes(*handle));
        }
    }

    /// Whether the kernel keeps what it has of a file that has been opened. If it cannot be told, it does not.
    fn cache(&self, files: &PassthroughFs, node: u64, handle: u64, flags: u32) -> u32 {
        if !reads_only(flags) {
            return 0;
        }
        let Ok((attributes, _)) = files.getattr(&Context::new(), node, Some(handle)) else { return 0 };
        if self.kept.is_current(node, &FileState::of(&attributes)) {
            return FOPEN_KEEP_CACHE;
        }
        let again = reopen(files, self.root, node, OFlags::RDONLY | OFlags::NONBLOCK);
        if let Ok(Some(state)) = again.and_then(|file| trusted_state(&file)) {
            self.kept.drops(node, handle, state);
        }
        0
    }

    /// Whether the kernel may close the file without a word (FLUSH).
    fn close(&self, files: &PassthroughFs, node: u64, flags: u32) -> u32 {
        let without_work = || {
            let file = reopen(files, self.root, node, OFlags::PATH)?;
            Ok::<_, io::Error>(closes_without_work(fstatfs(&file)?.f_type))
        };
        if reads_only(flags) || without_work().unwrap_or(false) { FOPEN_NOFLUSH } else { 0 }
    }
}

fn reads_only(flags: u32) -> bool {
    flags & (libc::O_ACCMODE | libc::O_TRUNC) as u32 == libc::O_RDONLY as u32
}

/// The numbers at the beginning of a request's body.
fn words<const N: usize>(body: &[u8]) -> io::Result<[u32; N]> {
    let words = body.as_chunks::<4>().0.get(..N).ok_or_else(malformed)?;
    Ok(std::array::from_fn(|number| u32::from_le_bytes(words[number])))
}

fn name(body: &[u8]) -> io::Result<&CStr> {
    CStr::from_bytes_until_nul(body).map_err(|_| malformed())
}

fn malformed() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

fn open_out(files: &PassthroughFs, node: u64, handle: u64, may: u32) -> [u8; 16] {
    let capabilities = files.getxattr(&Context::new(), node, c"security.capability", 0);
    let known = match capabilities {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP)) => {
            FOPEN_NO_CAPABILITIES
        }
        _ => 0,
    };
    let mut out = [0; 16];
    out[..8].copy_from_slice(&handle.to_le_bytes());
    out[8..12].copy_from_slice(&(may | known).to_le_bytes());
    out
}

fn entry_out(entry: &Entry) -> Vec<u8> {
    let lifetimes = [entry.entry_timeout, entry.attr_timeout];
    let seconds = lifetimes.map(|lifetime| lifetime.as_secs().to_le_bytes());
    let nanoseconds = lifetimes.map(|lifetime| lifetime.subsec_nanos().to_le_bytes());
    let node = [entry.inode.to_le_bytes(), entry.generation.to_le_bytes()];
    [&node.concat()[..], &seconds.concat(), &nanoseconds.concat(), &attr(&entry.attr)].concat()
}

/// fuse_attr, 88 bytes.
fn attr(found: &libc::stat64) -> Vec<u8> {
    let long = [
        found.st_ino.cast_signed(),
        found.st_size,
        found.st_blocks,
        found.st_atime,
        found.st_mtime,
        found.st_ctime,
    ];
    let short = [
        found.st_atime_nsec as u32,
        found.st_mtime_nsec as u32,
        found.st_ctime_nsec as u32,
        found.st_mode,
        found.st_nlink as u32,
        found.st_uid,
        found.st_gid,
        found.st_rdev as u32,
        found.st_blksize as u32,
        0,
    ];
    let long = long.iter().flat_map(|number| number.to_le_bytes());
    long.chain(short.iter().flat_map(|number| number.to_le_bytes())).collect()
}

#[cfg(test)]
mod tests {
    use fuse_backend_rs::{api::filesystem::FsOptions, passthrough::Config};
    use machinen_protocol::fuse::ROOT;
    use nix::unistd::{getgid, getuid};

    use super::*;

    struct Served {
        _dir: tempfile::TempDir,
        files: PassthroughFs,
        extended: Extended,
    }

    impl Served {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let root: &'static str = Box::leak(dir.path().to_str().unwrap().into());
            let files =
                PassthroughFs::new(Config { root_dir: root.into(), xattr: true, ..Config::default() })
                    .unwrap();
            files.init(FsOptions::empty()).unwrap();
            Self { _dir: dir, files, extended: Extended::new(root) }
        }

        fn answer(&self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
            let header = RequestHeader { length: 40 + body.len(), opcode, unique: 7, node };
            let user = (getuid().as_raw(), getgid().as_raw());
            self.extended.answer(&self.files, header, user, body).unwrap()
        }

        fn create(&self, name: &str) -> Vec<u8> {
            let words = [libc::O_WRONLY as u32, 0o640, 0, 0].map(u32::to_le_bytes).concat();
            self.answer(opcode::CREATE, ROOT, &[&words[..], name.as_bytes(), b"\0"].concat())
        }
    }

    fn number(message: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(message[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn a_new_file_has_no_capabilities() {
        let served = Served::new();
        let created = served.create("file");
        assert_eq!(created.len(), REPLY_HEADER + 128 + 16);
        assert_eq!((number(&created, 0) as usize, number(&created, 8)), (created.len(), 7));
        let node = number(&created, 16);
        let (attributes, _) = served.files.getattr(&Context::new(), node, None).unwrap();
        assert_eq!(number(&created, 56), attributes.st_ino);
        assert_eq!(created[116..120], attributes.st_mode.to_le_bytes());
        assert_eq!(created[152..156], (FOPEN_NOFLUSH | FOPEN_NO_CAPABILITIES).to_le_bytes());

        let handle = number(&created, 144);
        assert!(served.answer(opcode::RELEASE, node, &handle.to_le_bytes()).is_empty());
        assert!(served.files.release(&Context::new(), node, 0, handle, false, false, None).is_err());
    }

    #[test]
    fn a_file_that_has_just_changed_is_not_kept() {
        let served = Served::new();
        let node = number(&served.create("file"), 16);
        for _ in 0..2 {
            let opened = served.answer(opcode::OPEN, node, &[0; 8]);
            assert_eq!(opened[24..28], (FOPEN_NOFLUSH | FOPEN_NO_CAPABILITIES).to_le_bytes());
            assert!(served.answer(opcode::RELEASE, node, &opened[16..24]).is_empty());
        }
    }

    #[test]
    fn failures_have_their_errno() {
        let served = Served::new();
        let failed = |errno: i32| refusal(7, errno).to_vec();
        assert_eq!(served.answer(opcode::OPEN, ROOT, &[0; 4]), failed(libc::EINVAL));
        assert_eq!(served.answer(opcode::CREATE, ROOT, &[0; 16]), failed(libc::EINVAL));
        assert_eq!(served.answer(opcode::OPEN, 99, &[0; 8]), failed(libc::EBADF));
        for name in ["a/b", ".."] {
            assert_eq!(served.create(name), failed(libc::EINVAL), "{name}");
        }
        assert!(served.answer(opcode::RELEASE, ROOT, b"short").is_empty());
    }
}
