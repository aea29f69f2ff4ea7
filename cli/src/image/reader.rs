//! Readers that count, bound and digest what passes through them.

use std::io::{self, Read};

use flate2::read::MultiGzDecoder;
use machinen::fs::hex;
use ruzstd::decoding::StreamingDecoder;
use sha2::{Digest as _, Sha256};

/// A reader that computes the digest of all that was read.
pub(super) struct DigestReader<R> {
    inner: R,
    digest: Sha256,
    bytes: u64,
    most: u64,
}

impl<R: Read> DigestReader<R> {
    /// After `most` bytes reading fails.
    pub(super) fn new(inner: R, most: u64) -> Self {
        Self { inner, digest: Sha256::new(), bytes: 0, most }
    }

    /// Reads the rest, and returns the digest in hexadecimal digits.
    ///
    /// # Errors
    /// The source fails, or there is too much.
    pub(super) fn finish(mut self) -> io::Result<String> {
        io::copy(&mut self, &mut io::sink())?;
        Ok(hex(&self.digest.finalize()))
    }
}

impl<R: Read> Read for DigestReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.bytes += count as u64;
        if self.bytes > self.most {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("more than {} bytes", self.most),
            ));
        }
        self.digest.update(&buffer[..count]);
        Ok(count)
    }
}

/// How a file is compressed, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    pub(super) fn of(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    /// # Errors
    /// The frame of zstd is not understood.
    pub(super) fn decode<'a>(self, source: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::None => Box::new(source),
            Self::Gzip => Box::new(MultiGzDecoder::new(source)),
            Self::Zstd => {
                let odd = |error| io::Error::new(io::ErrorKind::InvalidData, format!("zstd: {error}"));
                Box::new(StreamingDecoder::new(source).map_err(odd)?)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_digest_is_of_everything_and_the_size_is_bounded() {
        let digest = DigestReader::new(&b"abc"[..], 3).finish().unwrap();
        assert_eq!(digest, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert!(DigestReader::new(&b"abcd"[..], 3).finish().is_err());
    }

    #[test]
    fn compression_is_recognised() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(b"text").unwrap();
        let gzip = gzip.finish().unwrap();
        assert_eq!(
            (Compression::of(&gzip), Compression::of(b"text")),
            (Compression::Gzip, Compression::None)
        );
        let mut text = String::new();
        Compression::Gzip.decode(gzip.as_slice()).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
        // `printf text | zstd --no-check`
        let zstd = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58, 0x21, 0x00, 0x00, b't', b'e', b'x', b't'];
        assert_eq!(Compression::of(&zstd), Compression::Zstd);
        let mut text = String::new();
        Compression::Zstd.decode(zstd.as_slice()).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
        assert!(Compression::Zstd.decode(&b"\x28\xb5\x2f\xfd"[..]).is_err());
    }
}
