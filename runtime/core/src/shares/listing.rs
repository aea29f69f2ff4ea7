//! Listings of directories while few descriptors are left.
//!
//! The guest's kernel asks for the attributes of all names that it lists, since programs ask for them next. The server
//! has a descriptor for each file that it has told the kernel of, so a program that lists many large directories would
//! take them from those that open files. Beyond half of what the server may have, a listing has names only.
//!
//! | message of linux/fuse.h | content |
//! |---|---|
//! | fuse_read_in | handle 0..8, offset 8..16, size 16..20 |
//! | fuse_direntplus | fuse_entry_out, which is zero here, then the inode 0..8, offset 8..16, length of the name 16..20, type 20..24, the name; a multiple of 8 bytes |

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

use fuse_backend_rs::{
    api::filesystem::{Context, DirEntry, FileSystem as _},
    passthrough::PassthroughFs,
};
use machinen_protocol::shares::MAX_DATA;
use rustix::{
    io::fcntl_dupfd_cloexec,
    process::{Resource, getrlimit},
};

const ENTRY: usize = 128;
const DIRENT: usize = 24;

/// Whether more than half of the descriptors are in use. `any`: an open descriptor.
pub(super) fn descriptors_are_scarce(any: impl AsFd) -> bool {
    let Some(most) = getrlimit(Resource::Nofile).current else { return false };
    // The kernel gives the lowest number that is free.
    match fcntl_dupfd_cloexec(any, 0) {
        Ok(lowest) => u64::from(lowest.as_raw_fd().unsigned_abs()) > most / 2,
        Err(_) => true,
    }
}

/// The body of a reply to READDIRPLUS that tells the kernel of no file.
///
/// # Errors
/// The request is malformed, or the directory cannot be read.
pub(super) fn names_only(files: &PassthroughFs, node: u64, body: &[u8]) -> io::Result<Vec<u8>> {
    let number = |at: usize| body.get(at..at + 8)?.as_array().copied().map(u64::from_le_bytes);
    let (Some(handle), Some(offset), Some(size)) = (number(0), number(8), number(16)) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    let size = (size as u32).min(MAX_DATA as u32);
    let mut listing = Vec::new();
    files.readdir(&Context::new(), node, handle, size, offset, &mut |entry| {
        let length = (ENTRY + DIRENT + entry.name.len()).next_multiple_of(8);
        if listing.len() + length > size as usize {
            return Ok(0);
        }
        append(&mut listing, &entry, length);
        Ok(length)
    })?;
    Ok(listing)
}

fn append(listing: &mut Vec<u8>, entry: &DirEntry<'_>, length: usize) {
    let end = listing.len() + length;
    listing.resize(listing.len() + ENTRY, 0);
    listing.extend(entry.ino.to_le_bytes());
    listing.extend(entry.offset.to_le_bytes());
    listing.extend((entry.name.len() as u32).to_le_bytes());
    listing.extend(entry.type_.to_le_bytes());
    listing.extend(entry.name);
    listing.resize(end, 0);
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs::File};

    use fuse_backend_rs::{api::filesystem::FsOptions, passthrough::Config};

    use super::*;

    #[test]
    fn all_names_are_listed_in_pieces_and_no_file_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let names: BTreeSet<_> = (0..100).map(|number| format!("file-{number}")).collect();
        for name in &names {
            File::create(dir.path().join(name)).unwrap();
        }
        let root_dir = dir.path().to_str().unwrap().to_owned();
        let files = PassthroughFs::new(Config { root_dir, ..Config::default() }).unwrap();
        files.init(FsOptions::empty()).unwrap();
        let (handle, _) = files.opendir(&Context::new(), 1, 0).unwrap();
        let (mut seen, mut offset) = (BTreeSet::new(), 0_u64);
        loop {
            let body = [handle.unwrap().to_le_bytes(), offset.to_le_bytes(), 4096_u64.to_le_bytes()].concat();
            let listing = names_only(&files, 1, &body).unwrap();
            assert!(listing.len() <= 4096);
            let mut rest = listing.as_slice();
            while !rest.is_empty() {
                assert_eq!(rest[..ENTRY], [0; ENTRY]);
                let entry = &rest[ENTRY..];
                offset = u64::from_le_bytes(entry[8..16].try_into().unwrap());
                let length = u32::from_le_bytes(entry[16..20].try_into().unwrap()) as usize;
                let name = String::from_utf8(entry[DIRENT..DIRENT + length].to_vec()).unwrap();
                assert!(seen.insert(name.clone()), "{name} twice");
                rest = &rest[(ENTRY + DIRENT + length).next_multiple_of(8)..];
            }
            if listing.is_empty() {
                break;
            }
        }
        assert_eq!(seen, names);
        assert!(names_only(&files, 1, &[0; 20]).is_err());
    }

    #[test]
    fn descriptors_are_counted() {
        let file = tempfile::tempfile().unwrap();
        assert!(!descriptors_are_scarce(&file));
    }
}
