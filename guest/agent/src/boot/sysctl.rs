//! Kernel settings that are not a container's to change and that an administrator of the host has no way to reach.

use super::{BootError, write};

/// Names below /proc/sys, and values. They are what systemd and distributions set on hosts, so what containers get with
/// runc there.
const ALL: [(&str, &str); 5] = [
    // Elasticsearch does not start with the kernel's 65530; databases and JVMs map many files.
    ("vm/max_map_count", "1048576"),
    ("kernel/pid_max", "4194304"),
    // The highest limit of open files that may be asked for (`--ulimit nofile=`), and the number of all of them, which is
    // bounded by memory anyway.
    ("fs/nr_open", "1073741816"),
    ("fs/file-max", "9223372036854775807"),
    // The kernel's messages are of the VM: a container reads them if it may on a host that keeps them from its users.
    ("kernel/dmesg_restrict", "1"),
];

/// # Errors
/// The kernel does not take one.
pub(super) fn set_all() -> Result<(), BootError> {
    ALL.iter().try_for_each(|(name, value)| write(format!("/proc/sys/{name}"), value))
}
