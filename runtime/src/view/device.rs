//! A FUSE file system and its device, /dev/fuse (fuse(4)). The connection ends when the device is closed.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use machinen_protocol::fuse::{MAX_DATA, REQUEST_HEADER, RequestHeader, refusal};
use nix::errno::Errno;
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};
use tokio::io::unix::AsyncFd;

use crate::sys;

/// Nothing on it is ever executed or opened as a device here, and its set-user-id bits mean nothing.
const HARMLESS: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// What is done to have a file system to mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Open,
    Make,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
#[error("cannot {} {what}", match .step { Step::Open => "open", Step::Make => "make" })]
pub struct DeviceError {
    step: Step,
    what: &'static str,
    source: io::Error,
}

#[derive(Debug)]
pub(super) struct Device(AsyncFd<OwnedFd>);

/// What comes from the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Read {
    Request(RequestHeader),
    Unmounted,
}

impl Device {
    /// A file system that only root may access, and its mount, which is in no mount namespace.
    pub(super) fn mount() -> Result<(Self, OwnedFd), DeviceError> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = open("/dev/fuse", flags, Mode::empty());
        let device = opened.map_err(|error| failed(Step::Open, "/dev/fuse", error.into()))?;
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
        let root = make("fuse", &options, &["default_permissions"], HARMLESS)
            .map_err(|error| failed(Step::Make, "a FUSE file system", error))?;
        let device = Self::over(device).map_err(|error| failed(Step::Open, "/dev/fuse", error))?;
        Ok((device, root))
    }

    pub(super) fn over(fd: OwnedFd) -> io::Result<Self> {
        sys::async_fd(fd).map(Self)
    }

    /// The next request; all of it is in `buffer`. Nothing is lost when this is cancelled.
    pub(super) async fn read(&self, buffer: &mut [u8]) -> io::Result<Read> {
        loop {
            let mut ready = self.0.readable().await?;
            let read = ready.try_io(|fd| Ok(nix::unistd::read(fd, buffer)?));
            match read {
                Err(_) => {}
                Ok(Ok(0)) => return Ok(Read::Unmounted),
                Ok(Ok(length)) => return Ok(Read::Request(decode(&buffer[..length])?)),
                Ok(Err(error)) => match error.raw_os_error() {
                    // Whoever asked has given up.
                    Some(libc::ENOENT | libc::EINTR) => {}
                    Some(libc::ENODEV | libc::ECONNABORTED) => return Ok(Read::Unmounted),
                    _ => return Err(error),
                },
            }
        }
    }

    /// Answers a request. One that nobody waits for any more is no error; EINVAL: this is no answer to it.
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

/// An empty directory, for who has no view.
pub(crate) fn empty() -> Result<OwnedFd, DeviceError> {
    let options = [("source", "machinen"), ("size", "4096"), ("nr_inodes", "1"), ("mode", "555")];
    let read_only = HARMLESS | MountAttrFlags::MOUNT_ATTR_RDONLY;
    make("tmpfs", &options, &[], read_only).map_err(|error| failed(Step::Make, "an empty file system", error))
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

fn failed(step: Step, what: &'static str, source: io::Error) -> DeviceError {
    DeviceError { step, what, source }
}
