//! The features of the machine on which a process depends once it has run there.

use nix::sys::utsname::uname;
use procfs::Current as _;

use super::CriuError;

/// The CPU's features, by the kernel's names.
///
/// # Errors
/// Those of reading /proc/cpuinfo.
pub(super) fn flags() -> Result<Vec<String>, CriuError> {
    let info = procfs::CpuInfo::current().map_err(CriuError::Inspect)?;
    Ok(info.flags(0).unwrap_or_default().into_iter().map(str::to_owned).collect())
}

pub(super) fn kernel() -> String {
    uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default()
}

/// Names in /proc/cpuinfo that mean nothing to a process: how the kernel itself keeps time, switches address spaces and
/// avoids faults of processors, what only the kernel can execute, and that some instructions are fast. Those of KVM and
/// of emulation differ, also with one model of a processor.
const NOT_FOR_PROCESSES: &[&str] = &[
    // Time, and interrupts.
    "apic",
    "arat",
    "constant_tsc",
    "kvmclock",
    "kvmclock-stable-bit",
    "nonstop_tsc",
    "tsc_adjust",
    "tsc_deadline_timer",
    "tsc_known_freq",
    "tsc_reliable",
    "tsc_scale",
    "x2apic",
    "xtopology",
    // Memory and privileges, by the kernel.
    "de",
    "invpcid",
    "invpcid_single",
    "mca",
    "mce",
    "mtrr",
    "nx",
    "pae",
    "pat",
    "pcid",
    "pdpe1gb",
    "pge",
    "pks",
    "pse",
    "pse36",
    "pti",
    "smap",
    "smep",
    "ss",
    "svm",
    "umip",
    "vme",
    "vmx",
    // Other modes, the firmware, and virtual machines.
    "acpi",
    "arch_capabilities",
    "arch_perfmon",
    "cmp_legacy",
    "cpuid",
    "cpuid_fault",
    "ht",
    "hypervisor",
    "lbrv",
    "msr",
    "npt",
    "nrip_save",
    "pausefilter",
    "pfthreshold",
    "svm_lock",
    "tpr_shadow",
    "v_vmsave_vmload",
    "vgif",
    "vmmcall",
    // Faults of processors.
    "amd_ppin",
    "flush_l1d",
    "ibpb",
    "ibrs",
    "ibrs_enhanced",
    "md_clear",
    "ssbd",
    "stibp",
    "virt_ssbd",
    // Speed.
    "3dnowprefetch",
    "erms",
    "fsrc",
    "fsrm",
    "fzrm",
    "nopl",
    "rep_good",
];

/// Checks that no feature is missing, since a process may have chosen its code by the CPU's features.
///
/// # Errors
/// Features are missing; the error names them.
pub(super) fn check(wanted: &[String]) -> Result<(), CriuError> {
    let missing = missing(wanted, &flags()?);
    if missing.is_empty() { Ok(()) } else { Err(CriuError::Cpu { missing: missing.join(" ") }) }
}

/// The features that processes may use, and that are not `here`; some of them, if they are many.
fn missing<'a>(wanted: &'a [String], here: &[String]) -> Vec<&'a str> {
    let wanted = wanted.iter().filter(|flag| !here.contains(flag)).map(String::as_str);
    wanted.filter(|flag| !NOT_FOR_PROCESSES.contains(flag)).take(16).collect()
}

/// Checks that this kernel is not older: a newer kernel can restore what an older one has dumped, but not the
/// reverse.
///
/// # Errors
/// This kernel is older.
pub(super) fn check_kernel(theirs: &str) -> Result<(), CriuError> {
    let ours = kernel();
    if version(theirs) > version(&ours) {
        return Err(CriuError::Kernel { theirs: theirs.chars().take(64).collect(), ours });
    }
    Ok(())
}

/// The numbers of a release: `6.12.117` of `6.12.117-machinen`.
fn version(release: &str) -> Vec<u32> {
    let number = release.split(|c: char| !(c.is_ascii_digit() || c == '.')).next().unwrap_or_default();
    number.split('.').map_while(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_number() {
        assert_eq!(version("6.12.117-machinen"), [6, 12, 117]);
        assert!(version("6.9") < version("6.12.1"));
        assert!(check_kernel("1.0").is_ok());
        assert!(check_kernel("999.0-x").unwrap_err().to_string().contains("newer"));
    }

    #[test]
    fn features_that_are_missing_are_named() {
        assert!(check(&flags().unwrap()).is_ok());
        let err = check(&["fpu".into(), "warp".into()]).unwrap_err();
        assert!(err.to_string().contains("lacks: warp"), "{err}");
    }

    /// What /proc/cpuinfo says of QEMU's Nehalem by KVM and by emulation.
    #[test]
    fn what_only_the_kernel_uses_is_not_missed() {
        let flags = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let (kvm, tcg) = (flags("fpu x2apic tsc_known_freq sse4_2"), flags("fpu tsc_reliable erms"));
        assert_eq!(missing(&kvm, &tcg), ["sse4_2"]);
        assert!(missing(&tcg, &kvm).is_empty());
    }
}
