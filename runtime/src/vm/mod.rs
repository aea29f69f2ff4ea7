//! A microVM: QEMU, its disks and its channel.
