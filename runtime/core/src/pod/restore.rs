//! Restoring a container from a checkpoint: what its creation needs of the checkpoint, and when the checkpoint's
//! disk is detached.
//!
//! ```text
//!   create   manifest checked -> images are a disk -> CRIU makes the processes, which wait
//!   start    the processes run -> (all memory was read) disk detached
//! ```

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use machinen_base::{error::chain, text::printable};
use machinen_protocol::api::{CriuOptions, RestoreFrom};
use machinen_storage::rootdisk::RootdiskKey;
use machinen_vm::{
    DiskAddress, VmError, VmSpec,
    agent::{self, AgentError},
};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use protobuf::MessageField;
use tokio::task::spawn_blocking;

use super::{Container, PodError, phases::PhaseTimes};
use crate::{
    checkpoint::{self, CheckpointError, CheckpointManifest, ImageDisk},
    config::{self, copies::CopyMount},
    shares::{SharedVolume, Volume},
    spec,
};

/// A checkpoint's images that are attached to a VM.
#[derive(Debug)]
pub(super) struct RestoreDisk {
    pub(super) address: DiskAddress,
    pub(super) disk: ImageDisk,
}

impl Container {
    /// Detaches the checkpoint's disk from the VM of a running container when all of the container's memory
    /// has been read from it.
    pub(super) fn release_checkpoint(self: &Arc<Self>, agent: agent::Client) {
        let source = self.checkpoint.lock().expect("no panic while held").take();
        let Some(RestoreDisk { address, disk }) = source else { return };
        let container = Arc::clone(self);
        tokio::spawn(async move {
            let id = container.id.as_str();
            match agent.wait_pages(id).await {
                Ok(()) => tracing::info!(id, "all of the container's memory was fetched from its checkpoint"),
                Err(AgentError::Closed) => return,
                Err(error) => {
                    let why = disk.fault().map_or_else(|| chain(&error), |fault| chain(&fault));
                    tracing::error!(
                        id,
                        "a restored container was killed, because its memory could not be read: {why}"
                    );
                }
            }
            match container.vm.detach_disk(address).await {
                Ok(()) | Err(VmError::Exited(_)) => {}
                Err(error) => {
                    tracing::warn!(id, "cannot detach the checkpoint's disk: {}", chain(&error));
                }
            }
        });
    }
}

/// A checkpoint that a container is to be restored from.
#[derive(Debug, Clone)]
pub(super) struct RestorePlan {
    id: String,
    dir: PathBuf,
    manifest: CheckpointManifest,
    /// The digest of the manifest, which identifies the checkpoint.
    digest: String,
}

impl RestorePlan {
    /// Reads the manifest, and makes all checks that need no images.
    pub(super) fn read(id: &str, dir: &Path) -> Result<Self, PodError> {
        let (id, dir) = (id.to_owned(), dir.to_owned());
        match CheckpointManifest::read_with_digest(&dir) {
            Ok((manifest, digest)) => Ok(Self { id, dir, manifest, digest }),
            Err(source) => Err(PodError::Restore { id, dir, source }),
        }
    }

    /// Compares the checkpoint with the one that the container's configuration asks for. A VM with other containers takes
    /// no other checkpoint.
    pub(super) fn check_digest(
        &self,
        config: &config::RestoreConfig,
        has_others: bool,
    ) -> Result<(), PodError> {
        match &config.digest {
            Some(pinned) if *pinned != self.digest => {
                Err(self
                    .failed(CheckpointError::Digest { found: self.digest.clone(), pinned: pinned.clone() }))
            }
            None if has_others => Err(self.failed(CheckpointError::Unpinned)),
            _ => Ok(()),
        }
    }

    /// The reason why the guest could not restore the container: damage of the checkpoint, if any was found.
    pub(super) fn refused(&self, disk: &ImageDisk, error: AgentError) -> PodError {
        match disk.fault() {
            Some(fault) => self.failed(fault),
            None => PodError::guest("create", &self.id, error),
        }
    }

    fn failed(&self, source: CheckpointError) -> PodError {
        PodError::Restore { id: self.id.clone(), dir: self.dir.clone(), source }
    }

    /// Checks that the VM has the kernel of the checkpoint if the user supplies it: nothing is known of its releases.
    pub(super) fn check_kernel(&self, vm: &VmSpec) -> Result<(), PodError> {
        let ours = checkpoint::kernel_digest(vm);
        match self.manifest.kernel_digest.as_ref().map(|theirs| printable(theirs)) {
            theirs if theirs == ours => Ok(()),
            theirs => Err(self.failed(CheckpointError::KernelDigest { theirs, ours })),
        }
    }

    /// Checks the base disk, since the processes have files on it open.
    pub(super) fn check_rootfs(&self, base: Option<RootdiskKey>) -> Result<(), PodError> {
        match (&self.manifest.rootdisk, base) {
            (Some(theirs), Some(ours)) if *theirs != ours.to_string() => {
                Err(self.failed(CheckpointError::Rootfs { theirs: printable(theirs), ours }))
            }
            _ => Ok(()),
        }
    }

