//! How the guest's instructions are run: by KVM where it really works, else by QEMU's own translation (TCG).
//!
//! Translation is no security boundary: QEMU's developers do not treat a guest's escape from it as a security bug
//! (QEMU documentation, "Security", "Non-virtualization use case"). So it is never chosen silently.
//!
//! That /dev/kvm exists proves little, and the CPU's flags prove less: inside another VM, KVM may emulate
//! some instructions slowly and fail on the rest. So KVM is tried, once per boot of the host; where it did not work
//! for a reason that may pass, it is tried again a minute later.

mod cache;
mod probe;
mod tsc;

use std::{
    fmt,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::Once,
    time::Duration,
};

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::FileError,
};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use cache::Tried;
use probe::Fault;

pub(crate) const DEVICE: &str = "/dev/kvm";

/// There while the module is loaded. A kernel has one implementation of KVM at a time.
const PVM: &str = "/sys/module/kvm_pvm";

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Accelerator {
    /// The processor, by the KVM of the host.
    Kvm,
    /// QEMU's translator. The guest needs to know how fast the host's time stamp counter runs.
    Tcg {
        /// Frequency of the time stamp counter, kHz, as measured on this host.
        tsc_khz: u32,
    },
}

/// Which accelerator the configuration asks for (`vm.accel`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelMode {
    /// KVM where it works, else TCG.
    Auto,
    /// KVM only; without it no VM starts.
    Kvm,
    /// The translator of QEMU, even where KVM works.
    Tcg,
    /// KVM by PVM, which needs no extensions of the processor and a guest kernel that is built for it.
    Pvm,
}

/// What was found out about this host. It is displayed as one sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccelVerdict {
    /// Whether KVM works on this host.
    pub kvm: KvmState,
    /// Frequency of the time stamp counter, kHz.
    pub tsc_khz: u32,
}

/// Whether KVM can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvmState {
    /// KVM runs the instructions of a guest.
    Works,
    /// It is that of PVM (the module kvm_pvm), which runs only kernels that are built for it. It is not tried.
    Pvm,
    /// There is no /dev/kvm.
    Absent,
    /// It cannot be opened, or only by root, and QEMU runs as an unprivileged user.
    Closed {
        /// Why the device cannot be opened, and what to do.
        reason: String,
    },
    /// It does not run a guest's instructions as it should.
    Broken {
        /// What a guest with KVM did wrong.
        reason: String,
    },
}

/// Why the accelerator could not be determined, or is not the configured one.
#[derive(Debug, thiserror::Error)]
pub enum AccelError {
    /// KVM is configured and cannot be used.
    #[error("vm.accel is kvm, but {0}")]
    NoKvm(AccelVerdict),
    /// PVM is configured and is not what the host has.
    #[error("vm.accel is pvm, but the host has not loaded the module kvm_pvm: {0}")]
    NoPvm(AccelVerdict),
    /// The kernel of guests on PVM cannot be read.
    #[error("vm.accel is pvm, whose guests need a kernel of their own, and vm.pvm_kernel cannot be used")]
    PvmKernel(#[source] FileError),
    /// The stored results of earlier measurements cannot be read or written.
    #[error(transparent)]
    Cache(#[from] FileError),
    /// The clock of the host cannot be read.
    #[error("cannot measure the time stamp counter")]
    Clock(#[source] io::Error),
}

impl HasKind for AccelError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoKvm(_) | Self::NoPvm(_) | Self::PvmKernel(_) => ErrorKind::FailedPrecondition,
            Self::Cache { .. } | Self::Clock(_) => ErrorKind::Internal,
        }
    }
}

/// Determines which accelerator this host has. Slow measurements are made once per boot and stored in
/// `run_dir` (made if it is missing). Blocks the first time: for 30 ms where KVM works or is absent, for some seconds at
/// most.
///
/// # Errors
/// The results in `run_dir` cannot be read or written, or the host's clock does not run.
pub fn verdict(run_dir: &Path) -> Result<AccelVerdict, AccelError> {
    verdict_by(run_dir, Tried::holds)
}

/// As [`verdict`], but KVM is tried in any case, and what is found is stored.
///
/// # Errors
/// As [`verdict`].
pub fn verdict_anew(run_dir: &Path) -> Result<AccelVerdict, AccelError> {
    verdict_by(run_dir, |_, _| false)
}

