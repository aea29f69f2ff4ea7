//! A container's root file system, as the host sees it: FUSE messages (linux/fuse.h) on a raw stream.
//!
//! ```text
//!   host's kernel ── request ──> host ── raw stream ──> agent ── a process that serves the container's files
//!                 <── reply ────      <───────────────        <──
//! ```
//! A message begins with its own length, so it travels without a frame. The stream carries requests in one
//! direction and replies in the other, in any order, and no notifications. The negotiation at the start
//! (FUSE_INIT) does not travel: the host answers its kernel, and the agent greets its server. Both sides rely
//! on the sizes below.

/// Most bytes that one request reads or writes.
pub const MAX_DATA: usize = 128 << 10;
/// Size of a fuse_in_header, bytes.
pub const REQUEST_HEADER: usize = 40;
/// Size of a fuse_out_header, bytes.
pub const REPLY_HEADER: usize = 16;
/// Longest request, bytes: the kernel wants room for a page in addition to the data.
pub const MAX_REQUEST: usize = MAX_DATA + 4096;
/// Longest reply, bytes.
pub const MAX_REPLY: usize = MAX_DATA + REPLY_HEADER;
/// The number of the root directory (FUSE_ROOT_ID).
pub const ROOT: u64 = 1;
/// Major version of the FUSE messages that both sides use.
pub const MAJOR: u32 = 7;
/// Minor version of the FUSE messages that both sides use. Nothing newer is used.
pub const MINOR: u32 = 31;

/// Operations that this crate's users have to recognise.
pub mod opcode {
    /// Looks a name up in a directory.
    pub const LOOKUP: u32 = 1;
    /// The kernel drops references to a node. Has no reply.
    pub const FORGET: u32 = 2;
    /// Reads the attributes of a node.
    pub const GETATTR: u32 = 3;
    /// Changes the attributes of a node.
    pub const SETATTR: u32 = 4;
    /// Makes a symbolic link.
    pub const SYMLINK: u32 = 6;
    /// Makes a file without opening it.
    pub const MKNOD: u32 = 8;
    /// Makes a directory.
    pub const MKDIR: u32 = 9;
    /// Removes a name of a file.
    pub const UNLINK: u32 = 10;
    /// Removes a directory.
    pub const RMDIR: u32 = 11;
    /// Gives a name to another file.
    pub const RENAME: u32 = 12;
    /// Makes a hard link.
    pub const LINK: u32 = 13;
    /// Opens a file.
    pub const OPEN: u32 = 14;
    /// Reads data of a file.
    pub const READ: u32 = 15;
    /// Asks for the sizes of the file system.
    pub const STATFS: u32 = 17;
    /// Closes a file, which no process has open any more.
    pub const RELEASE: u32 = 18;
    /// Sets an extended attribute.
    pub const SETXATTR: u32 = 21;
    /// Reads an extended attribute, or its size.
    pub const GETXATTR: u32 = 22;
    /// Removes an extended attribute.
    pub const REMOVEXATTR: u32 = 24;
    /// Negotiates the version, once.
    pub const INIT: u32 = 26;
    /// Opens a directory.
    pub const OPENDIR: u32 = 27;
    /// Lists a part of a directory.
    pub const READDIR: u32 = 28;
    /// Closes a directory.
    pub const RELEASEDIR: u32 = 29;
    /// Makes a file and opens it.
    pub const CREATE: u32 = 35;
    /// Asks for another request to be given up.
    pub const INTERRUPT: u32 = 36;
    /// The file system was unmounted.
    pub const DESTROY: u32 = 38;
    /// [`FORGET`] for several nodes. Has no reply.
    pub const BATCH_FORGET: u32 = 42;
    /// Lists a part of a directory, and looks the names up.
    pub const READDIRPLUS: u32 = 44;
    /// [`RENAME`] with flags.
    pub const RENAME2: u32 = 45;
    /// SETATTR, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, WRITE, SETXATTR, REMOVEXATTR, CREATE,
    /// FALLOCATE, RENAME2, COPY_FILE_RANGE.
    pub(super) const CHANGES: [u32; 15] = [4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47];
}

/// The beginning of a request (fuse_in_header).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// Length of the whole message, in bytes.
    pub length: usize,
    /// The operation: see [`opcode`].
    pub opcode: u32,
    /// The reply refers to the request by this number.
    pub unique: u64,
    /// The file or directory that the operation is about.
    pub node: u64,
}

/// The beginning of a reply (fuse_out_header).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyHeader {
    /// Length of the whole message, in bytes.
    pub length: usize,
    /// 0, or a positive errno; then the message has no body.
    pub errno: i32,
    /// The number of the request that this answers.
    pub unique: u64,
}

/// Why bytes are not a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FuseError {
    /// The length is that of no request.
    #[error("a request of {0} bytes")]
    RequestLength(u32),
    /// The length is that of no reply.
    #[error("a reply of {0} bytes")]
    ReplyLength(u32),
    /// The error is not one of errno(3).
    #[error("a reply with the error {0}")]
    Errno(i32),
    /// The message answers no request.
    #[error("a notification")]
    Notification,
}

impl RequestHeader {
    /// Reads the header of a request.
    ///
    /// # Errors
    /// The request is shorter than its header or longer than [`MAX_REQUEST`].
    pub fn decode(bytes: &[u8; REQUEST_HEADER]) -> Result<Self, FuseError> {
        Self::decode_within(bytes, MAX_REQUEST)
    }

