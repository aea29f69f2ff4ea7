//! The first bytes of every stream, written by the side that dials and answered by the other.
//!
//! ```text
//!   request, 24 bytes:  "machinen" | version u16 | kind u16 | reserved u32 = 0 | token u64     (little endian)
//!   answer,  16 bytes:  "machinen" | version u16 | status u16 | reserved u32 = 0
//!   wake,    20 bytes:  an answer that accepts | control port u32            (on the wake port only)
//! ```
//!
//! The layout of the first ten bytes of both never changes, so that two sides of different versions can
//! always read each other's version.

use crate::VERSION;

const MAGIC: [u8; 8] = *b"machinen";

/// Size of an encoded [`Preamble`], bytes.
pub const PREAMBLE_LEN: usize = 24;
/// Size of an encoded [`Answer`], bytes.
pub const ANSWER_LEN: usize = 16;
/// Size of an encoded [`Wake`], bytes.
pub const WAKE_LEN: usize = ANSWER_LEN + 4;

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamKind {
    /// ttrpc, the guest being the server.
    Control,
    /// Bytes without a protocol of this crate's: one direction of a process's stdio, an archive, or FUSE
    /// messages. A later control call says which, and refers to the stream by its token.
    Raw,
    /// On the wake port only: the agent of a template reports that it waits. The answer wakes it.
    Waiting,
}

/// What the dialling side sends first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// What the stream is for.
    pub kind: StreamKind,
    /// Chosen by the host, unique for the life of the VM; 0 for a control stream. On the wake port it is the number of the agent's
    /// preparations that have failed; clones are slower then.
    pub token: u64,
}

/// What the accepting side answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The stream is open.
    Accepted,
    /// The versions differ; the stream is closed after this.
    WrongVersion,
    /// Too many streams wait to be claimed, the token is in use, or the kind is not expected here; the stream
    /// is closed after this.
    Refused,
}

/// What wakes the agent of a clone, and what this agent must not take from its template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wake {
    /// The AF_VSOCK port on which the clone's host listens; 0 where the channel has no such port. The agent cannot
    /// derive it from the VM's CID yet, because its kernel may still have the CID of the template.
    pub control_port: u32,
}

/// Why the first bytes of a stream were not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PreambleError {
    /// The bytes do not begin with the magic word.
    #[error("peer does not speak machinen's protocol")]
    NotMachinen,
    /// The peer speaks another version.
    #[error("peer speaks protocol version {theirs}, this side speaks {VERSION}")]
    Version {
        /// The peer's version.
        theirs: u16,
    },
    /// A field has a value that this version does not define.
    #[error("unknown {field} {value} in a stream's first bytes")]
    Unknown {
        /// The field's name.
        field: &'static str,
        /// What the peer has sent.
        value: u64,
    },
}

impl StreamKind {
    /// The number that stands for this kind in a preamble.
    pub const fn number(self) -> u16 {
        match self {
            Self::Control => 1,
            Self::Raw => 2,
            Self::Waiting => 3,
        }
    }

    fn from_number(number: u16) -> Result<Self, PreambleError> {
        let kinds = [Self::Control, Self::Raw, Self::Waiting];
        let kind = kinds.into_iter().find(|kind| kind.number() == number);
        kind.ok_or(PreambleError::Unknown { field: "stream kind", value: number.into() })
    }
}

impl Preamble {
    /// The bytes that open a stream.
    pub fn encode(self) -> [u8; PREAMBLE_LEN] {
        let mut out = [0; PREAMBLE_LEN];
        out[..8].copy_from_slice(&MAGIC);
        out[8..10].copy_from_slice(&VERSION.to_le_bytes());
        out[10..12].copy_from_slice(&self.kind.number().to_le_bytes());
        out[16..24].copy_from_slice(&self.token.to_le_bytes());
        out
    }

    /// Reads the bytes that open a stream.
    ///
    /// # Errors
    /// The bytes are not a preamble of this version. The version is compared before anything that may differ
    /// between versions.
    pub fn decode(bytes: &[u8; PREAMBLE_LEN]) -> Result<Self, PreambleError> {
        check_head(bytes)?;
        let kind = StreamKind::from_number(u16_at(bytes, 10))?;
        check_reserved(bytes)?;
        let token = u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes"));
        Ok(Self { kind, token })
    }
}

impl Answer {
    /// The bytes of the answer to a preamble.
    pub fn encode(self) -> [u8; ANSWER_LEN] {
        let status: u16 = match self {
            Self::Accepted => 0,
            Self::WrongVersion => 1,
            Self::Refused => 2,
        };
        let mut out = [0; ANSWER_LEN];
        out[..8].copy_from_slice(&MAGIC);
        out[8..10].copy_from_slice(&VERSION.to_le_bytes());
        out[10..12].copy_from_slice(&status.to_le_bytes());
        out
    }