/// `holds`: whether a stored result holds at this time, in seconds since the host has booted.
fn verdict_by(run_dir: &Path, holds: fn(&Tried, u64) -> bool) -> Result<AccelVerdict, AccelError> {
    let device = open();
    let now = Duration::from(
        clock_gettime(ClockId::CLOCK_BOOTTIME).map_err(|error| AccelError::Clock(error.into()))?,
    );
    let mut facts = cache::load(run_dir)?.unwrap_or_default();
    facts.kvm = facts.kvm.filter(|tried| holds(tried, now.as_secs()));
    let mut learnt = false;
    let tsc_khz = match facts.tsc_khz {
        Some(known) => known,
        None => {
            learnt = true;
            *facts.tsc_khz.insert(tsc::measure().map_err(AccelError::Clock)?)
        }
    };
    let kvm = match device {
        Err(kvm) => kvm,
        Ok(Ok(())) if Path::new(PVM).exists() => KvmState::Pvm,
        Ok(access) => {
            let tried = facts.kvm.get_or_insert_with(|| {
                learnt = true;
                match probe::run() {
                    Ok(()) => Tried::Works,
                    Err(Fault::Certain(reason)) => Tried::Broken(reason),
                    Err(Fault::Doubtful(reason)) => Tried::Doubtful { reason, at: now.as_secs() },
                }
            });
            match tried.clone() {
                Tried::Works => {
                    access.map_or_else(|reason| KvmState::Closed { reason }, |()| KvmState::Works)
                }
                Tried::Broken(reason) | Tried::Doubtful { reason, .. } => KvmState::Broken { reason },
            }
        }
    };
    if learnt {
        cache::store(run_dir, facts)?;
    }
    Ok(AccelVerdict { kvm, tsc_khz })
}

/// Determines the accelerator of a VM. One that is not configured but only chosen because KVM does not work is
/// warned of in the log, once for each process.
///
/// # Errors
/// As [`verdict`] and [`AccelVerdict::choose`].
pub fn for_vm(run_dir: &Path, wanted: AccelMode) -> Result<Accelerator, AccelError> {
    static WARNED: Once = Once::new();
    let verdict = verdict(run_dir)?;
    let accelerator = verdict.choose(wanted)?;
    if wanted == AccelMode::Auto && accelerator != Accelerator::Kvm {
        WARNED.call_once(|| {
            tracing::warn!("{verdict}; vm.accel = \"kvm\" refuses this, vm.accel = \"tcg\" accepts it");
        });
    }
    Ok(accelerator)
}

impl AccelVerdict {
    /// The accelerator for the configured value.
    ///
    /// # Errors
    /// KVM or PVM is configured and does not work.
    pub fn choose(&self, wanted: AccelMode) -> Result<Accelerator, AccelError> {
        let tcg = Accelerator::Tcg { tsc_khz: self.tsc_khz };
        match (wanted, &self.kvm) {
            (AccelMode::Tcg, _) => Ok(tcg),
            (AccelMode::Auto | AccelMode::Kvm, KvmState::Works) => Ok(Accelerator::Kvm),
            (AccelMode::Pvm, KvmState::Pvm) => Ok(Accelerator::Kvm),
            (AccelMode::Pvm, _) => Err(AccelError::NoPvm(self.clone())),
            (AccelMode::Auto, _) => Ok(tcg),
            (AccelMode::Kvm, _) => Err(AccelError::NoKvm(self.clone())),
        }
    }

    /// What runs guests with the configured value, and why, as one sentence.
    ///
    /// # Errors
    /// KVM or PVM is configured and does not work.
    pub fn describe(&self, wanted: AccelMode) -> Result<String, AccelError> {
        self.choose(wanted)?;
        Ok(match (wanted, &self.kvm) {
            (AccelMode::Tcg, KvmState::Works) => format!("vm.accel is tcg, although KVM works: {TRANSLATED}"),
            (AccelMode::Tcg, _) => format!("vm.accel is tcg: {TRANSLATED}"),
            (AccelMode::Pvm, _) => {
                "vm.accel is pvm: KVM of the module kvm_pvm runs guests, which is not tested".to_owned()
            }
            (AccelMode::Auto | AccelMode::Kvm, _) => self.to_string(),
        })
    }
}

const TRANSLATED: &str =
    "guests run by translation (TCG), which is several times slower and no isolation boundary";

impl Accelerator {
    /// What clients of containerd read about it in the runtime's information.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg { .. } => "tcg",
        }
    }

    /// Supplementary groups that QEMU needs to use it: the group of /dev/kvm.
    pub fn groups(self) -> Vec<u32> {
        match (self, fs::metadata(DEVICE)) {
            (Self::Kvm, Ok(device)) => vec![device.gid()],
            _ => Vec::new(),
        }
    }
}

impl fmt::Display for AccelVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kvm {
            KvmState::Works => f.write_str("KVM works: guests run on the CPU itself"),
            KvmState::Pvm => {
                write!(
                    f,
                    "{DEVICE} is that of PVM, which needs a guest kernel that is built for it: {TRANSLATED}; set vm.accel to \
                     \"pvm\" and vm.pvm_kernel to such a kernel"
                )
            }
            KvmState::Absent => {
                write!(
                    f,
                    "there is no {DEVICE}: {TRANSLATED}; load the module kvm_intel or kvm_amd if the CPU has it"
                )
            }
            KvmState::Closed { reason } => write!(f, "{DEVICE} cannot be used ({reason}): {TRANSLATED}"),
            KvmState::Broken { reason } => {
                write!(f, "{DEVICE} exists but does not work here ({reason}): {TRANSLATED}")
            }
        }
    }
}

