//! The jail of a child process: what it may see, use and call.
//!
//! Everything here is a description. `sys::child` applies it between fork(2) and exec(3), and
//! docs/design/border.md says which attack each part stops.

mod probe;
mod root;

use std::{io, path::Path};

use serde::{Deserialize, Serialize};

use crate::{
    fs::FileError,
    sys::{
        child::{Bond, ChildSetup},
        pidfd,
        root::RootMounts,
    },
};

use super::filter::{self, SystemCalls};

pub use probe::probe;
pub use root::JailFiles;

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
    /// A namespace that shows no cgroup of the host above the child's own (cgroup_namespaces(7)).
    pub cgroup: bool,
    /// A namespace in which the child has pid 1 and sees no other process (pid_namespaces(7)). A signal for which the
    /// child has no handler does not reach it there, except for SIGKILL.
    pub pid: bool,
    /// A user namespace without any mapping (user_namespaces(7)). Nothing that needs a capability can be asked for then.
    pub user: bool,
}

/// Resource limits of a child process (setrlimit(2)). None keeps the limit of this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResourceLimits {
    /// The size up to which the child can make a file grow, bytes.
    pub file_size: Option<u64>,
    /// One more than the highest number of a descriptor.
    pub open_files: Option<u64>,
    /// Processes and threads of the child's user.
    pub processes: Option<u64>,
    /// Memory that the child can keep from being swapped out, bytes.
    pub locked_memory: Option<u64>,
    /// Time that the child can use a CPU, seconds.
    pub cpu_seconds: Option<u64>,
}

/// The restrictions of a child process, which it applies before it executes its program. The default has none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Jail {
    /// The user that the child becomes; None keeps the user of this process.
    pub identity: Option<RunAs>,
    /// The namespaces that the child gets of its own.
    pub namespaces: Namespaces,
    /// The files that the child sees; None leaves it the host's root. Needs the namespaces `mount` and `pid`.
    pub files: Option<JailFiles>,
    /// The child inherits no environment, only the variables that are given to its [`Spawn`](super::Spawn).
    pub empty_environment: bool,
    /// The child gets an empty session keyring, instead of the one of this process (session-keyring(7)).
    pub new_keyring: bool,
    /// The only capabilities that the child keeps, by their numbers (capabilities(7)); None keeps those of this process.
    pub capabilities: Option<Vec<u8>>,
    /// No program that the child executes gains privileges, as by a set-user-ID bit (PR_SET_NO_NEW_PRIVS).
    pub no_new_privileges: bool,
    /// No core file, and no core for the program that the host's core_pattern names (core(5)).
    pub no_core: bool,
    /// The resources that the child can use.
    pub limits: ResourceLimits,
    /// The system calls that the child may make; None allows all of them.
    pub system_calls: Option<SystemCalls>,
    /// -1000..1000, see proc_pid_oom_score_adj(5).
    pub oom_score_adj: Option<i16>,
    /// The number of a descriptor. An fallocate(2) that would punch a hole into its file succeeds without
    /// effect.
    pub ignore_hole_punching: Option<i32>,
}

impl Jail {
    /// All restrictions, for programs that get all they need as inherited file descriptors.
    pub fn strict(identity: RunAs) -> Self {
        Self {
            identity: Some(identity),
            namespaces: Namespaces {
                net: true,
                mount: true,
                ipc: true,
                uts: true,
                cgroup: true,
                pid: true,
                user: false,
            },
            files: Some(JailFiles::default()),
            empty_environment: true,
            new_keyring: true,
            capabilities: Some(Vec::new()),
            no_new_privileges: true,
            no_core: true,
            limits: ResourceLimits { locked_memory: Some(0), ..ResourceLimits::default() },
            system_calls: None,
            oom_score_adj: None,
            ignore_hole_punching: None,
        }
    }

    /// The root of the child, whose program has this real path.
    pub(super) fn root(&self, program: &Path) -> Result<Option<RootMounts>, FileError> {
        self.files.as_ref().map(|files| files.mounts(program)).transpose()
    }

    /// All but the descriptors that are made anew for each child.
    pub(super) fn setup(&self) -> io::Result<ChildSetup> {
        let mut unshare = 0;
        for (wanted, flag) in [
            (self.namespaces.net, libc::CLONE_NEWNET),
            (self.namespaces.mount, libc::CLONE_NEWNS),
            (self.namespaces.ipc, libc::CLONE_NEWIPC),
            (self.namespaces.uts, libc::CLONE_NEWUTS),
            (self.namespaces.cgroup, libc::CLONE_NEWCGROUP),
            (self.namespaces.user, libc::CLONE_NEWUSER),
        ] {
            if wanted {
                unshare |= flag;
            }
        }
        Ok(ChildSetup {
            parent: pidfd::open(std::process::id())?,
            bond: Bond::Child,
            join_namespaces: Vec::new(),
            cgroups: Vec::new(),
            unshare,
            root: None,
            identity: self.identity.as_ref().map(|id| (id.uid, id.gid, id.groups.clone())),
            new_keyring: self.new_keyring,
            capabilities: self.capabilities.as_ref().map(|kept| mask(kept)),
            no_new_privileges: self.no_new_privileges,
            oom_score_adj: self.oom_score_adj.map(|value| value.to_string().into_bytes()),
        })
    }

    /// The limits by resource. They are set last, because some of them restrict the steps before.
    pub(super) fn limits(&self) -> Vec<(libc::__rlimit_resource_t, u64)> {
        let limits = self.limits;
        // A limit of one byte, unlike a limit of 0, also keeps the kernel from starting the program that the
        // host's core_pattern names (core(5)).
        [
            (libc::RLIMIT_CORE, self.no_core.then_some(1)),
            (libc::RLIMIT_FSIZE, limits.file_size),
            (libc::RLIMIT_NOFILE, limits.open_files),
            (libc::RLIMIT_NPROC, limits.processes),
            (libc::RLIMIT_MEMLOCK, limits.locked_memory),
            (libc::RLIMIT_CPU, limits.cpu_seconds),
        ]
        .into_iter()
        .filter_map(|(resource, limit)| Some((resource, limit?)))
        .collect()
    }

    /// The filters of system calls, in the order in which they must be applied.
    pub(super) fn filters(&self) -> Vec<seccompiler::BpfProgram> {
        let mut filters: Vec<_> = self.ignore_hole_punching.map(filter::no_holes).into_iter().collect();
        filters.extend(self.system_calls.iter().flat_map(SystemCalls::programs));
        filters
    }
}

/// A bit for each capability.
fn mask(capabilities: &[u8]) -> u64 {
    capabilities.iter().fold(0, |mask, capability| mask | 1 << capability)
}

#[cfg(test)]
mod tests;
