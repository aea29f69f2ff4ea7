//! The pages of a template's memory that are not all zeros. Pages of zeros are ignored: whether a memfd has
//! them allocated depends on which of them have been read.

use std::{
    fs::File,
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt as _, MetadataExt as _},
    },
};

use machinen_base::memfd;
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

const PAGE: usize = 4096;
const CHUNK: usize = 256 * PAGE;

/// Bytes of memory that the file takes.
pub(super) fn allocated(memory: &File) -> io::Result<u64> {
    Ok(memory.metadata()?.blocks() * 512)
}

/// Calls back with the number and content of each page that is not zeros, in order.
pub(super) fn for_each(memory: &File, mut each: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    loop {
        let mut offset = match seek(memory, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        at = seek(memory, SeekFrom::Hole(offset))?;
        while offset < at {
            let length = usize::try_from(at - offset).unwrap_or(CHUNK).min(CHUNK);
            memory.read_exact_at(&mut buffer[..length], offset)?;
            for (page, number) in buffer[..length].chunks(PAGE).zip(offset / PAGE as u64..) {
                if page.iter().any(|byte| *byte != 0) {
                    each(number, page)?;
                }
            }
            offset += length as u64;
        }
    }
}

/// A sealed memfd with the same content, without memory for pages of zeros.
pub(super) fn copy(memory: &File) -> io::Result<OwnedFd> {
    let copy = File::from(memfd::sparse(memory.metadata()?.len())?);
    for_each(memory, |number, page| copy.write_all_at(page, number * PAGE as u64))?;
    memfd::seal(&copy)?;
    Ok(copy.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_the_same_content_in_less_memory() {
        let memory = File::from(memfd::sparse(8 << 20).unwrap());
        memory.write_all_at(&[0; 300 * PAGE], 0).unwrap();
        memory.write_all_at(&[7; 3 * PAGE], 5 << 20).unwrap();
        memory.write_all_at(b"end", (8 << 20) - 3).unwrap();
        memfd::seal(&memory).unwrap();
        let copied = File::from(copy(&memory).unwrap());
        assert!(memfd::is_sealed(&copied));
        assert_eq!(allocated(&copied).unwrap(), 4 * PAGE as u64);
        let read = |file: &File| {
            let mut content = vec![1; 8 << 20];
            file.read_exact_at(&mut content, 0).unwrap();
            content
        };
        assert!(read(&copied) == read(&memory) && copied.metadata().unwrap().len() == 8 << 20);
    }
}
