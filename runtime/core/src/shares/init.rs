//! The negotiation at the start of a FUSE connection (FUSE_INIT).
//!
//! The server answers it itself, so that the sizes and features are those of this file, whatever the guest asks.

use fuse_backend_rs::api::filesystem::FsOptions;
use machinen_protocol::{
    fuse::{MAJOR, REPLY_HEADER},
    shares::MAX_DATA,
};

/// The version whose layouts the library has.
const MINOR: u32 = 33;
/// Size of a fuse_init_out, bytes.
const INIT_OUT: usize = 64;
/// Requests of the guest's kernel that may wait at once without a process that waits for them.
const MAX_BACKGROUND: u16 = 64;
const PAGE: usize = 4096;

/// The wish of the guest's kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InitRequest {
    major: u32,
    max_readahead: u32,
    options: FsOptions,
}

/// Why there is no connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InitRefusal {
    /// The request is too short.
    Malformed,
    /// The guest's kernel is of another major version.
    Version,
}

impl InitRequest {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// The kernel is too old, or the request is no such request.
    pub(super) fn decode(body: &[u8]) -> Result<Self, InitRefusal> {
        let word = |number: usize| {
            let bytes = body.get(number * 4..number * 4 + 4).ok_or(InitRefusal::Malformed)?;
            Ok(u32::from_le_bytes(bytes.try_into().map_err(|_| InitRefusal::Malformed)?))
        };
        let (major, max_readahead, flags) = (word(0)?, word(2)?, word(3)?);
        if major != MAJOR {
            return Err(InitRefusal::Version);
        }
        Ok(Self { major, max_readahead, options: FsOptions::from_bits_truncate(u64::from(flags)) })
    }

    /// The features that both sides have.
    ///
    /// Data is cached in the guest until the modification time or the size changes on the host, and never written
    /// later than by the call that writes it, except through a shared mapping.
    pub(super) fn options(self) -> FsOptions {
        let wanted = FsOptions::ASYNC_READ
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::BIG_WRITES
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::DO_READDIRPLUS
            | FsOptions::ASYNC_DIO
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::MAX_PAGES
            | FsOptions::HANDLE_KILLPRIV_V2;
        self.options & wanted
    }

    /// The reply to the request `unique`.
    pub(super) fn reply(self, unique: u64) -> Vec<u8> {
        let options = self.options();
        let max_write = if options.contains(FsOptions::MAX_PAGES) { MAX_DATA } else { 32 * PAGE };
        let mut reply = Vec::with_capacity(REPLY_HEADER + INIT_OUT);
        reply.extend(((REPLY_HEADER + INIT_OUT) as u32).to_le_bytes());
        reply.extend(0_u32.to_le_bytes());
        reply.extend(unique.to_le_bytes());
        for word in [self.major, MINOR, self.max_readahead, options.bits() as u32] {
            reply.extend(word.to_le_bytes());
        }
        reply.extend(MAX_BACKGROUND.to_le_bytes());
        reply.extend((MAX_BACKGROUND / 4 * 3).to_le_bytes());
        reply.extend((max_write as u32).to_le_bytes());
        // Times are exact to the nanosecond.
        reply.extend(1_u32.to_le_bytes());
        reply.extend(((max_write / PAGE) as u16).to_le_bytes());
        reply.resize(REPLY_HEADER + INIT_OUT, 0);
        reply
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(words: [u32; 4]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn only_known_features_are_agreed_on() {
        let wish = InitRequest::decode(&request([7, 41, 131_072, u32::MAX])).unwrap();
        let options = wish.options();
        assert!(options.contains(FsOptions::MAX_PAGES | FsOptions::AUTO_INVAL_DATA));
        assert!(
            !options
                .intersects(FsOptions::WRITEBACK_CACHE | FsOptions::POSIX_LOCKS | FsOptions::EXPORT_SUPPORT)
        );
        let reply = wish.reply(9);
        assert_eq!(reply.len(), 80);
        assert_eq!(reply[..16], *b"\x50\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0");
        assert_eq!(reply[16..28], *b"\x07\0\0\0\x21\0\0\0\0\0\x02\0");
        assert_eq!(reply[32..46], *b"\x40\0\x30\0\0\0\x10\0\x01\0\0\0\0\x01");
    }

    #[test]
    fn an_old_kernel_and_a_short_request_are_refused() {
        assert_eq!(InitRequest::decode(&request([8, 0, 0, 0])), Err(InitRefusal::Version));
        assert_eq!(InitRequest::decode(&[7, 0, 0, 0]), Err(InitRefusal::Malformed));
    }
}
