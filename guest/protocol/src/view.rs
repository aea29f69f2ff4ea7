//! A container's root file system, as the host sees it: FUSE messages (linux/fuse.h) on a raw stream.
//!
//! ```text
//!   host's kernel ── request ──> host ── raw stream ──> agent ── a process that serves the container's files
//!                 <── reply ────      <───────────────        <──
//! ```
//! A message begins with its own length, so nothing is put around it. The stream has requests one way and replies the
//! other, in any order, and no notifications. What is negotiated once (FUSE_INIT) is not on it: the host answers its
//! kernel, and the agent its server. Both sides can rely on the sizes below.

/// Most bytes that one request reads or writes.
pub const MAX_DATA: usize = 128 << 10;
/// Size of a fuse_in_header and of a fuse_out_header, bytes.
pub const REQUEST_HEADER: usize = 40;
pub const REPLY_HEADER: usize = 16;
/// The kernel wants room for a page beside the data.
pub const MAX_REQUEST: usize = MAX_DATA + 4096;
pub const MAX_REPLY: usize = MAX_DATA + REPLY_HEADER;
/// The node that is the root of the view (FUSE_ROOT_ID).
pub const ROOT: u64 = 1;
/// Version of FUSE's messages that both sides speak: what it has is all that is used.
pub const MAJOR: u32 = 7;
pub const MINOR: u32 = 31;

/// What a request asks for; those that need to be told apart.
pub mod opcode {
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub(super) const OPEN: u32 = 14;
    /// SETATTR, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, WRITE, SETXATTR, REMOVEXATTR, CREATE, FALLOCATE,
    /// RENAME2, COPY_FILE_RANGE.
    pub(super) const CHANGES: [u32; 15] = [4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47];
}

/// The beginning of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Of the whole message, in bytes.
    pub length: usize,
    pub opcode: u32,
    /// Names the request in its reply.
    pub unique: u64,
    pub node: u64,
}

/// The beginning of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// Of the whole message, in bytes.
    pub length: usize,
    /// 0, or a positive errno; then there is nothing after it.
    pub errno: i32,
    pub unique: u64,
}

/// Why a message is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ViewError {
    #[error("a request of {0} bytes")]
    RequestLength(u32),
    #[error("a reply of {0} bytes")]
    ReplyLength(u32),
    #[error("a reply with the error {0}")]
    Errno(i32),
    #[error("a notification")]
    Notification,
}

impl Request {
    /// # Errors
    /// It is shorter than this or longer than [`MAX_REQUEST`].
    pub fn decode(bytes: &[u8; REQUEST_HEADER]) -> Result<Self, ViewError> {
        let length = u32_at(bytes, 0);
        match usize::try_from(length) {
            Ok(length) if (REQUEST_HEADER..=MAX_REQUEST).contains(&length) => Ok(Self {
                length,
                opcode: u32_at(bytes, 4),
                unique: u64_at(bytes, 8),
                node: u64_at(bytes, 16),
            }),
            _ => Err(ViewError::RequestLength(length)),
        }
    }

    /// Whether there is a reply to it.
    pub fn is_answered(self) -> bool {
        !matches!(self.opcode, opcode::FORGET | opcode::BATCH_FORGET)
    }

    /// Whether it may change what is on the disk; `body` is what follows the header.
    pub fn changes(self, body: &[u8]) -> bool {
        // An overlay copies a file when it is opened for writing. O_RDONLY is 0 in the two bits of O_ACCMODE.
        let for_writing = || body.first().is_none_or(|flags| flags & 3 != 0);
        opcode::CHANGES.contains(&self.opcode) || (self.opcode == opcode::OPEN && for_writing())
    }
}

