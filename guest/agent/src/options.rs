//! The agent's options: from the kernel's command line in a VM, from its arguments otherwise.

use std::{ffi::OsString, os::fd::OwnedFd, path::PathBuf};

use nix::{errno::Errno, unistd::getpid};

use crate::sys;

/// Key on the kernel command line that prints the boot's timeline.
const TRACE_ARG: &str = "machinen.trace";
/// Key on the kernel command line that ends the VM as soon as the agent runs, to measure the minimum lifetime
/// of a VM.
const POWER_OFF_ARG: &str = "machinen.poweroff";
const USAGE: &str = "usage: machinen-agent --serial-fd FD --disk-dir DIR";

#[derive(Debug)]
pub(crate) enum Options {
    /// PID 1 of a VM; the options are on the kernel's command line, which can be read once /proc is mounted.
    Machine,
    /// A process in namespaces of its own, with a byte stream as its serial port and a directory of disks.
    Process { serial: OwnedFd, disks: PathBuf },
}

/// Which of the two channels the host listens on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChannelKind {
    Vsock,
    Serial,
}

/// The agent's part of the kernel's command line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct KernelArgs {
    pub(crate) channel: ChannelKind,
    pub(crate) trace: bool,
    pub(crate) power_off: bool,
    /// This VM becomes a template: the agent waits to be woken before it dials the host.
    pub(crate) waits: bool,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum OptionsError {
    #[error("{USAGE} (or as init of a machinen VM, without arguments)")]
    Usage,
    #[error("descriptor {fd} of --serial-fd is not open")]
    SerialFd { fd: i32, source: Errno },
    #[error("kernel command line has no {}=vsock|serial", machinen_protocol::CHANNEL_ARG)]
    NoChannel,
    #[error("kernel command line has an unknown {}={value}", machinen_protocol::CHANNEL_ARG)]
    UnknownChannel { value: String },
}

impl Options {
    /// Reads the arguments.
    ///
    /// # Errors
    /// The arguments are neither those of an init (none) nor those of a test's process.
    pub(crate) fn from_environment() -> Result<Self, OptionsError> {
        let mut args = std::env::args_os().skip(1);
        // The kernel passes words of its command line that it does not know to init.
        if getpid().as_raw() == 1 {
            return Ok(Self::Machine);
        }
        let mut value_of = |flag: &str| -> Result<OsString, OptionsError> {
            if args.next().is_none_or(|arg| arg != flag) {
                return Err(OptionsError::Usage);
            }
            args.next().ok_or(OptionsError::Usage)
        };
        let serial = value_of("--serial-fd")?;
        let disks = value_of("--disk-dir")?.into();
        let fd = serial.to_str().and_then(|fd| fd.parse().ok()).ok_or(OptionsError::Usage)?;
        let serial = sys::inherited_fd(fd).map_err(|source| OptionsError::SerialFd { fd, source })?;
        Ok(Self::Process { serial, disks })
    }
}

impl KernelArgs {
    /// Parses the kernel's command line.
    ///
    /// # Errors
    /// The channel is missing, or unknown.
    pub(crate) fn parse(cmdline: &str) -> Result<Self, OptionsError> {
        let mut channel = None;
        let mut trace = false;
        let mut power_off = false;
        let mut waits = false;
        for word in cmdline.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match (key, value) {
                (machinen_protocol::CHANNEL_ARG, "vsock") => channel = Some(ChannelKind::Vsock),
                (machinen_protocol::CHANNEL_ARG, "serial") => channel = Some(ChannelKind::Serial),
                (machinen_protocol::CHANNEL_ARG, value) => {
                    return Err(OptionsError::UnknownChannel { value: value.to_owned() });
                }
                (TRACE_ARG, _) => trace = true,
                (POWER_OFF_ARG, _) => power_off = true,
                (machinen_protocol::TEMPLATE_ARG, _) => waits = true,
                _ => {}
            }
        }
        Ok(Self { channel: channel.ok_or(OptionsError::NoChannel)?, trace, power_off, waits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_channel_is_found_among_the_kernels_own_words() {
        let args =
            KernelArgs::parse("root=/dev/vda ro quiet machinen.channel=serial console=hvc0\n").unwrap();
        let plain = KernelArgs { channel: ChannelKind::Serial, trace: false, power_off: false, waits: false };
        assert_eq!(args, plain);
        let args =
            KernelArgs::parse("machinen.trace machinen.channel=vsock machinen.poweroff machinen.template");
        let all = KernelArgs { channel: ChannelKind::Vsock, trace: true, power_off: true, waits: true };
        assert_eq!(args.unwrap(), all);
    }

    #[test]
    fn a_missing_or_unknown_channel_is_an_error() {
        assert!(matches!(KernelArgs::parse("ro quiet"), Err(OptionsError::NoChannel)));
        let err = KernelArgs::parse("machinen.channel=pigeon").unwrap_err();
        assert_eq!(err.to_string(), "kernel command line has an unknown machinen.channel=pigeon");
    }
}
