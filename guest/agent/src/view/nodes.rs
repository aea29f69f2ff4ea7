//! What the host's kernel calls the files that it knows.
//!
//! A node is a number for a file and the place where it was last seen: a name in another node. No descriptor is held for
//! it, since the kernel may know all files of an image at once. A name that the container gives to another file meanwhile is
//! found out when the place is visited; the kernel looks a name up each time it follows a path, which brings the place up
//! to date.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
};

/// Deeper than any path may be (PATH_MAX, by names of one letter).
const MAX_DEPTH: usize = 2048;

/// What makes two names the same file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    /// A directory may be mounted at several places, and for the host's kernel it can be at one only.
    pub(super) mount: u64,
    pub(super) device: (u32, u32),
    pub(super) inode: u64,
}

#[derive(Debug)]
pub(super) struct Nodes {
    root: u64,
    nodes: HashMap<u64, Node>,
    known: HashMap<Identity, u64>,
    next: u64,
}

#[derive(Debug)]
struct Node {
    parent: u64,
    name: OsString,
    identity: Identity,
    /// How often the kernel was told of it, and has not forgotten it.
    lookups: u64,
    /// Nodes that are in it.
    children: u64,
}

impl Nodes {
    /// Only the root, which is never forgotten. Numbers are given from `first` on.
    pub(super) fn new(root: u64, first: u64) -> Self {
        Self { root, nodes: HashMap::new(), known: HashMap::new(), next: first }
    }

    /// The names that lead to a node, and the root's are none. None when there is no such node.
    pub(super) fn path(&self, node: u64) -> Option<Vec<&OsStr>> {
        let mut names = Vec::new();
        let mut at = node;
        while at != self.root {
            let node = self.nodes.get(&at)?;
            names.push(node.name.as_os_str());
            at = node.parent;
            if names.len() > MAX_DEPTH {
                return None;
            }
        }
        names.reverse();
        Some(names)
    }

    /// Which file a node is, as far as is known; the root is what it is.
    pub(super) fn identity(&self, node: u64) -> Option<Identity> {
        self.nodes.get(&node).map(|node| node.identity)
    }

    /// A name was looked up, and the kernel is told which node it is.
    pub(super) fn found(&mut self, parent: u64, name: &OsStr, identity: Identity) -> u64 {
        let number = match self.known.get(&identity) {
            Some(&number) => {
                self.place(number, parent, name);
                number
            }
            None => {
                let number = self.next;
                self.next += 1;
                let node = Node { parent, name: name.to_owned(), identity, lookups: 0, children: 0 };
                self.nodes.insert(number, node);
                self.known.insert(identity, number);
                self.count(parent);
                number
            }
        };
        if let Some(node) = self.nodes.get_mut(&number) {
            node.lookups += 1;
        }
        number
    }

    /// A file has got another name.
    pub(super) fn moved(&mut self, identity: Identity, parent: u64, name: &OsStr) {
        if let Some(&number) = self.known.get(&identity) {
            self.place(number, parent, name);
        }
    }

    /// A file is another to the kernel of the guest and the same to its users: an overlay has copied it.
    pub(super) fn became(&mut self, number: u64, identity: Identity) {
        let Some(node) = self.nodes.get_mut(&number) else { return };
        if node.identity != identity && !self.known.contains_key(&identity) {
            self.known.remove(&node.identity);
            self.known.insert(identity, number);
            node.identity = identity;
        }
    }

