//! A container's whole life in a template, so that what it makes the guest do for the first time is done before there are clones.
//!
//! The host has put two file systems into the places of the template's disks. The container is made of them as any other, runs a
//! program that waits, is ended and removed. The disks are not in use any more then, and the kernel keeps nothing of their content:
//! clones have others in their places.

use machinen_protocol::{
    api::{CreateContainerRequest, Disk, Rootfs},
    process::{ProcessRef, SignalTarget},
};
use protobuf::MessageField;

use crate::{
    console,
    container::{Container, ContainerError},
    context::Context,
};

const ID: &str = "rehearsal";
/// A configuration with what most containers have.
const SPEC: &str = include_str!("rehearsal.json");

/// # Errors
/// The disks have no file systems, or a step fails; nothing of the container is left, but for what the step could not remove.
pub(crate) async fn rehearse(context: &Context) -> Result<(), ContainerError> {
    let disk = |target| MessageField::some(Disk { target, known: true, ..Default::default() });
    let request = CreateContainerRequest {
        container_id: ID.to_owned(),
        oci_config: SPEC.into(),
        rootfs: MessageField::some(Rootfs { base: disk(0), writable: disk(1), ..Default::default() }),
        ..Default::default()
    };
    let (container, _phases) = Container::create(context, request, &[]).await?;
    let lived = live(&container, context).await;
    if lived.is_err()
        && let Err(err) = container.signal(&SignalTarget::All, libc::SIGKILL)
    {
        console::report(&err);
    }
    container.init().exited().await;
    lived.and(container.delete().await)
}

async fn live(container: &Container, context: &Context) -> Result<(), ContainerError> {
    container.start(context).await?;
    container.signal(&SignalTarget::One(ProcessRef::Init), libc::SIGKILL)
}
