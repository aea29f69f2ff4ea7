//! The parts of FUSE messages (linux/fuse.h) that the agent makes or examines itself.
//!
//! | what | where |
//! |---|---|
//! | fuse_entry_out, the reply to a lookup | node 0..8, lifetimes 16..24 and 32..36, attributes from 40 on with the mode at 60 |
//! | fuse_direntplus | fuse_entry_out, fuse_dirent with the length of the name at 16, the name; a multiple of 8 bytes |
//! | fuse_forget_in | how many lookups are forgotten 0..8 |
//! | fuse_notify_delete_out | the directory's node 0..8, the file's 8..16, the length of the name 16..20; from 24 on the name and a NUL |
//! | fuse_batch_forget_in | how many nodes 0..4; from 8 on for each of them the node and a fuse_forget_in |

use machinen_protocol::{
    fuse::{REPLY_HEADER, REQUEST_HEADER, RequestHeader, opcode},
    sockets::KIND_OF_SOCKET,
};

const ENTRY: usize = 128;
const MODE: usize = 100;
const DIRENT: usize = 24;

/// What a name in a directory stands for (fuse_entry_out).
#[derive(Debug, Clone, Copy)]
pub(in crate::shares) struct Entry([u8; ENTRY]);

impl Entry {
    /// The entry of a whole reply, if the reply is one with an entry.
    pub(in crate::shares) fn of_reply(reply: &[u8]) -> Option<Self> {
        reply.get(REPLY_HEADER..)?.as_array().copied().map(Self)
    }

    /// A directory that only root may use. The kernel need not ask again.
    pub(in crate::shares) fn directory(node: u64) -> Self {
        let mut entry = [0; ENTRY];
        entry[..8].copy_from_slice(&node.to_le_bytes());
        entry[16..24].copy_from_slice(&u64::from(u32::MAX).to_le_bytes());
        entry[24..32].copy_from_slice(&u64::from(u32::MAX).to_le_bytes());
        entry[40..48].copy_from_slice(&node.to_le_bytes());
        entry[MODE..MODE + 4].copy_from_slice(&(libc::S_IFDIR | 0o700).to_le_bytes());
        entry[MODE + 4..MODE + 8].copy_from_slice(&2_u32.to_le_bytes());
        Self(entry)
    }

    /// A symbolic link, of which the kernel keeps neither the name nor the attributes.
    pub(in crate::shares) fn link(node: u64) -> Self {
        let mut entry = [0; ENTRY];
        entry[..8].copy_from_slice(&node.to_le_bytes());
        entry[40..48].copy_from_slice(&node.to_le_bytes());
        entry[MODE..MODE + 4].copy_from_slice(&(libc::S_IFLNK | 0o777).to_le_bytes());
        entry[MODE + 4..MODE + 8].copy_from_slice(&1_u32.to_le_bytes());
        Self(entry)
    }

    pub(in crate::shares) fn node(&self) -> u64 {
        u64_at(&self.0, 0)
    }

    pub(in crate::shares) fn is_socket(&self) -> bool {
        u32_at(&self.0, MODE) & libc::S_IFMT == libc::S_IFSOCK
    }

    /// The same without a lifetime of its name: the kernel forgets it as soon as it is not used.
    pub(in crate::shares) fn with_short_name(mut self) -> Self {
        self.0[16..24].fill(0);
        self.0[32..36].fill(0);
        self
    }

    /// The reply to the request `unique`.
    pub(in crate::shares) fn reply(&self, unique: u64) -> Vec<u8> {
        reply(unique, &self.0)
    }

    /// The reply to a request for the attributes.
    pub(in crate::shares) fn attributes(&self, unique: u64) -> Vec<u8> {
        // fuse_attr_out: the lifetime and a padding, then the attributes.
        reply(unique, &[&self.0[24..32], &[0; 8], &self.0[40..]].concat())
    }
}

/// The reply with this body to the request `unique`.
pub(in crate::shares) fn reply(unique: u64, body: &[u8]) -> Vec<u8> {
    let length = (REPLY_HEADER + body.len()) as u32;
    [&length.to_le_bytes()[..], &[0; 4], &unique.to_le_bytes(), body].concat()
}

fn request(code: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let length = (REQUEST_HEADER + body.len()) as u32;
    let numbers = [&length.to_le_bytes()[..], &code.to_le_bytes()].concat();
    [&numbers, &unique.to_le_bytes()[..], &node.to_le_bytes(), &[0; 16], body].concat()
}

/// Asks the host what is bound to a socket.
pub(in crate::shares) fn question(unique: u64, node: u64) -> Vec<u8> {
    request(KIND_OF_SOCKET, unique, node, &[])
}

/// Tells the host that one lookup of a node is forgotten. There is no reply.
pub(in crate::shares) fn forget(node: u64) -> Vec<u8> {
    request(opcode::FORGET, 0, node, &1_u64.to_le_bytes())
}

/// The reply to the request `unique` that it is done.
pub(in crate::shares) fn acknowledgement(unique: u64) -> Vec<u8> {
    reply(unique, &[])
}

