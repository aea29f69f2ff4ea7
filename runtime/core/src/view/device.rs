//! A FUSE file system and its device, /dev/fuse (fuse(4)). The connection ends when the device is closed.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use machinen_base::sys;
use machinen_protocol::fuse::{MAX_DATA, REQUEST_HEADER, RequestHeader, refusal};
use nix::errno::Errno;
use rustix::{
    fs::{Mode, OFlags, open},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
        fsmount, fsopen,
    },
};
use tokio::io::unix::AsyncFd;

/// No file of these file systems is executed or opened as a device on the host, and set-user-id bits have no
/// effect.
const HARMLESS: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// The host's path lookup follows no link of a container's files. The guest may answer each lookup as it likes: it could
/// show a program that runs as root on the host a directory, and at the next lookup a link to a directory of the host.
/// Kernels before 5.14 refuse the attribute, and then there is no view.
const SERVED_BY_GUEST: MountAttrFlags = HARMLESS.union(MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW);

/// A step on the way to a file system that can be mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceStep {
    /// Open a device or a file system.
    Open,
    /// Make a file system or a mount.
    Make,
}

/// Why a file system cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {} {what}", match .step { DeviceStep::Open => "open", DeviceStep::Make => "make" })]
pub struct DeviceError {
    step: DeviceStep,
    what: &'static str,
    source: io::Error,
}

#[derive(Debug)]
pub(super) struct Device(AsyncFd<OwnedFd>);

/// A message of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DeviceRead {
    Request(RequestHeader),
    Unmounted,
}

impl Device {
    /// Makes a file system that only root may access. Its mount is in no mount namespace yet.
    pub(super) fn mount() -> Result<(Self, OwnedFd), DeviceError> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = open("/dev/fuse", flags, Mode::empty());
        let device = opened.map_err(|error| failed(DeviceStep::Open, "/dev/fuse", error.into()))?;
        let number = device.as_raw_fd().to_string();
        let max_read = MAX_DATA.to_string();
        let options = [
            ("source", "machinen"),
            ("subtype", "machinen"),
            ("fd", &number),
            ("rootmode", "40000"),
            ("user_id", "0"),
            ("group_id", "0"),
            ("max_read", &max_read),
        ];
        let root = make("fuse", &options, &["default_permissions"], SERVED_BY_GUEST)
            .map_err(|error| failed(DeviceStep::Make, "a FUSE file system", error))?;
        let device = Self::over(device).map_err(|error| failed(DeviceStep::Open, "/dev/fuse", error))?;
        Ok((device, root))
    }

    pub(super) fn over(fd: OwnedFd) -> io::Result<Self> {
        sys::async_fd(fd).map(Self)
    }

    /// Reads the next request, whole, into `buffer`. Nothing is lost when this is cancelled.
    pub(super) async fn read(&self, buffer: &mut [u8]) -> io::Result<DeviceRead> {
        loop {
            let mut ready = self.0.readable().await?;
            let read = ready.try_io(|fd| Ok(nix::unistd::read(fd, buffer)?));
            match read {
                Err(_) => {}
                Ok(Ok(0)) => return Ok(DeviceRead::Unmounted),
                Ok(Ok(length)) => return Ok(DeviceRead::Request(decode(&buffer[..length])?)),
                Ok(Err(error)) => match error.raw_os_error() {
                    // The calling process has given up.
                    Some(libc::ENOENT | libc::EINTR) => {}
                    Some(libc::ENODEV | libc::ECONNABORTED) => return Ok(DeviceRead::Unmounted),
                    _ => return Err(error),
                },
            }
        }
    }

    /// Sends a reply. It is not an error if no process waits for it any more. EINVAL means that it does not
    /// fit the request.
    pub(super) fn write(&self, reply: &[u8]) -> io::Result<()> {
        match nix::unistd::write(self.0.get_ref(), reply) {
            Ok(_) | Err(Errno::ENOENT | Errno::ENODEV) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn refuse(&self, request: RequestHeader, errno: i32) -> io::Result<()> {
        self.write(&refusal(request.unique, errno))
    }
}

fn decode(message: &[u8]) -> io::Result<RequestHeader> {
    let odd = || io::Error::from(io::ErrorKind::InvalidData);
    let header = message.first_chunk::<REQUEST_HEADER>().ok_or_else(odd)?;
    let request = RequestHeader::decode(header).map_err(io::Error::other)?;
    if request.length == message.len() { Ok(request) } else { Err(odd()) }
}

/// An empty read-only directory, for containers without a view.
pub(crate) fn empty() -> Result<OwnedFd, DeviceError> {
    let options = [("source", "machinen"), ("size", "4096"), ("nr_inodes", "1"), ("mode", "555")];
    let read_only = HARMLESS | MountAttrFlags::MOUNT_ATTR_RDONLY;
    make("tmpfs", &options, &[], read_only)
        .map_err(|error| failed(DeviceStep::Make, "an empty file system", error))
}

fn make(
    kind: &str,
    options: &[(&str, &str)],
    switches: &[&str],
    attributes: MountAttrFlags,
) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        fsconfig_set_string(&context, *key, *value)?;
    }
    for key in switches {
        fsconfig_set_flag(&context, *key)?;
    }
    fsconfig_create(&context)?;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

fn failed(step: DeviceStep, what: &'static str, source: io::Error) -> DeviceError {
    DeviceError { step, what, source }
}
