//! Digests of images: one of each whole image, and one of each part, so that a part can be verified alone.
//!
//! The whole image has a SHA-256 digest, as is usual for containers. Parts have the faster BLAKE3, because
//! they are verified while a restored process waits for its memory.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt as _,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use sha2::{Digest as _, Sha256};

/// Size of a part, bytes. The last part of an image may be shorter.
pub(super) const PART: u64 = 1 << 20;

/// The hexadecimal BLAKE3 digest of a part.
pub(super) fn of_part(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// The hexadecimal SHA-256 digest of a whole file of `size` bytes. Blocks.
///
/// # Errors
/// The file cannot be read, or is shorter.
pub(super) fn of_file(file: &File, size: u64) -> io::Result<String> {
    let mut digest = Sha256::new();
    update(&mut digest, file, 0..size)?;
    Ok(hexadecimal(digest))
}

/// Adds a range of a file to a digest. The range starts at the start of a part. Blocks.
///
/// # Errors
/// The same as for [`of_file`].
pub(super) fn update(digest: &mut Sha256, file: &File, bytes: Range<u64>) -> io::Result<()> {
    let mut buffer = Vec::new();
    parts(bytes.clone()).try_for_each(|number| {
        digest.update(read_part(file, bytes.end, number, &mut buffer)?);
        Ok(())
    })
}

pub(super) fn hexadecimal(digest: Sha256) -> String {
    format!("{:x}", digest.finalize())
}

/// The digests of the parts in a range of a file, which starts and ends at the boundary of a part. Blocks.
///
/// # Errors
/// The same as for [`of_file`].
pub(super) fn of_parts(file: &File, bytes: Range<u64>) -> io::Result<Vec<String>> {
    let mut buffer = Vec::new();
    let digest = |number| Ok(of_part(read_part(file, bytes.end, number, &mut buffer)?));
    parts(bytes.clone()).map(digest).collect()
}

fn parts(bytes: Range<u64>) -> Range<u64> {
    bytes.start / PART..bytes.end.div_ceil(PART)
}

/// Whether each part has the digest in `digests`. Uses all processors. Blocks.
///
/// # Errors
/// The same as for [`of_file`].
pub(super) fn parts_are(file: &File, size: u64, digests: &[String]) -> io::Result<bool> {
    let next = AtomicU64::new(0);
    let some = || {
        let mut buffer = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(digest) = usize::try_from(number).ok().and_then(|number| digests.get(number)) else {
                return Ok(true);
            };
            if of_part(read_part(file, size, number, &mut buffer)?) != *digest {
                next.store(digests.len() as u64, Ordering::Relaxed);
                return Ok(false);
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(digests.len());
    thread::scope(|scope| {
        let started: Vec<_> = (0..threads).map(|_| scope.spawn(some)).collect();
        let results = started.into_iter().map(|thread| thread.join().expect("the thread does not panic"));
        results.collect::<io::Result<Vec<_>>>().map(|each| each.into_iter().all(|right| right))
    })
}

/// Reads one part of a file of `size` bytes.
///
/// # Errors
/// The file cannot be read, or is shorter.
pub(super) fn read_part<'a>(
    file: &File,
    size: u64,
    number: u64,
    buffer: &'a mut Vec<u8>,
) -> io::Result<&'a [u8]> {
    let start = number * PART;
    buffer.resize(usize::try_from(PART.min(size - start)).expect("a part fits"), 0);
    file.read_exact_at(buffer, start)?;
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_change_in_any_part_is_found() {
        let size = 5 * PART + 3;
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..size).map(|at| (at / 251) as u8).collect();
        file.write_all(&content).unwrap();
        let digests = of_parts(&file, 0..size).unwrap();
        assert_eq!(digests.len(), 6);
        assert_eq!(of_parts(&file, PART..3 * PART).unwrap(), digests[1..3]);
        assert_eq!(of_file(&file, size).unwrap(), format!("{:x}", Sha256::digest(&content)));
        assert!(parts_are(&file, size, &digests).unwrap());
        for at in [0, PART - 1, 3 * PART, size - 1] {
            let byte = content[at as usize];
            file.write_all_at(&[byte ^ 1], at).unwrap();
            assert!(!parts_are(&file, size, &digests).unwrap(), "{at}");
            file.write_all_at(&[byte], at).unwrap();
        }
        file.set_len(size - 1).unwrap();
        assert!(parts_are(&file, size, &digests).is_err());
    }
}
