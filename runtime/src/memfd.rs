//! Memory files, and how they are made unchangeable (memfd_create(2), fcntl(2)).

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};

/// With these nobody can change or resize it, not even through a mapping.
const SEALED: SealFlag = SealFlag::F_SEAL_WRITE
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::F_SEAL_SHRINK)
    .union(SealFlag::F_SEAL_SEAL);

/// One of `bytes` zeros, none of which takes memory yet.
pub(crate) fn sparse(bytes: u64) -> io::Result<OwnedFd> {
    let file = File::from(memfd_create(c"machinen", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(bytes)?;
    Ok(file.into())
}

/// A sealed one with this content.
pub(crate) fn holding(content: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(sparse(0)?);
    file.write_all(content)?;
    seal(&file)?;
    Ok(file.into())
}

/// Fails while somebody has it mapped for writing.
pub(crate) fn seal(fd: impl AsFd) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_ADD_SEALS(SEALED))?;
    Ok(())
}

/// Whether it can never change again. False for what is no memfd at all.
pub(crate) fn is_sealed(fd: impl AsFd) -> bool {
    fcntl(fd, FcntlArg::F_GET_SEALS).is_ok_and(|seals| SealFlag::from_bits_retain(seals).contains(SEALED))
}

#[cfg(test)]
mod tests {
    use std::os::{fd::AsRawFd as _, unix::fs::FileExt as _};

    use super::*;

    #[test]
    fn what_is_sealed_can_be_opened_for_writing_and_not_written() {
        let fd = holding(b"content").unwrap();
        assert!(is_sealed(&fd));
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let file = File::options().read(true).write(true).open(path).unwrap();
        assert!(file.write_at(b"x", 0).is_err() && file.set_len(0).is_err());
        let mut content = [0; 7];
        file.read_exact_at(&mut content, 0).unwrap();
        assert_eq!(&content, b"content");
    }

    #[test]
    fn what_is_not_sealed_is_found_out() {
        assert!(!is_sealed(sparse(4096).unwrap()));
        assert!(!is_sealed(File::open("/dev/null").unwrap()));
        assert!(!is_sealed(tempfile::tempfile().unwrap()));
    }
}