impl Reply {
    /// # Errors
    /// It is shorter than this or longer than [`MAX_REPLY`], its error is none of errno(3), it has an error and more, or
    /// answers nothing.
    pub fn decode(bytes: &[u8; REPLY_HEADER]) -> Result<Self, ViewError> {
        let (length, error) = (u32_at(bytes, 0), u32_at(bytes, 4).cast_signed());
        let unique = u64_at(bytes, 8);
        if unique == 0 {
            return Err(ViewError::Notification);
        }
        // Beyond are numbers that mean something to the kernel itself.
        if !(-511..=0).contains(&error) {
            return Err(ViewError::Errno(error));
        }
        match usize::try_from(length) {
            Ok(length) if length == REPLY_HEADER || (error == 0 && within(length)) => {
                Ok(Self { length, errno: -error, unique })
            }
            _ => Err(ViewError::ReplyLength(length)),
        }
    }
}

/// The reply that a request has failed.
pub fn refusal(unique: u64, errno: i32) -> [u8; REPLY_HEADER] {
    let mut reply = [0; REPLY_HEADER];
    reply[..4].copy_from_slice(&(REPLY_HEADER as u32).to_le_bytes());
    reply[4..8].copy_from_slice(&(-errno).to_le_bytes());
    reply[8..].copy_from_slice(&unique.to_le_bytes());
    reply
}

fn within(length: usize) -> bool {
    (REPLY_HEADER..=MAX_REPLY).contains(&length)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(length: u32, error: i32, unique: u64) -> [u8; REPLY_HEADER] {
        let mut bytes = [0; REPLY_HEADER];
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        bytes[4..8].copy_from_slice(&error.to_le_bytes());
        bytes[8..].copy_from_slice(&unique.to_le_bytes());
        bytes
    }

    #[test]
    fn golden_bytes() {
        let mut bytes = [0; REQUEST_HEADER];
        bytes[..24]
            .copy_from_slice(b"\x2c\0\0\0\x01\0\0\0\x08\x07\x06\x05\x04\x03\x02\x01\x01\0\0\0\0\0\0\0");
        let lookup = Request { length: 44, opcode: 1, unique: 0x0102_0304_0506_0708, node: ROOT };
        assert_eq!(Request::decode(&bytes), Ok(lookup));
        assert_eq!(&refusal(7, 30), b"\x10\0\0\0\xe2\xff\xff\xff\x07\0\0\0\0\0\0\0");
        assert_eq!(Reply::decode(&refusal(7, 30)), Ok(Reply { length: 16, errno: 30, unique: 7 }));
    }

    #[test]
    fn requests_are_bounded() {
        let mut bytes = [0; REQUEST_HEADER];
        for length in [0, 39, MAX_REQUEST as u32 + 1, u32::MAX] {
            bytes[..4].copy_from_slice(&length.to_le_bytes());
            assert_eq!(Request::decode(&bytes), Err(ViewError::RequestLength(length)));
        }
    }

    #[test]
    fn replies_are_bounded_and_of_something() {
        for length in [0, 15, MAX_REPLY as u32 + 1, u32::MAX] {
            assert_eq!(Reply::decode(&reply(length, 0, 2)), Err(ViewError::ReplyLength(length)));
        }
        assert_eq!(Reply::decode(&reply(17, -2, 2)), Err(ViewError::ReplyLength(17)), "an error and more");
        for error in [1, -512, i32::MIN, i32::MAX] {
            assert_eq!(Reply::decode(&reply(16, error, 2)), Err(ViewError::Errno(error)));
        }
        assert_eq!(Reply::decode(&reply(16, 0, 0)), Err(ViewError::Notification));
        let largest = Reply { length: MAX_REPLY, errno: 0, unique: 2 };
        assert_eq!(Reply::decode(&reply(MAX_REPLY as u32, 0, 2)), Ok(largest));
    }

    #[test]
    fn what_changes_is_told_from_what_does_not() {
        let request = |opcode| Request { length: REQUEST_HEADER, opcode, unique: 2, node: ROOT };
        let open = |flags: u32| request(opcode::OPEN).changes(&flags.to_le_bytes());
        assert!(!open(0) && open(1) && open(2) && open(0o2001), "by the access mode");
        assert!(request(opcode::OPEN).changes(&[]), "a request that does not say");
        for (opcode, changes) in [(1, false), (15, false), (16, true), (28, false), (35, true), (46, false)] {
            assert_eq!(request(opcode).changes(&[]), changes, "{opcode}");
        }
    }
}
