//! Why a VM ended.

use machinen_base::{process::ProcessExit, text::printable};
use nix::sys::signal::Signal;

/// Why a VM ended, by QEMU's last events and its exit status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmExit {
    /// The owner asked for it.
    Requested,
    /// The guest powered itself off.
    PoweredOff,
    /// The guest reset, which only a kernel that panicked does.
    GuestPanic {
        /// The last lines of the console of the guest.
        console: String,
    },
    /// QEMU was killed, for example by the host's OOM killer.
    Killed {
        /// The number of the signal.
        signal: i32,
        /// What QEMU printed last.
        stderr: String,
    },
    /// QEMU exited with an error.
    Failed {
        /// The exit status of QEMU.
        code: i32,
        /// What QEMU printed last.
        stderr: String,
    },
}

impl VmExit {
    /// Whether QEMU was killed from outside of the VM, by the OOM killer or by a user of the host: no guest causes SIGKILL.
    pub(crate) fn is_sigkill(&self) -> bool {
        matches!(self, Self::Killed { signal, .. } if *signal == Signal::SIGKILL as i32)
    }
}

impl std::fmt::Display for VmExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Requested => f.write_str("it was asked to stop"),
            Self::PoweredOff => f.write_str("the guest powered itself off"),
            Self::GuestPanic { console } => {
                write!(f, "the guest kernel panicked{}", quoted("console", console))
            }
            Self::Killed { signal, stderr } => {
                write!(f, "QEMU {}{}", ProcessExit::Signal(*signal), quoted("stderr", stderr))
            }
            Self::Failed { code, stderr } => {
                write!(f, "QEMU {}{}", ProcessExit::Code(*code), quoted("stderr", stderr))
            }
        }
    }
}

/// What was observed while the VM ran.
#[derive(Debug, Default)]
pub(super) struct ExitEvidence {
    /// The owner asked for the end.
    pub(super) requested: bool,
    /// `reason` of QEMU's last SHUTDOWN event.
    pub(super) shutdown: Option<String>,
    pub(super) panicked: bool,
}

pub(super) fn classify(
    evidence: &ExitEvidence,
    exit: ProcessExit,
    console: String,
    stderr: String,
) -> VmExit {
    let reset = evidence.shutdown.as_deref() == Some("guest-reset");
    match exit {
        _ if evidence.requested => VmExit::Requested,
        _ if evidence.panicked || reset => VmExit::GuestPanic { console },
        ProcessExit::Signal(signal) => VmExit::Killed { signal, stderr },
        ProcessExit::Code(0) => VmExit::PoweredOff,
        ProcessExit::Code(code) => VmExit::Failed { code, stderr },
    }
}

/// `; its <name> ended with: <text>`, or nothing if there is no text.
pub(super) fn quoted(name: &str, text: &str) -> String {
    let line: Vec<String> =
        text.lines().map(str::trim).filter(|line| !line.is_empty()).map(printable).collect();
    if line.is_empty() {
        String::new()
    } else {
        format!("; its {name} ended with: {}", printable(&line.join(" | ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classified(requested: bool, shutdown: Option<&str>, exit: ProcessExit) -> VmExit {
        let evidence = ExitEvidence { requested, shutdown: shutdown.map(str::to_owned), panicked: false };
        classify(&evidence, exit, "con".into(), "err".into())
    }

    #[test]
    fn every_end_has_its_reason() {
        let killed = ProcessExit::Signal(9);
        assert_eq!(classified(true, None, killed), VmExit::Requested);
        assert_eq!(classified(false, None, killed), VmExit::Killed { signal: 9, stderr: "err".into() });
        assert_eq!(classified(false, Some("guest-shutdown"), ProcessExit::Code(0)), VmExit::PoweredOff);
        let panic = VmExit::GuestPanic { console: "con".into() };
        assert_eq!(classified(false, Some("guest-reset"), ProcessExit::Code(0)), panic);
        assert_eq!(
            classified(false, None, ProcessExit::Code(1)),
            VmExit::Failed { code: 1, stderr: "err".into() }
        );
        let evidence = ExitEvidence { panicked: true, ..ExitEvidence::default() };
        assert_eq!(classify(&evidence, ProcessExit::Code(0), "con".into(), String::new()), panic);
    }

    #[test]
    fn the_text_quotes_what_was_printed_last() {
        let text = VmExit::Failed { code: 1, stderr: "no memory\n\nbye\n".into() }.to_string();
        assert_eq!(text, "QEMU exited with status 1; its stderr ended with: no memory | bye");
        let text = VmExit::Killed { signal: 9, stderr: String::new() }.to_string();
        assert_eq!(text, "QEMU was killed by SIGKILL");
    }
}
