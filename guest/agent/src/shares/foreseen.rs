//! Answers to requests that the kernel is about to make, which the host has sent with the reply to another one.
//!
//! - After a name has been made or removed, the kernel asks for the attributes of the directory, before it lets a process
//!   use the next name there.
//! - Before the first write to a file it asks whether the file has capabilities, and before it runs one.
//!
//! What the host has sent is used within [`FRESH`] after the request that it came with, and not if a request that changes
//! names or attributes was sent since: so the guest sees its own changes, and those of the host as soon as otherwise.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use machinen_protocol::{
    fuse::{REPLY_HEADER, RequestHeader, opcode, refusal},
    shares::{DIRECTORY_ATTRIBUTES, FRESH, NO_CAPABILITIES, OPEN_OUT},
};

use super::sockets::messages::{Entry, reply};

/// Files that are remembered to have no capabilities.
const MAX_FILES: usize = 64;
const CAPABILITIES: &[u8] = b"security.capability\0";
/// Bytes before the name in a request for an attribute (fuse_getxattr_in).
const GETXATTR_HEADER: usize = 8;
/// The request names an open file (FUSE_GETATTR_FH).
const OF_HANDLE: u8 = 1;

#[derive(Debug, Default)]
pub(super) struct Foreseen(Mutex<Answers>);

#[derive(Debug, Default)]
struct Answers {
    /// Counts the requests that change names or attributes.
    changes: u64,
    directory: Option<Directory>,
    without_capabilities: VecDeque<(u64, Instant)>,
}

#[derive(Debug)]
struct Directory {
    node: u64,
    attributes: [u8; DIRECTORY_ATTRIBUTES],
    since: Instant,
}

/// When a request was sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    changes: u64,
    at: Instant,
}

impl Foreseen {
    /// The answer to a request that the host has answered already.
    pub(super) fn answer(&self, request: RequestHeader, body: &[u8]) -> Option<Vec<u8>> {
        self.answer_at(request, body, Instant::now())
    }

    fn answer_at(&self, request: RequestHeader, body: &[u8], now: Instant) -> Option<Vec<u8>> {
        let mut answers = self.answers();
        match request.opcode {
            opcode::GETATTR if body.first().is_some_and(|flags| flags & OF_HANDLE == 0) => {
                let mut directory = answers.directory.take_if(|directory| directory.node == request.node)?;
                let left = FRESH.checked_sub(now.duration_since(directory.since))?;
                set_lifetime(&mut directory.attributes, left);
                Some(reply(request.unique, &directory.attributes))
            }
            opcode::GETXATTR if body.get(GETXATTR_HEADER..) == Some(CAPABILITIES) => {
                let is_fresh = |since: &Instant| now.duration_since(*since) < FRESH;
                let mut known = answers.without_capabilities.iter();
                known
                    .any(|(node, since)| *node == request.node && is_fresh(since))
                    .then(|| refusal(request.unique, libc::ENODATA).to_vec())
            }
            _ => None,
        }
    }

    /// A request is about to be sent to the host.
    pub(super) fn sends(&self, request: RequestHeader) -> Sent {
        let mut answers = self.answers();
        if changes_attributes(request.opcode) {
            answers.changes += 1;
            answers.directory = None;
        }
        if matches!(request.opcode, opcode::SETXATTR | opcode::REMOVEXATTR) {
            answers.without_capabilities.clear();
        }
        Sent { changes: answers.changes, at: Instant::now() }
    }

