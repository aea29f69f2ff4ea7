//! QEMU's version without starting a VM, for `machinen check`.

use std::path::Path;

use machinen_base::process::{self, ProcessError};

use super::qmp::{OLDEST, QemuVersion, QmpError};

/// Why a QEMU cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// QEMU cannot be executed.
    #[error(transparent)]
    Run(#[from] ProcessError),
    /// The program is probably not QEMU.
    #[error("{program} does not report its version: {output:?}")]
    NoVersion {
        /// Path or name of the program.
        program: String,
        /// The first line of what the program printed, at most 80 characters.
        output: String,
    },
    /// QEMU lacks something that machinen uses.
    #[error(transparent)]
    TooOld(QmpError),
}

/// Asks `qemu` for its version. Blocks.
///
/// # Errors
/// QEMU cannot be run, or is older than what machinen uses.
pub fn qemu_version(qemu: &Path) -> Result<QemuVersion, QemuError> {
    let output = process::run(qemu, ["--version"], &[])?;
    let text = String::from_utf8_lossy(&output.stdout);
    match parse(&text) {
        Some(version) if version < OLDEST => Err(QemuError::TooOld(QmpError::TooOld(version))),
        Some(version) => Ok(version),
        None => Err(QemuError::NoVersion {
            program: qemu.display().to_string(),
            output: text.lines().next().unwrap_or_default().chars().take(80).collect(),
        }),
    }
}

/// `QEMU emulator version 7.2.22 (Debian …)`
fn parse(text: &str) -> Option<QemuVersion> {
    let mut numbers =
        text.split("version ").nth(1)?.split(|char: char| !char.is_ascii_digit()).map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some(QemuVersion { major: next()?, minor: next()?, micro: next().unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        let version = |major, minor, micro| Some(QemuVersion { major, minor, micro });
        assert_eq!(parse("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright"), version(7, 2, 22));
        assert_eq!(parse("QEMU emulator version 10.0"), version(10, 0, 0));
        assert_eq!(parse("something else"), None);
    }

    #[test]
    fn a_program_that_is_not_qemu_is_reported() {
        assert!(matches!(qemu_version(Path::new("/bin/true")), Err(QemuError::NoVersion { .. })));
        assert!(matches!(qemu_version(Path::new("/nonexistent/qemu")), Err(QemuError::Run(_))));
    }
}
