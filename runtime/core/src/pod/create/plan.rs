//! Decides everything about a container before anything is changed on the host.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::Path,
};

use machinen_protocol::api::InjectedFile;
use machinen_vm::assets::Assets;

use super::CreateRequest;
use crate::{
    config::{Config, annotations},
    pod::{
        Pod, PodError,
        checkpoint::RestorePlan,
        rootfs::{self, RootfsPlan},
        sandbox::{ContainerLimits, VmRequest},
    },
    spec::{
        bundle,
        guest::{self, GuestSpec, Injected, MAX_INJECTED},
    },
};

/// What is decided about a container.
#[derive(Debug, Clone)]
pub(in crate::pod) struct CreatePlan {
    /// With the annotations applied.
    pub(in crate::pod) config: Config,
    annotations: HashMap<String, String>,
    assets: Assets,
    pub(in crate::pod) guest: GuestSpec,
    pub(in crate::pod) rootfs: RootfsPlan,
    pub(in crate::pod) restore: Option<RestorePlan>,
}

impl CreatePlan {
    /// What the container requires of its VM.
    pub(in crate::pod) fn vm_request(&self) -> VmRequest {
        VmRequest {
            config: self.config.clone(),
            annotations: self.annotations.clone(),
            assets: self.assets.clone(),
            limits: ContainerLimits::of(&self.guest.spec),
        }
    }

    /// Reads the files of the host that the container gets copies of.
    ///
    /// # Errors
    /// A file cannot be read, or is too large.
    pub(in crate::pod) fn read_injected(&self) -> Result<Vec<InjectedFile>, PodError> {
        let injected = self.guest.injected.iter().map(|Injected { source, destination }| {
            let (content, mode) = read_small(source)
                .map_err(|error| PodError::Injected { path: source.clone(), source: error })?;
            Ok(InjectedFile { destination: destination.clone(), content, mode, ..Default::default() })
        });
        injected.collect()
    }

    /// The network namespace that the container's anchor joins; None: one of its own.
    pub(super) fn netns(&self) -> Option<&Path> {
        self.guest.netns.as_deref()
    }
}

impl Pod {
    /// Makes all checks that change nothing on the host or in the guest.
    pub(in crate::pod) fn plan(&self, create: &CreateRequest) -> Result<CreatePlan, PodError> {
        let spec = bundle::load(&create.bundle)?;
        let annotations = spec.annotations().clone().unwrap_or_default();
        let config = annotations::apply(&self.shared.config, &annotations)?;
        let rootfs = rootfs::plan(&create.rootfs, &spec, &create.bundle)?;
        let guest = guest::reduce(spec, &create.id)?;
        let assets = Assets::find(&config.assets.dir)?;
        let restore = create.checkpoint.as_ref().map(|dir| RestorePlan::read(&create.id, dir)).transpose()?;
        Ok(CreatePlan { config, annotations, assets, guest, rootfs, restore })
    }
}

/// Reads a file of limited size, and its permissions.
fn read_small(path: &Path) -> io::Result<(Vec<u8>, u32)> {
    let file = File::open(path)?;
    let mode = file.metadata()?.mode() & 0o777;
    let mut content = Vec::new();
    file.take(MAX_INJECTED + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_INJECTED {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {MAX_INJECTED} bytes")));
    }
    Ok((content, mode))
}
