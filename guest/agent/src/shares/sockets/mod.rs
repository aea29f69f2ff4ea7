//! Sockets of the host in volumes: a process of a container that connects to one reaches the host's process.
//!
//! ```text
//!   connect(2) ──> kernel: LOOKUP ──> host: a socket ──> the agent binds a socket of its own to the same inode
//!                  kernel: finds the agent's socket <──── the reply to LOOKUP
//! ```
//! The kernel finds the listening socket of a connection by the inode of the file, so the agent needs a name for that inode
//! that it may bind. Such names are in a directory of the file system that the agent itself serves ([`HIDDEN`]): when the
//! agent binds a name there, the kernel asks for a new file, and gets the socket's node. A lookup is answered only after
//! that, so no process can be too early. Containers do not see the directory.
//!
//! Sockets that processes of the guest have bound are theirs. The agent must know them, because the kernel would find the
//! agent's socket first.

mod connect;
pub(super) mod messages;

use std::{
    collections::HashMap,
    ffi::CStr,
    io,
    os::unix::net::UnixListener as StdUnixListener,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use machinen_protocol::{
    fuse::{ROOT, RequestHeader, opcode, refusal},
    shares::MOUNT_POINT,
    sockets::MAX_SOCKETS,
};
use tokio::{
    net::UnixListener,
    sync::watch,
    task::{AbortHandle, spawn_blocking},
};

use self::{connect::OfferedStreams, messages::Entry};
use crate::channel::Stream;

/// The name of the agent's own directory in the root of the file system.
const HIDDEN: &CStr = c".machinen-sockets";
/// The node of that directory. The host counts from 1.
const HIDDEN_NODE: u64 = 1 << 63;
/// Bytes before the name in a request to make a file (fuse_mknod_in).
const MKNOD_HEADER: usize = 16;

/// The sockets in the volumes.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    table: Mutex<SocketTable>,
    streams: Arc<OfferedStreams>,
}

#[derive(Debug, Default)]
struct SocketTable {
    /// Sockets of processes of the guest, and how often the kernel has looked each up.
    own: HashMap<u64, u64>,
    /// Sockets of the host, by their nodes.
    hosts: HashMap<u64, HostSocket>,
    /// What the kernel gets for a name of the hidden directory that is being bound.
    names: HashMap<u64, Entry>,
    /// Counts lookups of sockets; it is also the next name.
    clock: u64,
}

#[derive(Debug)]
struct HostSocket {
    /// True when the agent's socket is bound; closed when it cannot be.
    bound: watch::Receiver<bool>,
    /// A volume by itself. The kernel does not look it up again, so it must stay.
    is_volume: bool,
    used: u64,
    serving: Option<AbortHandle>,
}

/// What has to happen before the kernel gets the reply to a lookup.
#[derive(Debug)]
pub(super) enum Lookup {
    /// Nothing.
    Known,
    /// Another lookup is having the socket bound.
    Waits(watch::Receiver<bool>),
    /// The socket has to be bound, if the host has one.
    New(NewSocket),
}

/// A socket of the host that is not bound yet. If this is dropped, it is not known any more.
#[derive(Debug)]
pub(super) struct NewSocket {
    sockets: Arc<Sockets>,
    node: u64,
    is_volume: bool,
    bound: watch::Sender<bool>,
}

impl Sockets {
    /// Keeps a stream of the host for the next connection.
    pub(super) async fn offer(&self, stream: Stream) {
        self.streams.add(stream).await;
    }

