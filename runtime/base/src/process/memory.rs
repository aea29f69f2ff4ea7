//! What a process and its descendants take of the host's memory.

use std::{collections::HashMap, fs};

use nix::{
    errno::Errno,
    sys::wait::{Id, WaitPidFlag, waitid},
};

use super::twin;

/// The proportional share (PSS) of the process `pid` and all its descendants, bytes. A process that has ended
/// meanwhile counts as 0.
pub fn tree_pss(pid: u32) -> u64 {
    tree(pid).into_iter().filter_map(pss).sum()
}

/// The pids of all descendants of this process, and of its twins. Without any, the processes of the host are not searched.
pub fn descendants() -> Vec<u32> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    match waitid(Id::All, flags) {
        Err(Errno::ECHILD) => Vec::new(),
        _ => tree(std::process::id()).split_off(1),
    }
}

/// A process and its descendants, parents first.
fn tree(pid: u32) -> Vec<u32> {
    let children = children();
    let mut tree = vec![pid];
    let mut next = 0;
    while let Some(parent) = tree.get(next) {
        let found = children.get(parent).into_iter().flatten().copied();
        let found: Vec<_> = found.filter(|child| !tree.contains(child)).collect();
        tree.extend(found);
        next += 1;
    }
    tree
}

/// Whether this process keeps the twin `pid` ([`super::Twin`]), which has another parent.
pub fn is_own_twin(pid: u32) -> bool {
    twin::living().contains(&pid)
}

/// The children of all processes. A twin counts as a child of the process that keeps it.
fn children() -> HashMap<u32, Vec<u32>> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let read = |name| fs::read_to_string(entry.path().join(name)).ok();
        if let Some(pid) = pid
            && let Some(parent) = read("status").as_deref().and_then(keeper).or_else(|| parent_of(pid))
        {
            children.entry(parent).or_default().push(pid);
        }
    }
    children
}

/// The parent of a process; None if there is no such process.
pub fn parent_of(pid: u32) -> Option<u32> {
    parent(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The fourth field; the second is a name in parentheses, which may have anything in it.
fn parent(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// The process that traces another one, by the text of its status.
fn keeper(status: &str) -> Option<u32> {
    let number =
        |text: &str, name| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u32>().ok());
    let thread = number(status, "TracerPid:").filter(|thread| *thread != 0)?;
    number(&fs::read_to_string(format!("/proc/{thread}/status")).ok()?, "Tgid:")
}

fn pss(pid: u32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Spawn;

    #[test]
    fn parents_are_found_whatever_a_process_is_called() {
        assert_eq!(parent("7 (a) 9) S 12 7 7 0"), Some(12));
        assert_eq!(parent("7"), None);
    }

    #[tokio::test]
    async fn descendants_count() {
        let alone = tree_pss(std::process::id());
        assert!(alone > 0);
        let child = Spawn::new("sleep").args(["100"]).start().unwrap();
        let own = pss(std::process::id()).unwrap();
        assert!(tree_pss(child.pid()) > 0 && tree_pss(std::process::id()) > own / 2);
        assert!(children()[&std::process::id()].contains(&child.pid()));
        assert!(descendants().contains(&child.pid()));
        child.kill().await.unwrap();
        assert_eq!(tree_pss(0x7fff_ffff), 0);
    }
}