    /// Checks that the container's volumes take the places of those of the checkpoint.
    pub(super) fn check_volumes(&self, volumes: &[Volume]) -> Result<(), PodError> {
        checkpoint::check_volumes(&self.manifest.volumes, volumes).map_err(|source| self.failed(source))
    }

    /// Brings the container's copy mounts into the order of those of the checkpoint.
    pub(super) fn arrange_copies(&self, configured: &[CopyMount]) -> Result<Vec<CopyMount>, PodError> {
        checkpoint::arrange_copies(&self.manifest.copies, configured).map_err(|source| self.failed(source))
    }

    /// The disk of which the copy of this number was made.
    pub(super) fn copy_base(&self, number: usize) -> Option<RootdiskKey> {
        self.manifest.copies.get(number)?.rootdisk.parse().ok()
    }

    /// Checks that the copy of this number is one of the same files.
    pub(super) fn check_copy_base(&self, number: usize, base: RootdiskKey) -> Result<(), PodError> {
        let recorded = self.manifest.copies.get(number);
        let checked = recorded.map_or(Ok(()), |recorded| checkpoint::check_copy_base(recorded, base));
        checked.map_err(|source| self.failed(source))
    }

    /// Opens what the container had written to the copy of this number. Blocks.
    pub(super) fn open_written(&self, number: usize) -> Result<File, PodError> {
        let opened = checkpoint::open_written(&self.dir, &self.manifest, number);
        opened.map_err(|source| self.failed(source))
    }

    pub(super) fn has_terminal(&self) -> bool {
        self.manifest.terminal
    }

    /// `shared` are the new container's volumes, `spec` is its configuration, and `cpus` is the number of its VM's
    /// CPUs.
    pub(super) fn request(
        &self,
        disk: Option<DiskAddress>,
        config: &config::RestoreConfig,
        shared: &[SharedVolume],
        spec: &Spec,
        cpus: u32,
    ) -> RestoreFrom {
        let options = CriuOptions {
            lazy_pages: config.lazy,
            tcp_close: config.tcp == config::TcpMode::Close,
            ..self.manifest.options.criu()
        };
        let mut facts = self.manifest.facts(shared);
        // The VM of the checkpoint may have had more CPUs.
        for file in &mut facts.limits {
            if let Some(content) = spec::cpus::file_in_guest(&file.name, &file.content, cpus) {
                file.content = format!("{content}\n");
            }
        }
        RestoreFrom {
            disk: disk.map(Into::into).into(),
            options: MessageField::some(options),
            facts: MessageField::some(facts),
            hostname: changed_hostname(self.manifest.hostname.as_deref(), spec).to_owned(),
            ..Default::default()
        }
    }
}

/// Returns the configured hostname if it differs from that of the checkpoint. Otherwise the hostname that the
/// processes have set stays.
fn changed_hostname<'a>(was: Option<&str>, spec: &'a Spec) -> &'a str {
    let own = spec::has_own(spec, LinuxNamespaceType::Uts);
    match (was, spec.hostname().as_deref()) {
        (Some(was), Some(now)) if own && was != now => now,
        _ => "",
    }
}

/// Opens the images of the checkpoint as a disk.
pub(super) async fn restore_disk(
    restore: Option<&RestorePlan>,
    phases: &PhaseTimes,
) -> Result<Option<ImageDisk>, PodError> {
    let Some(restore) = restore.cloned() else { return Ok(None) };
    let open = move || {
        let disk = ImageDisk::open(&restore.dir, &restore.manifest);
        disk.map_err(|source| restore.failed(source))
    };
    let opened = phases.time("checkpoint", async { spawn_blocking(open).await.map_err(PodError::Worker)? });
    opened.await.map(Some)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxNamespaceBuilder;

    use super::*;

    #[test]
    fn a_hostname_is_set_where_another_is_configured() {
        let spec = |hostname: &str, kind| {
            let mut spec = Spec::default();
            spec.set_hostname(Some(hostname.to_owned()).filter(|name| !name.is_empty()));
            let namespace = LinuxNamespaceBuilder::default().typ(kind).build().unwrap();
            spec.linux_mut().as_mut().unwrap().set_namespaces(Some(vec![namespace]));
            spec
        };
        let own = |hostname| spec(hostname, LinuxNamespaceType::Uts);
        assert_eq!(changed_hostname(Some("a"), &own("b")), "b");
        assert_eq!(changed_hostname(Some(""), &own("b")), "b");
        // The hostname that the processes have set stays.
        assert_eq!(changed_hostname(Some("a"), &own("a")), "");
        assert_eq!(changed_hostname(Some("a"), &own("")), "");
        // A checkpoint of an earlier version does not record the hostname, and the VM's hostname is not the
        // container's.
        assert_eq!(changed_hostname(None, &own("b")), "");
        assert_eq!(changed_hostname(Some("a"), &spec("b", LinuxNamespaceType::Pid)), "");
    }
}