    /// Answers a request that is about the agent's own directory. Nothing is sent for an empty answer.
    pub(super) fn answer(&self, request: RequestHeader, body: &[u8]) -> Option<Vec<u8>> {
        let name = |from: usize| CStr::from_bytes_until_nul(body.get(from..).unwrap_or_default()).ok();
        let directory = Entry::directory(HIDDEN_NODE);
        match (request.node, request.opcode) {
            (ROOT, opcode::LOOKUP) if name(0) == Some(HIDDEN) => Some(directory.reply(request.unique)),
            (HIDDEN_NODE, opcode::FORGET) => Some(Vec::new()),
            (HIDDEN_NODE, opcode::GETATTR) => Some(directory.attributes(request.unique)),
            (HIDDEN_NODE, opcode::LOOKUP) => Some(refusal(request.unique, libc::ENOENT).to_vec()),
            (HIDDEN_NODE, opcode::MKNOD) => {
                let number = name(MKNOD_HEADER).and_then(|name| name.to_str().ok()?.parse().ok());
                let entry = number.and_then(|number: u64| self.table().names.remove(&number));
                let refused = || refusal(request.unique, libc::EPERM).to_vec();
                Some(entry.map_or_else(refused, |entry| entry.with_short_name().reply(request.unique)))
            }
            (HIDDEN_NODE, _) => Some(refusal(request.unique, libc::EPERM).to_vec()),
            _ => None,
        }
    }

    /// Follows what the kernel forgets.
    pub(super) fn forget(&self, request: RequestHeader, body: &[u8]) {
        let own = &mut self.table().own;
        if own.is_empty() {
            return;
        }
        for (node, lookups) in messages::forgotten(request, body) {
            if let Some(known) = own.get_mut(&node) {
                *known = known.saturating_sub(lookups);
                if *known == 0 {
                    own.remove(&node);
                }
            }
        }
    }

    /// What has to happen before the kernel gets this entry, which is the reply to the request.
    pub(super) fn examine(self: &Arc<Self>, request: RequestHeader, entry: &Entry) -> Lookup {
        let node = entry.node();
        if !entry.is_socket() {
            return Lookup::Known;
        }
        let mut table = self.table();
        table.clock += 1;
        let now = table.clock;
        if request.opcode == opcode::MKNOD {
            table.own.insert(node, 1);
            return Lookup::Known;
        }
        if let Some(lookups) = table.own.get_mut(&node) {
            *lookups += 1;
            return Lookup::Known;
        }
        if let Some(host) = table.hosts.get_mut(&node) {
            host.used = now;
            return if *host.bound.borrow() { Lookup::Known } else { Lookup::Waits(host.bound.clone()) };
        }
        if request.opcode != opcode::LOOKUP || !table.has_room() {
            return Lookup::Known;
        }
        let (bound, waits) = watch::channel(false);
        let is_volume = request.node == ROOT;
        table.hosts.insert(node, HostSocket { bound: waits, is_volume, used: now, serving: None });
        Lookup::New(NewSocket { sockets: Arc::clone(self), node, is_volume, bound })
    }

    fn table(&self) -> MutexGuard<'_, SocketTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SocketTable {
    /// Makes room for one more socket of the host, by ending the one that was looked up the longest time ago.
    fn has_room(&mut self) -> bool {
        if self.hosts.len() < MAX_SOCKETS {
            return true;
        }
        let unneeded = self.hosts.iter().filter(|(_, host)| !host.is_volume && host.serving.is_some());
        let oldest = unneeded.min_by_key(|(_, host)| host.used).map(|(&node, _)| node);
        let Some(host) = oldest.and_then(|node| self.hosts.remove(&node)) else { return false };
        if let Some(serving) = host.serving {
            serving.abort();
        }
        true
    }
}

impl NewSocket {
    pub(super) fn node(&self) -> u64 {
        self.node
    }

    /// Binds a socket of the agent to the node, so that processes can connect to it. `entry` is the reply to a lookup of the
    /// node that the kernel has not got; with it the kernel makes the agent's own name.
    pub(super) async fn bind(self, entry: Entry) -> io::Result<()> {
        let name = {
            let mut table = self.sockets.table();
            table.clock += 1;
            let name = table.clock;
            table.names.insert(name, entry);
            name
        };
        let path = Path::new(MOUNT_POINT).join(HIDDEN.to_string_lossy().as_ref()).join(name.to_string());
        // The kernel asks this process for the file, so another thread waits.
        let bound = spawn_blocking(move || StdUnixListener::bind(path)).await;
        self.sockets.table().names.remove(&name);
        let listener = bound.map_err(io::Error::other)??;
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let serving = connect::serve(listener, self.node, self.is_volume, Arc::clone(&self.sockets.streams));
        let mut table = self.sockets.table();
        if let Some(host) = table.hosts.get_mut(&self.node) {
            let (sockets, node) = (Arc::clone(&self.sockets), self.node);
            let serving = tokio::spawn(async move {
                serving.await;
                sockets.table().hosts.remove(&node);
            });
            host.serving = Some(serving.abort_handle());
        }
        self.bound.send_replace(true);
        Ok(())
    }
}

