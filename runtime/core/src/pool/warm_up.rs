//! Warms a clone up: creates a container in it and deletes it again, before the clone is used.
//!
//! Under emulation most of the time of creating a container is spent on translating code that runs for the
//! first time; the next container takes a tenth of that time. So a clone that waits has created a container
//! once.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt as _,
};

use machinen_base::{fs::FileError, space::DiskReserve};
use machinen_protocol::api::{CreateContainerRequest, Disk, Rootfs};
use machinen_storage::{
    container_disk::{self, ContainerDiskError, ContainerDiskOptions},
    rootdisk::RootdiskCache,
};
use machinen_vm::{DiskBacking, DiskSpec, Vm};
use protobuf::MessageField;
use tokio::task::spawn_blocking;

use super::CloneError;
use crate::config::Config;

const ID: &str = "warm-up";
/// A configuration with what most containers have. Its command exists and is never executed.
const SPEC: &str = include_str!("warm_up.json");
/// Nothing is written to the disk, so a small one is enough, bytes.
const WRITABLE: u64 = 64 << 20;

/// Creates a container in `vm` and deletes it. Its disks make room for those of the container that comes.
///
/// # Errors
/// The container cannot be created or deleted. The VM must not be used then.
pub(super) async fn warm_up(vm: &Vm, config: &Config) -> Result<(), CloneError> {
    let options = options(config);
    // Not in the thread, which goes on when this member is dismissed: it would leave the directory.
    let root = root().map_err(failed)?;
    let opened = File::open(root.path()).map_err(failed)?;
    let made = spawn_blocking(move || make(&options, opened)).await.map_err(CloneError::Worker)?;
    drop(root);
    let [base, writable] = made?;
    let attach = async |file: File, read_only| {
        let source = DiskBacking::File(file.into());
        let disk = DiskSpec {
            source,
            read_only,
            volatile: true,
            serial: ID.to_owned(),
            reserve: DiskReserve::default(),
        };
        let attached = vm.attach_disk(disk).await;
        attached.map_err(CloneError::Attach)
    };
    let (base, writable) = (attach(base, true).await?, attach(writable, false).await?);
    let agent = vm.agent().await.map_err(CloneError::Agent)?;
    let request = CreateContainerRequest {
        container_id: ID.to_owned(),
        oci_config: SPEC.into(),
        rootfs: MessageField::some(Rootfs {
            base: MessageField::some(Disk::from(base)),
            writable: MessageField::some(Disk::from(writable)),
            ..Default::default()
        }),
        ..Default::default()
    };
    agent
        .create_container(request)
        .await
        .map_err(|source| CloneError::Container { verb: "create", source })?;
    let deleted = agent.delete_container(ID).await;
    deleted.map_err(|source| CloneError::Container { verb: "delete", source })?;
    for disk in [base, writable] {
        vm.detach_disk(disk).await.map_err(CloneError::Detach)?;
    }
    Ok(())
}

/// Makes an image with a command, and a file system to write to, of which a container can be made that no client sees. Blocks.
///
/// # Errors
/// No space or no mke2fs.
pub fn disks(config: &Config) -> Result<[File; 2], ContainerDiskError> {
    let root = root().map_err(failed)?;
    let opened = File::open(root.path()).map_err(failed)?;
    make(&options(config), opened)
}

fn options(config: &Config) -> ContainerDiskOptions {
    ContainerDiskOptions { size: WRITABLE, ..config.rootdisk.container_disks() }
}

fn failed(source: io::Error) -> ContainerDiskError {
    FileError::new("write to", std::env::temp_dir(), source).into()
}

/// The base disk of the files in a directory, and an empty writable one.
fn make(options: &ContainerDiskOptions, root: File) -> Result<[File; 2], ContainerDiskError> {
    let cache = RootdiskCache::open(&options.cache)?;
    let base = cache.disk_of_files(root.into(), 1, 4096, &options.mke2fs)?;
    Ok([base, container_disk::scratch(options)?])
}

/// Makes a root file system with a command.
fn root() -> io::Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    let command = dir.path().join("init");
    fs::write(&command, "#!/init\n")?;
    fs::set_permissions(&command, fs::Permissions::from_mode(0o755))?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_valid() {
        let spec: oci_spec::runtime::Spec = serde_json::from_str(SPEC).unwrap();
        assert_eq!(spec.process().as_ref().unwrap().args().as_ref().unwrap(), &["/init"]);
    }
}
