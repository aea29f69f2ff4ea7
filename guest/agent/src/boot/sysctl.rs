//! Kernel settings that a container must not change and an administrator of the host cannot reach.

use super::{BootError, write};

/// Names below /proc/sys, and values. systemd and distributions set these on hosts, so containers have them
/// there with runc.
const ALL: [(&str, &str); 5] = [
    // Elasticsearch does not start with the kernel's 65530; databases and JVMs map many files.
    ("vm/max_map_count", "1048576"),
    ("kernel/pid_max", "4194304"),
    // The highest limit on open files that a container may ask for (`--ulimit nofile=`), and the limit on
    // open files of the whole system, which memory limits anyway.
    ("fs/nr_open", "1073741816"),
    ("fs/file-max", "9223372036854775807"),
    // The kernel's messages concern the VM: a container may read them only if it could on a host that hides
    // them from its users.
    ("kernel/dmesg_restrict", "1"),
];

/// # Errors
/// The kernel refuses a value.
pub(super) fn set_all() -> Result<(), BootError> {
    ALL.iter().try_for_each(|(name, value)| write(format!("/proc/sys/{name}"), value))
}
