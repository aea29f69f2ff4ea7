//! The format of CRIU's images: two magic words, one of all images and one of the kind, and then messages,
//! each after its length.

use std::io;

pub(super) const MAGIC: usize = 8;

/// Splits an image into its magic words and its messages.
///
/// # Errors
/// The image ends in the middle of a message.
pub(super) fn split(bytes: &[u8]) -> io::Result<([u8; MAGIC], Vec<&[u8]>)> {
    let short = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let (magic, mut rest) = bytes.split_first_chunk().ok_or_else(short)?;
    let mut messages = Vec::new();
    while !rest.is_empty() {
        let (length, tail) = rest.split_first_chunk().ok_or_else(short)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(io::Error::other)?;
        let (message, tail) = tail.split_at_checked(length).ok_or_else(short)?;
        messages.push(message);
        rest = tail;
    }
    Ok((*magic, messages))
}

/// Appends a message to an image.
///
/// # Errors
/// The message is longer than the format allows.
pub(super) fn append(image: &mut Vec<u8>, message: &[u8]) -> io::Result<()> {
    image.extend(u32::try_from(message.len()).map_err(io::Error::other)?.to_le_bytes());
    image.extend(message);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_put_together_and_taken_apart() {
        let mut image = b"magic888".to_vec();
        append(&mut image, b"one").unwrap();
        append(&mut image, b"").unwrap();
        assert_eq!(image[MAGIC..], *b"\x03\0\0\0one\0\0\0\0");
        assert_eq!(split(&image).unwrap(), (*b"magic888", vec![&b"one"[..], b""]));
        for length in [0, 7, 9, 14, image.len() - 1] {
            assert!(split(&image[..length]).is_err(), "{length}");
        }
    }
}