impl Drop for NewSocket {
    fn drop(&mut self) {
        if !*self.bound.borrow() {
            self.sockets.table().hosts.remove(&self.node);
        }
    }
}

#[cfg(test)]
mod tests {
    use machinen_protocol::fuse::REQUEST_HEADER;

    use super::*;

    fn request(opcode: u32, node: u64) -> RequestHeader {
        RequestHeader { length: REQUEST_HEADER, opcode, unique: 5, node }
    }

    fn socket(node: u64) -> Entry {
        let mut reply = vec![0; 144];
        reply[16..24].copy_from_slice(&node.to_le_bytes());
        reply[116..120].copy_from_slice(&libc::S_IFSOCK.to_le_bytes());
        Entry::of_reply(&reply).unwrap()
    }

    #[test]
    fn sockets_of_the_guest_are_left_to_it_until_they_are_forgotten() {
        let sockets = Arc::new(Sockets::default());
        assert!(matches!(sockets.examine(request(opcode::MKNOD, 2), &socket(9)), Lookup::Known));
        assert!(matches!(sockets.examine(request(opcode::LOOKUP, 2), &socket(9)), Lookup::Known));
        let lookups = |count: u64| count.to_le_bytes();
        sockets.forget(request(opcode::FORGET, 9), &lookups(1));
        assert!(matches!(sockets.examine(request(opcode::LOOKUP, 2), &socket(9)), Lookup::Known));
        sockets.forget(request(opcode::FORGET, 9), &lookups(2));
        assert!(matches!(sockets.examine(request(opcode::LOOKUP, 2), &socket(9)), Lookup::New(_)));
    }

    #[test]
    fn a_socket_of_the_host_is_bound_once() {
        let sockets = Arc::new(Sockets::default());
        let lookup = || sockets.examine(request(opcode::LOOKUP, 2), &socket(9));
        let first = lookup();
        assert!(matches!(first, Lookup::New(_)));
        assert!(matches!(lookup(), Lookup::Waits(_)));
        // The first lookup ends without a socket.
        drop(first);
        assert!(matches!(lookup(), Lookup::New(_)));
    }

    #[test]
    fn the_sockets_are_bounded() {
        let sockets = Arc::new(Sockets::default());
        let lookup = |node| sockets.examine(request(opcode::LOOKUP, 2), &socket(node));
        let new: Vec<_> = (10..).take(MAX_SOCKETS).map(lookup).collect();
        assert!(new.iter().all(|lookup| matches!(lookup, Lookup::New(_))));
        assert!(matches!(lookup(5), Lookup::Known));
    }

    #[test]
    fn only_names_that_are_being_bound_are_made() {
        let sockets = Sockets::default();
        let answer = |opcode, node, body: &[u8]| sockets.answer(request(opcode, node), body);
        assert!(answer(opcode::LOOKUP, ROOT, b"dir-0\0").is_none());
        let directory = answer(opcode::LOOKUP, ROOT, b".machinen-sockets\0").unwrap();
        assert_eq!(Entry::of_reply(&directory).unwrap().node(), HIDDEN_NODE);
        sockets.table().names.insert(7, socket(9));
        let make = [&[0; MKNOD_HEADER][..], b"7\0"].concat();
        let made = answer(opcode::MKNOD, HIDDEN_NODE, &make).unwrap();
        assert_eq!(Entry::of_reply(&made).unwrap().node(), 9);
        let refused = answer(opcode::MKNOD, HIDDEN_NODE, &make).unwrap();
        assert_eq!(refused, refusal(5, libc::EPERM));
        assert_eq!(answer(opcode::FORGET, HIDDEN_NODE, &[]), Some(Vec::new()));
    }
}