/// Whether there is a device that root can open, and then whether QEMU can as well.
fn open() -> Result<Result<(), String>, KvmState> {
    match File::options().read(true).write(true).open(DEVICE).and_then(|device| device.metadata()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(KvmState::Absent),
        Err(error) => Err(KvmState::Closed { reason: error.to_string() }),
        Ok(device) => Ok(accessible(device.mode(), device.gid())),
    }
}

/// Whether QEMU can open the device. It runs as a user whose only privilege is the device's group.
fn accessible(mode: u32, gid: u32) -> Result<(), String> {
    let reason = if mode & 0o006 == 0o006 {
        return Ok(());
    } else if mode & 0o060 != 0o060 {
        "only its owner may open it, and QEMU runs as an unprivileged user; try `chgrp kvm` and `chmod 660`"
    } else if gid == 0 {
        "its group is root, which QEMU does not get; try `chgrp kvm`"
    } else {
        return Ok(());
    };
    Err(reason.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict_of(kvm: KvmState) -> AccelVerdict {
        AccelVerdict { kvm, tsc_khz: 7 }
    }

    #[test]
    fn the_configuration_and_the_host_decide_together() {
        let (works, absent) = (verdict_of(KvmState::Works), verdict_of(KvmState::Absent));
        assert_eq!(works.choose(AccelMode::Auto).unwrap(), Accelerator::Kvm);
        assert_eq!(works.choose(AccelMode::Tcg).unwrap(), Accelerator::Tcg { tsc_khz: 7 });
        assert_eq!(absent.choose(AccelMode::Auto).unwrap(), Accelerator::Tcg { tsc_khz: 7 });
        let error = absent.choose(AccelMode::Kvm).unwrap_err().to_string();
        assert!(error.starts_with("vm.accel is kvm, but there is no /dev/kvm"), "{error}");
    }

    #[test]
    fn pvm_is_chosen_only_where_it_is_configured() {
        let (works, pvm) = (verdict_of(KvmState::Works), verdict_of(KvmState::Pvm));
        assert_eq!(pvm.choose(AccelMode::Pvm).unwrap(), Accelerator::Kvm);
        assert_eq!(pvm.choose(AccelMode::Auto).unwrap(), Accelerator::Tcg { tsc_khz: 7 });
        let error = pvm.choose(AccelMode::Kvm).unwrap_err().to_string();
        assert!(error.contains("that of PVM") && error.contains("vm.pvm_kernel"), "{error}");
        let error = works.choose(AccelMode::Pvm).unwrap_err().to_string();
        assert!(error.contains("kvm_pvm") && error.contains("KVM works"), "{error}");
        assert!(pvm.describe(AccelMode::Auto).unwrap().contains("vm.accel to \"pvm\""));
        assert!(pvm.describe(AccelMode::Pvm).unwrap().contains("not tested"));
    }

    #[test]
    fn what_is_chosen_is_described() {
        let (works, absent) = (verdict_of(KvmState::Works), verdict_of(KvmState::Absent));
        let text = works.describe(AccelMode::Tcg).unwrap();
        assert!(text.starts_with("vm.accel is tcg, although KVM works: guests run by translation"), "{text}");
        let text = absent.describe(AccelMode::Tcg).unwrap();
        assert!(text.starts_with("vm.accel is tcg: guests run by translation"), "{text}");
        assert_eq!(works.describe(AccelMode::Auto).unwrap(), works.to_string());
        absent.describe(AccelMode::Kvm).unwrap_err();
    }

    #[test]
    fn a_doubtful_result_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let at = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap()).as_secs();
        let kvm = Some(Tried::Doubtful { reason: "it was busy".into(), at });
        cache::store(dir.path(), cache::Facts { tsc_khz: Some(7), kvm, ..cache::Facts::default() }).unwrap();
        let was_busy = |verdict: AccelVerdict| matches!(verdict.kvm, KvmState::Broken { reason } if reason == "it was busy");
        assert!(was_busy(verdict(dir.path()).unwrap()) || open().is_err());
        assert!(!was_busy(verdict_anew(dir.path()).unwrap()));
    }

    #[test]
    fn the_device_must_be_open_to_a_group_of_its_own() {
        for (mode, gid, usable) in
            [(0o600, 0, false), (0o660, 0, false), (0o660, 104, true), (0o666, 0, true), (0o640, 104, false)]
        {
            assert_eq!(accessible(mode, gid).is_ok(), usable, "{mode:o} {gid}");
        }
    }

    #[test]
    fn this_host_is_measured_once() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run");
        let first = verdict(&run_dir).unwrap();
        assert!((100_000..10_000_000).contains(&first.tsc_khz), "{first:?}");
        // A second measurement would hardly give the same number.
        assert_eq!(verdict(&run_dir).unwrap(), first);
        let text = first.to_string();
        println!("{text}; {} kHz", first.tsc_khz);
        assert!(text.contains("KVM") || text.contains(DEVICE), "{text}");
    }
}