    /// Reads the answer to a preamble.
    ///
    /// # Errors
    /// The bytes are not an answer of this version. A peer of another version is [`PreambleError::Version`],
    /// whatever its status is.
    pub fn decode(bytes: &[u8; ANSWER_LEN]) -> Result<Self, PreambleError> {
        check_head(bytes)?;
        check_reserved(bytes)?;
        match u16_at(bytes, 10) {
            0 => Ok(Self::Accepted),
            1 => Ok(Self::WrongVersion),
            2 => Ok(Self::Refused),
            other => Err(PreambleError::Unknown { field: "answer", value: other.into() }),
        }
    }
}

impl Wake {
    /// The bytes that wake an agent.
    pub fn encode(self) -> [u8; WAKE_LEN] {
        let mut out = [0; WAKE_LEN];
        out[..ANSWER_LEN].copy_from_slice(&Answer::Accepted.encode());
        out[ANSWER_LEN..].copy_from_slice(&self.control_port.to_le_bytes());
        out
    }

    /// Reads the bytes that wake an agent.
    ///
    /// # Errors
    /// As for [`Answer::decode`], or the answer is not [`Answer::Accepted`].
    pub fn decode(bytes: &[u8; WAKE_LEN]) -> Result<Self, PreambleError> {
        let (answer, port) = bytes.split_first_chunk().expect("longer than an answer");
        match Answer::decode(answer)? {
            Answer::Accepted => {}
            Answer::WrongVersion | Answer::Refused => {
                let value = u16_at(answer, 10).into();
                return Err(PreambleError::Unknown { field: "answer on the wake port", value });
            }
        }
        Ok(Self { control_port: u32::from_le_bytes(port.try_into().expect("four bytes")) })
    }
}

fn check_head(bytes: &[u8]) -> Result<(), PreambleError> {
    if bytes[..8] != MAGIC {
        return Err(PreambleError::NotMachinen);
    }
    match u16_at(bytes, 8) {
        VERSION => Ok(()),
        theirs => Err(PreambleError::Version { theirs }),
    }
}

fn check_reserved(bytes: &[u8]) -> Result<(), PreambleError> {
    match u32::from_le_bytes(bytes[12..16].try_into().expect("four bytes")) {
        0 => Ok(()),
        other => Err(PreambleError::Unknown { field: "reserved value", value: other.into() }),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let control = Preamble { kind: StreamKind::Control, token: 0 }.encode();
        assert_eq!(&control, b"machinen\x0a\x00\x01\x00\0\0\0\0\0\0\0\0\0\0\0\0");
        let raw = Preamble { kind: StreamKind::Raw, token: 0x0102_0304_0506_0708 }.encode();
        assert_eq!(&raw, b"machinen\x0a\x00\x02\x00\0\0\0\0\x08\x07\x06\x05\x04\x03\x02\x01");
        assert_eq!(&Answer::Accepted.encode(), b"machinen\x0a\x00\x00\x00\0\0\0\0");
        assert_eq!(&Answer::Refused.encode(), b"machinen\x0a\x00\x02\x00\0\0\0\0");
        let wake = Wake { control_port: 0x0102_0304 }.encode();
        assert_eq!(&wake, b"machinen\x0a\x00\x00\x00\0\0\0\0\x04\x03\x02\x01");
    }

    #[test]
    fn round_trips() {
        for kind in [StreamKind::Control, StreamKind::Raw, StreamKind::Waiting] {
            let preamble = Preamble { kind, token: u64::MAX };
            assert_eq!(Preamble::decode(&preamble.encode()), Ok(preamble));
        }
        for answer in [Answer::Accepted, Answer::WrongVersion, Answer::Refused] {
            assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
        }
    }

    #[test]
    fn only_an_acceptance_wakes() {
        let wake = Wake { control_port: 70_000 };
        assert_eq!(Wake::decode(&wake.encode()), Ok(wake));
        let mut bytes = wake.encode();
        bytes[..ANSWER_LEN].copy_from_slice(&Answer::Refused.encode());
        let refused = PreambleError::Unknown { field: "answer on the wake port", value: 2 };
        assert_eq!(Wake::decode(&bytes), Err(refused));
    }

    #[test]
    fn another_version_is_reported_before_anything_else() {
        let mut bytes = Preamble { kind: StreamKind::Control, token: 0 }.encode();
        bytes[8..16].copy_from_slice(&[11, 0, 99, 99, 1, 1, 1, 1]);
        assert_eq!(Preamble::decode(&bytes), Err(PreambleError::Version { theirs: 11 }));
        let mut bytes = Answer::WrongVersion.encode();
        bytes[8] = 11;
        assert_eq!(Answer::decode(&bytes), Err(PreambleError::Version { theirs: 11 }));
    }

    #[test]
    fn noise_is_refused() {
        assert_eq!(Preamble::decode(&[0; PREAMBLE_LEN]), Err(PreambleError::NotMachinen));
        let mut bytes = Preamble { kind: StreamKind::Raw, token: 1 }.encode();
        bytes[10] = 7;
        assert_eq!(Preamble::decode(&bytes), Err(PreambleError::Unknown { field: "stream kind", value: 7 }));
        bytes[10] = 2;
        bytes[12] = 1;
        assert_eq!(
            Preamble::decode(&bytes),
            Err(PreambleError::Unknown { field: "reserved value", value: 1 })
        );
    }
}
