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

/// Checks that no feature is missing, since a process may have chosen its code by the CPU's features.
///
/// # Errors
/// Features are missing; the error names them.
pub(super) fn check(wanted: &[String]) -> Result<(), CriuError> {
    let here = flags()?;
    let missing: Vec<&str> =
        wanted.iter().filter(|flag| !here.contains(flag)).map(String::as_str).take(16).collect();
    if missing.is_empty() { Ok(()) } else { Err(CriuError::Cpu { missing: missing.join(" ") }) }
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
        assert!(err.to_string().ends_with("lacks: warp"), "{err}");
    }
}
