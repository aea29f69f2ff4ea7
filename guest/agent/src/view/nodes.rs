//! The files that the host's kernel knows, by the numbers that it has for them.
//!
//! A node is a number for a file, and the place where the file was last seen: a name in another node. The
//! server keeps no descriptor for a node, since the kernel may know all files of an image at once. If the
//! container gives the name to another file, the server notices when it visits the place. The kernel looks up
//! each name whenever it follows a path, and each lookup updates the place.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
};

/// More elements than any path has (PATH_MAX, with names of one letter).
const MAX_DEPTH: usize = 2048;

/// Two names with the same identity are the same file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FileIdentity {
    /// Part of the identity because a directory may be mounted at several places, but the host's kernel
    /// allows only one place for each directory.
    pub(super) mount: u64,
    pub(super) device: (u32, u32),
    pub(super) inode: u64,
}

#[derive(Debug)]
pub(super) struct Nodes {
    root: u64,
    nodes: HashMap<u64, Node>,
    known: HashMap<FileIdentity, u64>,
    next: u64,
}

#[derive(Debug)]
struct Node {
    parent: u64,
    name: OsString,
    identity: FileIdentity,
    /// Number of lookups that have returned this node to the kernel, minus those that the kernel has
    /// forgotten.
    lookups: u64,
    /// Number of nodes in this directory.
    children: u64,
}

impl Nodes {
    /// Knows only the root, which is never forgotten. New numbers start at `first`.
    pub(super) fn new(root: u64, first: u64) -> Self {
        Self { root, nodes: HashMap::new(), known: HashMap::new(), next: first }
    }

    /// The names on the path to a node; empty for the root. None when the node does not exist.
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

    /// The last known identity of a node's file; None for the root.
    pub(super) fn identity(&self, node: u64) -> Option<FileIdentity> {
        self.nodes.get(&node).map(|node| node.identity)
    }

    /// Records the result of a lookup, and returns the node's number.
    pub(super) fn found(&mut self, parent: u64, name: &OsStr, identity: FileIdentity) -> u64 {
        let number = match self.known.get(&identity) {
            Some(&number) => {
                self.set_place(number, parent, name);
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

    /// Records that a file was renamed.
    pub(super) fn moved(&mut self, identity: FileIdentity, parent: u64, name: &OsStr) {
        if let Some(&number) = self.known.get(&identity) {
            self.set_place(number, parent, name);
        }
    }

    /// Records a new identity of the same file: an overlay has copied it.
    pub(super) fn set_identity(&mut self, number: u64, identity: FileIdentity) {
        let Some(node) = self.nodes.get_mut(&number) else { return };
        if node.identity != identity && !self.known.contains_key(&identity) {
            self.known.remove(&node.identity);
            self.known.insert(identity, number);
            node.identity = identity;
        }
    }

    /// Records that the kernel has forgotten `lookups` results of lookups for a node.
    pub(super) fn forget(&mut self, number: u64, lookups: u64) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.lookups = node.lookups.saturating_sub(lookups);
        }
        self.drop_unused(number);
    }

    fn set_place(&mut self, number: u64, parent: u64, name: &OsStr) {
        let Some(node) = self.nodes.get_mut(&number) else { return };
        if node.name != name {
            node.name = name.to_owned();
        }
        if node.parent != parent {
            let old_parent = std::mem::replace(&mut node.parent, parent);
            self.count(parent);
            self.uncount(old_parent);
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

    /// Drops the node if it is unused, and then each parent that has become unused by that.
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

    fn file(inode: u64) -> FileIdentity {
        FileIdentity { mount: 1, device: (8, 0), inode }
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
        nodes.set_identity(one, file(500));
        assert_eq!(nodes.found(ROOT, "one".as_ref(), file(500)), one);
        let other = nodes.found(ROOT, "other".as_ref(), file(11));
        assert_ne!(other, one, "another may have what was its inode");
        nodes.set_identity(other, file(500));
        nodes.forget(other, 1);
        assert_eq!(nodes.found(ROOT, "one".as_ref(), file(500)), one);
    }

    #[test]
    fn places_that_lead_nowhere_are_recognised() {
        let mut nodes = nodes();
        let a = nodes.found(ROOT, "a".as_ref(), file(10));
        let b = nodes.found(a, "b".as_ref(), file(11));
        nodes.found(b, "a".as_ref(), file(10));
        assert_eq!(nodes.path(a), None);
    }
}
