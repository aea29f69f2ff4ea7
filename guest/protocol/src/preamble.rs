//! The first bytes of every stream, written by the side that dials and answered by the other.
//!
//! ```text
//!   request, 24 bytes:  "machinen" | version u16 | kind u16 | reserved u32 = 0 | token u64     (little endian)
//!   answer,  16 bytes:  "machinen" | version u16 | status u16 | reserved u32 = 0
//! ```
//!
//! The layout of the first ten bytes of both never changes, so that two sides of different versions can always
//! tell each other which they are.

use crate::VERSION;

const MAGIC: [u8; 8] = *b"machinen";

/// Size of an encoded [`Preamble`], bytes.
pub const PREAMBLE_LEN: usize = 24;
/// Size of an encoded [`Answer`], bytes.
pub const ANSWER_LEN: usize = 16;

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// ttrpc, the guest being the server.
    Control,
    /// One direction of a process's stdio, named by a token that a later control call refers to.
    Stdio,
    /// No stream: on the wake port, the agent of a template says that it waits. The answer wakes it.
    Waiting,
}

/// What the dialling side says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    pub kind: Kind,
    /// Chosen by the host, unique for the life of the VM; 0 for a control stream.
    pub token: u64,
}

/// What the accepting side answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Accepted,
    /// The versions differ; the stream is closed after this.
    WrongVersion,
    /// Too many streams wait to be claimed, or the token is in use; the stream is closed after this.
    Refused,
}

/// Why the first bytes of a stream were not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PreambleError {
    #[error("peer does not speak machinen's protocol")]
    NotMachinen,
    #[error("peer speaks protocol version {theirs}, this side speaks {VERSION}")]
    Version { theirs: u16 },
    #[error("unknown {field} {value} in a stream's first bytes")]
    Unknown { field: &'static str, value: u64 },
}

impl Preamble {
    pub fn encode(self) -> [u8; PREAMBLE_LEN] {
        let kind: u16 = match self.kind {
            Kind::Control => 1,
            Kind::Stdio => 2,
            Kind::Waiting => 3,
        };
        let mut out = [0; PREAMBLE_LEN];
        out[..8].copy_from_slice(&MAGIC);
        out[8..10].copy_from_slice(&VERSION.to_le_bytes());
        out[10..12].copy_from_slice(&kind.to_le_bytes());
        out[16..24].copy_from_slice(&self.token.to_le_bytes());
        out
    }

    /// # Errors
    /// The version is judged before anything that may differ between versions.
    pub fn decode(bytes: &[u8; PREAMBLE_LEN]) -> Result<Self, PreambleError> {
        check_head(bytes)?;
        let kind = match u16_at(bytes, 10) {
            1 => Kind::Control,
            2 => Kind::Stdio,
            3 => Kind::Waiting,
            other => return Err(PreambleError::Unknown { field: "stream kind", value: other.into() }),
        };
        check_reserved(bytes)?;
        let token = u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes"));
        Ok(Self { kind, token })
    }
}

impl Answer {
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

    /// # Errors
    /// A peer of another version is [`PreambleError::Version`], whatever its status says.
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
        let control = Preamble { kind: Kind::Control, token: 0 }.encode();
        assert_eq!(&control, b"machinen\x03\x00\x01\x00\0\0\0\0\0\0\0\0\0\0\0\0");
        let stdio = Preamble { kind: Kind::Stdio, token: 0x0102_0304_0506_0708 }.encode();
        assert_eq!(&stdio, b"machinen\x03\x00\x02\x00\0\0\0\0\x08\x07\x06\x05\x04\x03\x02\x01");
        assert_eq!(&Answer::Accepted.encode(), b"machinen\x03\x00\x00\x00\0\0\0\0");
        assert_eq!(&Answer::Refused.encode(), b"machinen\x03\x00\x02\x00\0\0\0\0");
    }

    #[test]
    fn round_trips() {
        for kind in [Kind::Control, Kind::Stdio, Kind::Waiting] {
            let preamble = Preamble { kind, token: u64::MAX };
            assert_eq!(Preamble::decode(&preamble.encode()), Ok(preamble));
        }
        for answer in [Answer::Accepted, Answer::WrongVersion, Answer::Refused] {
            assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
        }
    }

    #[test]
    fn another_version_is_named_before_anything_else() {
        let mut bytes = Preamble { kind: Kind::Control, token: 0 }.encode();
        bytes[8..16].copy_from_slice(&[9, 0, 99, 99, 1, 1, 1, 1]);
        assert_eq!(Preamble::decode(&bytes), Err(PreambleError::Version { theirs: 9 }));
        let mut bytes = Answer::WrongVersion.encode();
        bytes[8] = 9;
        assert_eq!(Answer::decode(&bytes), Err(PreambleError::Version { theirs: 9 }));
    }

    #[test]
    fn noise_is_refused() {
        assert_eq!(Preamble::decode(&[0; PREAMBLE_LEN]), Err(PreambleError::NotMachinen));
        let mut bytes = Preamble { kind: Kind::Stdio, token: 1 }.encode();
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