    /// The kernel has forgotten that it was told of a node `lookups` times.
    pub(super) fn forget(&mut self, number: u64, lookups: u64) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.lookups = node.lookups.saturating_sub(lookups);
        }
        self.drop_unused(number);
    }

    fn place(&mut self, number: u64, parent: u64, name: &OsStr) {
        let Some(node) = self.nodes.get_mut(&number) else { return };
        if node.name != name {
            node.name = name.to_owned();
        }
        if node.parent != parent {
            let left = std::mem::replace(&mut node.parent, parent);
            self.count(parent);
            self.uncount(left);
        }
    }

    fn count(&mut self, parent: u64) {
        if let Some(parent) = self.nodes.get_mut(&parent) {
            parent.children += 1;
        }
    }

    fn uncount(&mut self, parent: u64) {
        if let Some(node) = self.nodes.get_mut(&parent) {
            node.children -= 1;
            self.drop_unused(parent);
        }
    }

    /// Goes up as long as what was used only by the one below is used no more.
    fn drop_unused(&mut self, number: u64) {
        let mut at = number;
        while let Some(node) = self.nodes.get(&at)
            && node.lookups == 0
            && node.children == 0
            && let Some(node) = self.nodes.remove(&at)
        {
            if self.known.get(&node.identity) == Some(&at) {
                self.known.remove(&node.identity);
            }
            at = node.parent;
            if let Some(parent) = self.nodes.get_mut(&at) {
                parent.children -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: u64 = 1;

    fn file(inode: u64) -> Identity {
        Identity { mount: 1, device: (8, 0), inode }
    }

    fn path(nodes: &Nodes, node: u64) -> Option<String> {
        let names = nodes.path(node)?;
        Some(names.iter().map(|name| name.to_str().unwrap()).collect::<Vec<_>>().join("/"))
    }

    fn nodes() -> Nodes {
        Nodes::new(ROOT, 100)
    }

    #[test]
    fn a_file_is_where_it_was_last_seen() {
        let mut nodes = nodes();
        let dir = nodes.found(ROOT, "dir".as_ref(), file(10));
        let one = nodes.found(dir, "one".as_ref(), file(11));
        assert_eq!(path(&nodes, one).as_deref(), Some("dir/one"));
        assert_eq!(nodes.found(ROOT, "two".as_ref(), file(11)), one, "a hard link");
        assert_eq!(path(&nodes, one).as_deref(), Some("two"));
        nodes.moved(file(10), ROOT, "other".as_ref());
        nodes.moved(file(11), dir, "three".as_ref());
        assert_eq!(path(&nodes, one).as_deref(), Some("other/three"));
        assert_eq!(path(&nodes, ROOT).as_deref(), Some(""));
        assert_eq!(path(&nodes, 7), None);
    }

    #[test]
    fn what_is_forgotten_is_gone_when_nothing_is_in_it() {
        let mut nodes = nodes();
        let dir = nodes.found(ROOT, "dir".as_ref(), file(10));
        let sub = nodes.found(dir, "sub".as_ref(), file(11));
        let one = nodes.found(sub, "one".as_ref(), file(12));
        assert_eq!(nodes.found(sub, "one".as_ref(), file(12)), one);
        nodes.forget(dir, 1);
        nodes.forget(sub, 1);
        nodes.forget(one, 1);
        assert_eq!(path(&nodes, one).as_deref(), Some("dir/sub/one"), "known once more");
        nodes.forget(one, u64::MAX);
        assert!(nodes.nodes.is_empty() && nodes.known.is_empty(), "{nodes:?}");
        assert_ne!(nodes.found(ROOT, "dir".as_ref(), file(10)), dir, "a number is not used again");
    }

    #[test]
    fn a_copied_file_keeps_its_number() {
        let mut nodes = nodes();
        let one = nodes.found(ROOT, "one".as_ref(), file(11));
        nodes.became(one, file(500));
        assert_eq!(nodes.found(ROOT, "one".as_ref(), file(500)), one);
        let other = nodes.found(ROOT, "other".as_ref(), file(11));
        assert_ne!(other, one, "another may have what was its inode");
        nodes.became(other, file(500));
        nodes.forget(other, 1);
        assert_eq!(nodes.found(ROOT, "one".as_ref(), file(500)), one);
    }

    #[test]
    fn places_that_lead_nowhere_are_told() {
        let mut nodes = nodes();
        let a = nodes.found(ROOT, "a".as_ref(), file(10));
        let b = nodes.found(a, "b".as_ref(), file(11));
        nodes.found(b, "a".as_ref(), file(10));
        assert_eq!(nodes.path(a), None);
    }
}