/// Tells the kernel that a file is removed.
pub(in crate::shares) fn deletion(parent: u64, node: u64, name: &[u8]) -> Vec<u8> {
    const FUSE_NOTIFY_DELETE: u32 = 6;
    let length = (REPLY_HEADER + 24 + name.len() + 1) as u32;
    let header = [&length.to_le_bytes()[..], &FUSE_NOTIFY_DELETE.to_le_bytes(), &[0; 8]].concat();
    let nodes = [parent.to_le_bytes(), node.to_le_bytes()].concat();
    [&header, &nodes, &(name.len() as u32).to_le_bytes()[..], &[0; 4], name, &[0]].concat()
}

/// The nodes that a request forgets, and how many lookups of each.
pub(in crate::shares) fn forgotten(header: RequestHeader, body: &[u8]) -> Vec<(u64, u64)> {
    match header.opcode {
        opcode::FORGET if body.len() >= 8 => vec![(header.node, u64_at(body, 0))],
        opcode::BATCH_FORGET => {
            let nodes = body.get(8..).unwrap_or_default().as_chunks::<16>().0;
            nodes.iter().map(|node| (u64_at(node, 0), u64_at(node, 8))).collect()
        }
        _ => Vec::new(),
    }
}

/// Removes the lookups of sockets from the body of a reply to READDIRPLUS, so that the kernel looks each up when a process
/// uses it, and returns their nodes.
pub(in crate::shares) fn take_sockets(mut listing: &mut [u8]) -> Vec<u64> {
    let mut taken = Vec::new();
    while let Some(entry) = listing.first_chunk::<ENTRY>().copied().map(Entry) {
        let Some(name) = listing.get(ENTRY + 16..ENTRY + 20) else { break };
        let name = u32_at(name, 0) as usize;
        if entry.is_socket() && entry.node() != 0 {
            taken.push(entry.node());
            listing[..8].fill(0);
        }
        let length = (ENTRY + DIRENT + name).next_multiple_of(8);
        listing = listing.get_mut(length..).unwrap_or_default();
    }
    taken
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

    fn entry(node: u64, mode: u32) -> [u8; ENTRY] {
        let mut entry = [7; ENTRY];
        entry[..8].copy_from_slice(&node.to_le_bytes());
        entry[MODE..MODE + 4].copy_from_slice(&mode.to_le_bytes());
        entry
    }

    fn listed(node: u64, mode: u32, name: &str) -> Vec<u8> {
        let mut bytes = entry(node, mode).to_vec();
        bytes.extend([0; 16]);
        bytes.extend((name.len() as u32).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn sockets_of_a_listing_are_not_looked_up() {
        let file = listed(5, libc::S_IFREG | 0o644, "file");
        let list = [
            listed(0, libc::S_IFDIR, "."),
            listed(9, libc::S_IFSOCK | 0o666, "socket-with-a-name"),
            file.clone(),
            listed(10, libc::S_IFSOCK, "s"),
        ];
        let mut listing = list.concat();
        assert_eq!(take_sockets(&mut listing), [9, 10]);
        let at = list[0].len() + list[1].len();
        assert_eq!(listing[at..at + file.len()], file);
        assert_eq!(listing[list[0].len()..][..8], [0; 8]);
        assert!(take_sockets(&mut listing).is_empty());
        // What is cut off is left as it is.
        assert!(take_sockets(&mut list[1].clone()[..ENTRY + 10]).is_empty());
    }

    #[test]
    fn entries_of_replies() {
        let reply = reply(3, &entry(9, libc::S_IFSOCK));
        let found = Entry::of_reply(&reply).unwrap();
        assert!(found.is_socket() && found.node() == 9);
        assert_eq!(found.reply(3), reply);
        let short = found.with_short_name().reply(3);
        assert_eq!((short.len(), &short[32..40], &short[48..52]), (144, &[0; 8][..], &[0; 4][..]));
        assert_eq!(found.attributes(3).len(), 120);
        assert!(Entry::of_reply(&reply[..16]).is_none());
        assert!(!Entry::directory(4).is_socket());
    }

    #[test]
    fn a_removed_file_is_named_by_its_directory() {
        let message = deletion(3, 0x0102, b"key");
        let golden = b"\x2c\0\0\0\x06\0\0\0\0\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x02\x01\0\0\0\0\0\0\x03\0\0\0\0\0\0\0key\0";
        assert_eq!(message, golden);
        let link = Entry::link(5).reply(3);
        // The name has no lifetime.
        assert_eq!((Entry::of_reply(&link).unwrap().node(), &link[32..40]), (5, &[0; 8][..]));
    }

    #[test]
    fn forgotten_nodes_are_counted() {
        let header = |message: &[u8]| RequestHeader::decode(message.first_chunk().unwrap()).unwrap();
        let one = forget(9);
        assert_eq!(forgotten(header(&one), &one[REQUEST_HEADER..]), [(9, 1)]);
        let body: Vec<u8> = [2, 9, 3, 10, 1_u64].iter().flat_map(|word| word.to_le_bytes()).collect();
        let several = request(opcode::BATCH_FORGET, 0, 0, &body);
        assert_eq!(forgotten(header(&several), &several[REQUEST_HEADER..]), [(9, 3), (10, 1)]);
        let other = question(1, 9);
        assert!(forgotten(header(&other), &[]).is_empty());
    }
}
