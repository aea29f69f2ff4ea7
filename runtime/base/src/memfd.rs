//! Memory files, and how they are made unchangeable (memfd_create(2), fcntl(2)).

use std::{
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt as _,
    },
};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};

/// The seals that prevent every change of content and size, also through a mapping.
const SEALED: SealFlag = SealFlag::F_SEAL_WRITE
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::F_SEAL_SHRINK)
    .union(SealFlag::F_SEAL_SEAL);

/// A memory file of `bytes` zeros, which take no memory yet.
pub fn sparse(bytes: u64) -> io::Result<OwnedFd> {
    let file = File::from(memfd_create(c"machinen", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(bytes)?;
    Ok(file.into())
}

/// Copies what a file has besides holes to the same places of another one.
///
/// # Errors
/// The files cannot be read or written.
pub fn copy_data(from: &File, to: &File) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut end = 0;
    loop {
        let mut at = match seek(from, SeekFrom::Data(end)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        end = seek(from, SeekFrom::Hole(at))?;
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(buffer.len()).min(buffer.len());
            from.read_exact_at(&mut buffer[..length], at)?;
            to.write_all_at(&buffer[..length], at)?;
            at += length as u64;
        }
    }
}

/// A sealed memory file with this content.
pub fn holding(content: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(sparse(0)?);
    file.write_all(content)?;
    seal(&file)?;
    Ok(file.into())
}

/// Seals a memory file. Fails while a process has it mapped for writing.
pub fn seal(fd: impl AsFd) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_ADD_SEALS(SEALED))?;
    Ok(())
}

/// Whether the file can never change again; false for a file that is not a memfd.
pub fn is_sealed(fd: impl AsFd) -> bool {
    fcntl(fd, FcntlArg::F_GET_SEALS).is_ok_and(|seals| SealFlag::from_bits_retain(seals).contains(SEALED))
}

#[cfg(test)]
mod tests {
    use std::os::{fd::AsRawFd as _, unix::fs::FileExt as _};

    use super::*;

    #[test]
    fn a_sealed_file_can_be_opened_for_writing_but_not_written() {
        let fd = holding(b"content").unwrap();
        assert!(is_sealed(&fd));
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let file = File::options().read(true).write(true).open(path).unwrap();
        assert!(file.write_at(b"x", 0).is_err() && file.set_len(0).is_err());
        let mut content = [0; 7];
        file.read_exact_at(&mut content, 0).unwrap();
        assert_eq!(&content, b"content");
    }

    /// Its holes can be filled, as by a QEMU that a guest has taken over.
    #[test]
    fn a_sealed_file_takes_at_most_its_size() {
        use rustix::fs::{FallocateFlags, fallocate};
        let fd = sparse(1 << 20).unwrap();
        seal(&fd).unwrap();
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let file = File::options().read(true).write(true).open(path).unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, 1 << 20).unwrap();
        for flags in [FallocateFlags::empty(), FallocateFlags::KEEP_SIZE] {
            assert!(fallocate(&file, flags, 1 << 20, 4096).is_err(), "{flags:?}");
        }
        assert!(file.set_len(2 << 20).is_err());
        let taken = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
        assert_eq!(taken, 1 << 20);
    }

    #[test]
    fn a_file_that_is_not_sealed_is_recognised() {
        assert!(!is_sealed(sparse(4096).unwrap()));
        assert!(!is_sealed(File::open("/dev/null").unwrap()));
        assert!(!is_sealed(tempfile::tempfile().unwrap()));
    }
}