    /// Takes what is not for the kernel out of the reply to a request, and returns the length of the rest.
    pub(super) fn take(&self, request: RequestHeader, sent: Sent, message: &mut [u8]) -> usize {
        let body = match request.opcode {
            opcode::OPEN => OPEN_OUT,
            opcode::CREATE => Entry::SIZE + OPEN_OUT,
            opcode::UNLINK | opcode::RMDIR => 0,
            _ => return message.len(),
        };
        let length = REPLY_HEADER + body;
        let Some((reply, rest)) = message.split_at_mut_checked(length) else { return message.len() };
        let mut answers = self.answers();
        let is_valid = answers.changes == sent.changes;
        if let Some(attributes) = rest.as_array().copied().filter(|_| is_valid) {
            answers.directory = Some(Directory { node: request.node, attributes, since: sent.at });
        }
        let known = reply.len() - 4;
        if body > 0 && reply[known..] == NO_CAPABILITIES.to_le_bytes() && is_valid {
            let node = match request.opcode {
                opcode::CREATE => {
                    Entry::of_reply(&reply[..REPLY_HEADER + Entry::SIZE]).map_or(0, |entry| entry.node())
                }
                _ => request.node,
            };
            answers.without_capabilities.truncate(MAX_FILES - 1);
            answers.without_capabilities.push_front((node, sent.at));
        }
        if body > 0 {
            reply[known..].fill(0);
        }
        reply[..4].copy_from_slice(&(length as u32).to_le_bytes());
        length
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn changes_attributes(code: u32) -> bool {
    matches!(
        code,
        opcode::SETATTR
            | opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::LINK
            | opcode::SETXATTR
            | opcode::REMOVEXATTR
            | opcode::CREATE
            | opcode::RENAME2
    )
}

/// Sets how long the kernel may use the attributes (fuse_attr_out).
fn set_lifetime(attributes: &mut [u8; DIRECTORY_ATTRIBUTES], left: Duration) {
    attributes[..8].copy_from_slice(&left.as_secs().to_le_bytes());
    attributes[8..12].copy_from_slice(&left.subsec_nanos().to_le_bytes());
}

#[cfg(test)]
mod tests {
    use machinen_protocol::fuse::REQUEST_HEADER;

    use super::*;

    fn request(opcode: u32, node: u64) -> RequestHeader {
        RequestHeader { length: REQUEST_HEADER, opcode, unique: 5, node }
    }

    /// The reply to UNLINK, with the attributes of the directory.
    fn removed() -> Vec<u8> {
        reply(5, &[7; DIRECTORY_ATTRIBUTES])
    }

    fn opened(last: u32) -> Vec<u8> {
        reply(5, &[&[9; 12][..], &last.to_le_bytes()].concat())
    }

    fn take(foreseen: &Foreseen, opcode: u32, mut message: Vec<u8>) -> Vec<u8> {
        let sent = foreseen.sends(request(opcode, 3));
        let length = foreseen.take(request(opcode, 3), sent, &mut message);
        message.truncate(length);
        message
    }

    fn asks_for_capabilities(foreseen: &Foreseen, node: u64, later: Duration) -> Option<Vec<u8>> {
        let body = [&[0; GETXATTR_HEADER], CAPABILITIES].concat();
        foreseen.answer_at(request(opcode::GETXATTR, node), &body, Instant::now() + later)
    }

    #[test]
    fn a_directory_is_known_once_after_a_change_for_as_long_as_it_is_fresh() {
        let foreseen = Foreseen::default();
        let ask = |node, later| {
            foreseen.answer_at(request(opcode::GETATTR, node), &[0; 16], Instant::now() + later)
        };
        assert_eq!(take(&foreseen, opcode::UNLINK, removed()), reply(5, &[]));
        assert_eq!(ask(4, Duration::ZERO), None);
        let answer = ask(3, FRESH / 2).unwrap();
        let left = u32::from_le_bytes(answer[24..28].try_into().unwrap());
        assert_eq!((answer.len(), answer[16..24].to_vec()), (120, vec![0; 8]));
        assert!(left <= 500_000_000, "{left}");
        assert_eq!(ask(3, Duration::ZERO), None, "twice");
        take(&foreseen, opcode::UNLINK, removed());
        assert_eq!(ask(3, FRESH * 2), None);
    }

    #[test]
    fn what_another_request_may_have_changed_is_not_known() {
        let foreseen = Foreseen::default();
        let sent = foreseen.sends(request(opcode::RMDIR, 3));
        foreseen.sends(request(opcode::MKDIR, 3));
        foreseen.take(request(opcode::RMDIR, 3), sent, &mut removed());
        assert_eq!(foreseen.answer(request(opcode::GETATTR, 3), &[0; 16]), None);
        let sent = foreseen.sends(request(opcode::OPEN, 3));
        foreseen.sends(request(opcode::SETXATTR, 3));
        foreseen.take(request(opcode::OPEN, 3), sent, &mut opened(NO_CAPABILITIES));
        assert_eq!(asks_for_capabilities(&foreseen, 3, Duration::ZERO), None);
    }

    #[test]
    fn a_file_without_capabilities_is_known() {
        let foreseen = Foreseen::default();
        assert_eq!(take(&foreseen, opcode::OPEN, opened(0)), opened(0));
        assert_eq!(asks_for_capabilities(&foreseen, 3, Duration::ZERO), None);
        assert_eq!(take(&foreseen, opcode::OPEN, opened(NO_CAPABILITIES)), opened(0), "not for the kernel");
        let none = Some(refusal(5, libc::ENODATA).to_vec());
        assert_eq!(asks_for_capabilities(&foreseen, 3, Duration::ZERO), none);
        assert_eq!(asks_for_capabilities(&foreseen, 4, Duration::ZERO), None);
        assert_eq!(asks_for_capabilities(&foreseen, 3, FRESH), None);
        let mut created = reply(5, &[&[0; Entry::SIZE][..], &opened(NO_CAPABILITIES)[16..]].concat());
        created[16] = 8;
        created.extend([7; DIRECTORY_ATTRIBUTES]);
        let length = REPLY_HEADER + Entry::SIZE + OPEN_OUT;
        assert_eq!(take(&foreseen, opcode::CREATE, created).len(), length);
        assert_eq!(asks_for_capabilities(&foreseen, 8, Duration::ZERO), none);
        foreseen.sends(request(opcode::SETXATTR, 8));
        assert_eq!(asks_for_capabilities(&foreseen, 8, Duration::ZERO), None);
    }

    #[test]
    fn errors_and_short_replies_are_left_as_they_are() {
        let foreseen = Foreseen::default();
        for code in [opcode::OPEN, opcode::CREATE, opcode::UNLINK, opcode::READ] {
            let failed = refusal(5, libc::ENOENT).to_vec();
            assert_eq!(take(&foreseen, code, failed.clone()), failed);
        }
    }
}
