//! How the guest's instructions are run: by KVM where it really works, else by QEMU's own translation (TCG).

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    Kvm,
    /// QEMU's translator; the guest must be told how fast the host's time stamp counter runs.
    Tcg {
        tsc_khz: u32,
    },
}
