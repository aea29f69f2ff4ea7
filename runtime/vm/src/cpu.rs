//! Which processor a guest sees (`vm.cpu`).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{accel::Accelerator, spec::VmSpec};

/// Most characters of a [`CpuModel`].
const LONGEST: usize = 256;

/// The processor that guests see: a model of QEMU's, with features added and removed, such as `Nehalem,+aes`. Empty: with
/// KVM the host's processor, with emulation all that QEMU can emulate.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuModel(String);

/// The text is no [`CpuModel`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a processor: it is the name of a model of QEMU's (`qemu-system-x86_64 -cpu help` lists them), after which \
     features may follow, as in \"Nehalem,+aes,-popcnt\""
)]
pub struct CpuModelError(String);

impl TryFrom<String> for CpuModel {
    type Error = CpuModelError;

    fn try_from(text: String) -> Result<Self, CpuModelError> {
        let name = |name: &str| {
            !name.is_empty()
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
                && !name.starts_with(['-', '.'])
        };
        let mut parts = text.split(',');
        let model = parts.next().is_some_and(name);
        let features = parts.all(|part| part.strip_prefix(['+', '-']).is_some_and(name));
        let fits = text.is_empty() || (model && features && text.len() <= LONGEST);
        if fits { Ok(Self(text)) } else { Err(CpuModelError(text.chars().take(LONGEST).collect())) }
    }
}

impl From<CpuModel> for String {
    fn from(model: CpuModel) -> Self {
        model.0
    }
}

/// What an error of a VM that does not start says of it: nothing if nothing is configured.
impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_str() {
            "" => Ok(()),
            model => write!(f, "; vm.cpu is {model:?}, and QEMU lists what it knows with `-cpu help`"),
        }
    }
}

/// All that TCG can emulate.
const EMULATED: &str = "max";

/// The promise that `rep movsb` and `rep stosb` are fast. The guest's kernel and libc would copy and clear memory by them,
/// which TCG executes byte by byte.
const NOT_EMULATED: &str = ",-erms,-fsrm";

/// The value of QEMU's `-cpu`.
///
/// With KVM the guest lacks those parts that make KVM itself larger, unless they are asked for. QEMU knows the names of all
/// makers' features on each processor.
pub(crate) fn option(spec: &VmSpec) -> String {
    let model = |default| if spec.cpu.0.is_empty() { default } else { spec.cpu.0.as_str() };
    match spec.accel {
        Accelerator::Kvm => {
            let nested = if spec.nested_kvm { "" } else { ",-vmx,-svm" };
            let pmu = if spec.pmu { "" } else { ",pmu=off" };
            format!("{}{nested}{pmu}", model("host"))
        }
        Accelerator::Tcg { .. } => format!("{}{NOT_EMULATED}", model(EMULATED)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ChannelKind, qemu::argv::tests::spec};

    fn cpu(text: &str) -> CpuModel {
        CpuModel::try_from(text.to_owned()).unwrap()
    }

    #[test]
    fn a_model_and_features_are_a_processor() {
        for text in ["", "Nehalem", "EPYC-v4", "qemu64,+ssse3,-svm", "Skylake-Server-noTSX-IBRS,+md-clear"] {
            assert_eq!(String::from(cpu(text)), text);
        }
    }

    #[test]
    fn no_other_option_of_qemu_can_be_added() {
        let long = "a".repeat(LONGEST + 1);
        for text in ["a b", "max,host-phys-bits=on", "a,", ",", "-device", "a,,b", "a,+", "a,aes", "é", &long]
        {
            let error = CpuModel::try_from(text.to_owned()).unwrap_err().to_string();
            assert!(error.contains("-cpu help"), "{error}");
        }
    }

    #[test]
    fn parts_of_the_processor_are_asked_for() {
        let kvm = spec(Accelerator::Kvm, ChannelKind::Serial);
        assert_eq!(option(&kvm), "host,-vmx,-svm,pmu=off");
        assert_eq!(option(&VmSpec { nested_kvm: true, ..kvm.clone() }), "host,pmu=off");
        assert_eq!(option(&VmSpec { pmu: true, ..kvm.clone() }), "host,-vmx,-svm");
        let model = VmSpec { cpu: cpu("Nehalem,+aes"), ..kvm };
        assert_eq!(option(&model), "Nehalem,+aes,-vmx,-svm,pmu=off");
        let emulated = VmSpec { accel: Accelerator::Tcg { tsc_khz: 1 }, ..model };
        assert_eq!(option(&emulated), "Nehalem,+aes,-erms,-fsrm");
        assert_eq!(option(&VmSpec { cpu: CpuModel::default(), ..emulated }), "max,-erms,-fsrm");
    }

    #[test]
    fn an_error_names_the_key() {
        assert_eq!(CpuModel::default().to_string(), "");
        assert!(cpu("Nehalem").to_string().contains("vm.cpu is \"Nehalem\""));
    }
}
