//! What a pod is now: its VM, its containers, and what runs in them. Nothing here changes anything.

use std::path::PathBuf;

use machinen_base::text::printable;
use machinen_protocol::MAX_LISTED_PROCESSES;
use machinen_vm::LogPiece;

use super::{ContainerId, ContainerSlot, Pod, PodError, state::ProcessState};

/// A pod, as it is at one moment.
#[derive(Debug, Clone)]
pub struct PodDescription {
    /// None: no container runs.
    pub vm: Option<VmDescription>,
    /// In the order of their ids.
    pub containers: Vec<ContainerDescription>,
    /// containerd's namespace; `oci` for the command line.
    pub namespace: String,
    /// The socket on which containerd takes events, if the pod belongs to a containerd.
    pub containerd: Option<PathBuf>,
}

/// The VM of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmDescription {
    /// QEMU's pid.
    pub pid: u32,
    /// Most memory that the guest can use, MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
}

/// A container of a pod.
#[derive(Debug, Clone)]
pub struct ContainerDescription {
    /// Its id.
    pub id: ContainerId,
    /// The state of its init; None while it is being created.
    pub state: Option<ProcessState>,
    /// The pid of its anchor; 0 while it is being created.
    pub pid: u32,
    /// The directory with `config.json`; empty while it is being created.
    pub bundle: PathBuf,
}

/// A process of a container, as the guest describes it. The host has only bounded it and made it printable.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerProcessInfo {
    /// In the container's pid namespace.
    pub pid: u32,
    /// 0 if the parent is not a process of the container.
    pub parent_pid: u32,
    /// Effective user id in the guest.
    pub uid: u32,
    /// The letter of proc_pid_stat(5), such as `S`.
    pub state: String,
    /// Processor time, microseconds.
    pub cpu_micros: u64,
    /// Resident memory, bytes.
    pub rss_bytes: u64,
    /// Microseconds since the process was started.
    pub age_micros: u64,
    /// Number of threads.
    pub threads: u32,
    /// Arguments in one line, cut if they are long.
    pub command: String,
}

impl Pod {
    /// The VM and the containers of the pod. Does not involve the guest.
    pub async fn describe(&self) -> PodDescription {
        let vm = self.shared.sandbox.vm().await.map(|vm| VmDescription {
            pid: vm.pid(),
            memory_mib: vm.spec().memory_mib,
            vcpus: vm.spec().vcpus,
        });
        let mut containers: Vec<_> = self.containers().iter().map(describe).collect();
        containers.sort_by(|a, b| a.id.cmp(&b.id));
        let containerd = self.shared.sandbox.containerd().cloned();
        PodDescription { vm, containers, namespace: self.shared.namespace.clone(), containerd }
    }

    /// The processes of a container, and how many there are: the guest lists a bounded number of them.
    ///
    /// # Errors
    /// The container does not exist or has ended, or the agent does not answer.
    pub async fn processes(&self, id: &ContainerId) -> Result<(Vec<ContainerProcessInfo>, u32), PodError> {
        self.container(id)?;
        let listed = self.agent(id).await?.list_processes(id).await;
        let listed = listed.map_err(|source| PodError::guest("list the processes of", id, source))?;
        let processes =
            listed.processes.into_iter().take(MAX_LISTED_PROCESSES).map(|process| ContainerProcessInfo {
                pid: process.pid,
                parent_pid: process.parent_pid,
                uid: process.uid,
                state: printable(&process.state.chars().take(1).collect::<String>()),
                cpu_micros: process.cpu_micros,
                rss_bytes: process.rss_bytes,
                age_micros: process.age_micros,
                threads: process.threads,
                command: printable(&process.command),
            });
        Ok((processes.collect(), listed.total))
    }

    /// What the guest of a container has printed on its console after the first `from` bytes. With `wait` an empty piece
    /// means that the VM has ended.
    ///
    /// # Errors
    /// The pod has no VM.
    pub async fn console(&self, id: &ContainerId, from: u64, wait: bool) -> Result<LogPiece, PodError> {
        self.container(id)?;
        Ok(self.vm_of(id).await?.console(from, wait).await)
    }
}

fn describe((id, slot): (&ContainerId, &ContainerSlot)) -> ContainerDescription {
    let (state, pid, bundle) = match slot {
        ContainerSlot::Creating(_) => (None, 0, PathBuf::new()),
        ContainerSlot::Ready(container) => (Some(container.state()), container.pid, container.bundle.clone()),
    };
    ContainerDescription { id: id.clone(), state, pid, bundle }
}