    /// Reads the header of a request of at most `max` bytes.
    ///
    /// # Errors
    /// The request is shorter than its header or longer than `max`.
    pub fn decode_within(bytes: &[u8; REQUEST_HEADER], max: usize) -> Result<Self, FuseError> {
        let length = u32_at(bytes, 0);
        match usize::try_from(length) {
            Ok(length) if (REQUEST_HEADER..=max).contains(&length) => Ok(Self {
                length,
                opcode: u32_at(bytes, 4),
                unique: u64_at(bytes, 8),
                node: u64_at(bytes, 16),
            }),
            _ => Err(FuseError::RequestLength(length)),
        }
    }

    /// Whether the request gets a reply.
    pub fn is_answered(self) -> bool {
        !matches!(self.opcode, opcode::FORGET | opcode::BATCH_FORGET)
    }

    /// Whether the request may change what is on the disk; `body` is what follows the header.
    pub fn changes(self, body: &[u8]) -> bool {
        // An overlay copies a file when it is opened for writing. O_RDONLY is 0 in the two bits of O_ACCMODE.
        let for_writing = || body.first().is_none_or(|flags| flags & 3 != 0);
        opcode::CHANGES.contains(&self.opcode) || (self.opcode == opcode::OPEN && for_writing())
    }
}

impl ReplyHeader {
    /// Reads the header of a reply.
    ///
    /// # Errors
    /// The reply is shorter than its header or longer than [`MAX_REPLY`], its error is not one of errno(3),
    /// it has both an error and a body, or it answers no request.
    pub fn decode(bytes: &[u8; REPLY_HEADER]) -> Result<Self, FuseError> {
        Self::decode_within(bytes, MAX_REPLY)
    }

    /// Reads the header of a reply of at most `max` bytes.
    ///
    /// # Errors
    /// As for [`ReplyHeader::decode`].
    pub fn decode_within(bytes: &[u8; REPLY_HEADER], max: usize) -> Result<Self, FuseError> {
        let (length, error) = (u32_at(bytes, 0), u32_at(bytes, 4).cast_signed());
        let unique = u64_at(bytes, 8);
        if unique == 0 {
            return Err(FuseError::Notification);
        }
        // Numbers outside this range mean something to the kernel itself.
        if !(-511..=0).contains(&error) {
            return Err(FuseError::Errno(error));
        }
        match usize::try_from(length) {
            Ok(length)
                if length == REPLY_HEADER || (error == 0 && (REPLY_HEADER..=max).contains(&length)) =>
            {
                Ok(Self { length, errno: -error, unique })
            }
            _ => Err(FuseError::ReplyLength(length)),
        }
    }
}

/// The reply to the request `unique` that it has failed with `errno`.
pub fn refusal(unique: u64, errno: i32) -> [u8; REPLY_HEADER] {
    let mut reply = [0; REPLY_HEADER];
    reply[..4].copy_from_slice(&(REPLY_HEADER as u32).to_le_bytes());
    reply[4..8].copy_from_slice(&(-errno).to_le_bytes());
    reply[8..].copy_from_slice(&unique.to_le_bytes());
    reply
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
        let lookup = RequestHeader { length: 44, opcode: 1, unique: 0x0102_0304_0506_0708, node: ROOT };
        assert_eq!(RequestHeader::decode(&bytes), Ok(lookup));
        assert_eq!(&refusal(7, 30), b"\x10\0\0\0\xe2\xff\xff\xff\x07\0\0\0\0\0\0\0");
        assert_eq!(
            ReplyHeader::decode(&refusal(7, 30)),
            Ok(ReplyHeader { length: 16, errno: 30, unique: 7 })
        );
    }

    #[test]
    fn requests_are_bounded() {
        let mut bytes = [0; REQUEST_HEADER];
        for length in [0, 39, MAX_REQUEST as u32 + 1, u32::MAX] {
            bytes[..4].copy_from_slice(&length.to_le_bytes());
            assert_eq!(RequestHeader::decode(&bytes), Err(FuseError::RequestLength(length)));
        }
    }

    #[test]
    fn replies_are_bounded_and_answer_a_request() {
        for length in [0, 15, MAX_REPLY as u32 + 1, u32::MAX] {
            assert_eq!(ReplyHeader::decode(&reply(length, 0, 2)), Err(FuseError::ReplyLength(length)));
        }
        assert_eq!(
            ReplyHeader::decode(&reply(17, -2, 2)),
            Err(FuseError::ReplyLength(17)),
            "an error and a body"
        );
        for error in [1, -512, i32::MIN, i32::MAX] {
            assert_eq!(ReplyHeader::decode(&reply(16, error, 2)), Err(FuseError::Errno(error)));
        }
        assert_eq!(ReplyHeader::decode(&reply(16, 0, 0)), Err(FuseError::Notification));
        let largest = ReplyHeader { length: MAX_REPLY, errno: 0, unique: 2 };
        assert_eq!(ReplyHeader::decode(&reply(MAX_REPLY as u32, 0, 2)), Ok(largest));
    }

    #[test]
    fn requests_that_change_files_are_recognised() {
        let request = |opcode| RequestHeader { length: REQUEST_HEADER, opcode, unique: 2, node: ROOT };
        let open = |flags: u32| request(opcode::OPEN).changes(&flags.to_le_bytes());
        assert!(!open(0) && open(1) && open(2) && open(0o2001), "by the access mode");
        assert!(request(opcode::OPEN).changes(&[]), "a request without its flags");
        for (opcode, changes) in [(1, false), (15, false), (16, true), (28, false), (35, true), (46, false)] {
            assert_eq!(request(opcode).changes(&[]), changes, "{opcode}");
        }
    }
}
