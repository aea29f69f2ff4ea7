//! The restrictions of a child process.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use serde::{Deserialize, Serialize};

use crate::sys::child::{Bond, ChildSetup};

/// The user and the groups that a child process runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunAs {
    /// The real, effective and saved user id.
    pub uid: u32,
    /// The real, effective and saved group id.
    pub gid: u32,
    /// Supplementary groups; all others are dropped.
    pub groups: Vec<u32>,
}

/// Namespaces that a child process gets of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// A network namespace without any connection (network_namespaces(7)).
    pub net: bool,
    /// Unmounts on the host still propagate into it, so that it never keeps a file system busy.
    pub mount: bool,
    /// An IPC namespace (ipc_namespaces(7)).
    pub ipc: bool,
    /// A namespace for the hostname (uts_namespaces(7)).
    pub uts: bool,
}

/// The privileges that a child process gives up before it executes its program. The default gives up none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChildSandbox {
    /// The user that the child becomes; None keeps the user of this process.
    pub identity: Option<RunAs>,
    /// The namespaces that the child gets of its own.
    pub namespaces: Namespaces,
    /// Empties every capability set, the bounding set included.
    pub drop_capabilities: bool,
    /// No program that the child executes gains privileges, as by a set-user-ID bit (PR_SET_NO_NEW_PRIVS).
    pub no_new_privileges: bool,
    /// No core file, whatever the limit of machinen itself.
    pub no_core: bool,
    /// -1000..1000, see proc_pid_oom_score_adj(5).
    pub oom_score_adj: Option<i16>,
    /// The number of a descriptor. An fallocate(2) that would punch a hole into its file succeeds without
    /// effect.
    pub ignore_hole_punching: Option<i32>,
}

impl ChildSandbox {
    /// All restrictions, for programs that get all they need as inherited file descriptors.
    pub fn strict(identity: RunAs) -> Self {
        Self {
            identity: Some(identity),
            namespaces: Namespaces { net: true, mount: true, ipc: true, uts: true },
            drop_capabilities: true,
            no_new_privileges: true,
            no_core: true,
            oom_score_adj: None,
            ignore_hole_punching: None,
        }
    }

    pub(super) fn setup(&self) -> ChildSetup {
        let mut unshare = 0;
        for (wanted, flag) in [
            (self.namespaces.net, libc::CLONE_NEWNET),
            (self.namespaces.mount, libc::CLONE_NEWNS),
            (self.namespaces.ipc, libc::CLONE_NEWIPC),
            (self.namespaces.uts, libc::CLONE_NEWUTS),
        ] {
            if wanted {
                unshare |= flag;
            }
        }
        ChildSetup {
            parent: std::process::id(),
            bond: Bond::Child,
            join_netns: None,
            unshare,
            identity: self.identity.as_ref().map(|id| (id.uid, id.gid, id.groups.clone())),
            drop_capabilities: self.drop_capabilities,
            no_new_privileges: self.no_new_privileges,
            no_core: self.no_core,
            oom_score_adj: self.oom_score_adj.map(|value| value.to_string().into_bytes()),
            filter: self.ignore_hole_punching.map(no_holes),
        }
    }
}

/// A filter that makes fallocate(2) with FALLOC_FL_PUNCH_HOLE a success without effect for one descriptor.
fn no_holes(fd: i32) -> BpfProgram {
    let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64;
    let equals =
        |argument, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value);
    let rule = equals(0, u64::from(fd.cast_unsigned()))
        .and_then(|fd| equals(1, punch).map(|mode| vec![fd, mode]))
        .and_then(SeccompRule::new);
    let filter = rule.and_then(|rule| {
        let rules = [(libc::SYS_fallocate, vec![rule])].into_iter().collect();
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(0), TargetArch::x86_64)
    });
    filter.and_then(TryInto::try_into).expect("a constant rule for a supported architecture")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Spawn;

    #[test]
    fn a_strict_child_has_no_privileges_and_no_network() {
        let script = "id -u; id -g; id -G; grep -E 'CapEff|CapPrm|CapInh|CapBnd|CapAmb|NoNewPrivs' /proc/self/status; \
            ulimit -c; cat /proc/self/oom_score_adj; tail -n +3 /proc/net/dev | wc -l";
        let identity = RunAs { uid: 0x7000_0001, gid: 0x7000_0001, groups: vec![7] };
        let sandbox = ChildSandbox { oom_score_adj: Some(321), ..ChildSandbox::strict(identity) };
        let output = Spawn::new("sh").args(["-c", script]).sandbox(sandbox).run().unwrap().success().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let none = "0000000000000000";
        let expected = format!(
            "1879048193\n1879048193\n1879048193 7\nCapInh:\t{none}\nCapPrm:\t{none}\nCapEff:\t{none}\n\
             CapBnd:\t{none}\nCapAmb:\t{none}\nNoNewPrivs:\t1\n0\n321\n1\n"
        );
        assert_eq!(text, expected);
    }
}
