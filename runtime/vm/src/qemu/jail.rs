//! The jail of QEMU: what QEMU may use and see, since a guest may have taken it over.

use std::path::{Path, PathBuf};

use machinen_base::process::{ChildLimits, Jail, JailFiles, Namespaces, ResourceLimits, RunAs, find_program};

use crate::{
    accel::{self, Accelerator},
    qemu::{
        argv::{self, Start},
        syscalls,
    },
    spec::VmSpec,
};

/// Each of a VM's disks takes two descriptors of QEMU, and a controller has 256 disks.
const OPEN_FILES: u64 = 1024;

/// The largest writable disk that a configuration or an annotation gives a container, bytes.
const LARGEST_DISK: u64 = 16 << 40;

/// QEMU's threads besides those of the vCPUs: at most 64 that read and write disks, and a few for its event loop, RCU,
/// and the state of a VM.
const THREADS: u64 = 128;

/// The host's kernel kills QEMU before the shim, which reports the reason, and whose own value containerd sets to at most
/// a few above that of containerd (proc_pid_oom_score_adj(5)).
const OOM_SCORE: i16 = 100;

/// Numbers of capabilities (linux/capability.h).
const SETGID: u8 = 6;
const SETUID: u8 = 7;
const SETPCAP: u8 = 8;
const SYS_ADMIN: u8 = 21;

/// Below the `share` of QEMU's prefix: its firmware, which distributions put into packages of their own.
const DATA: [&str; 3] = ["qemu", "qemu-kvm", "seabios"];

/// The restrictions of a QEMU that runs `spec` as the user `identity`.
pub(crate) fn jail(spec: &VmSpec, start: Start, identity: RunAs) -> Jail {
    let limits = ResourceLimits {
        // Disks raise it when they are attached, where this process may do that.
        file_size: Some(match ChildLimits::can_be_raised() {
            true => argv::own_memory_file(spec, start),
            false => LARGEST_DISK,
        }),
        open_files: Some(OPEN_FILES),
        processes: Some(u64::from(spec.vcpus) + THREADS),
        locked_memory: Some(0),
        cpu_seconds: None,
    };
    if start == Start::Template && spec.twins {
        return original(spec, limits);
    }
    let system_calls = Some(syscalls::allowed(spec.accel, &spec.channel));
    Jail {
        limits,
        files: Some(files(spec)),
        system_calls,
        oom_score_adj: Some(OOM_SCORE),
        ..Jail::strict(identity)
    }
}

/// The restrictions of a QEMU that is to have twins. It runs nothing but the guest's kernel and agent, and stands still when a
/// container's code runs in its twins. It can make the twins other users without capabilities, with
/// pids of their own.
fn original(spec: &VmSpec, limits: ResourceLimits) -> Jail {
    let strict = Jail::strict(RunAs::default());
    Jail {
        limits: ResourceLimits { processes: None, ..limits },
        files: Some(files(spec)),
        identity: None,
        namespaces: Namespaces { pid: false, ..strict.namespaces },
        capabilities: Some(vec![SETGID, SETUID, SETPCAP, SYS_ADMIN]),
        oom_score_adj: Some(OOM_SCORE),
        ..strict
    }
}

fn files(spec: &VmSpec) -> JailFiles {
    let mut readable = data(&find_program(&spec.qemu));
    readable.extend(spec.qemu_files.iter().cloned());
    let devices = match spec.accel {
        Accelerator::Kvm => vec![accel::DEVICE.into()],
        Accelerator::Tcg { .. } => Vec::new(),
    };
    JailFiles { readable, devices, ..JailFiles::default() }
}

/// The directories of QEMU's data, which it finds from the path of its program.
fn data(program: &Path) -> Vec<PathBuf> {
    let program = program.canonicalize().unwrap_or_else(|_| program.to_owned());
    let prefix = program.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    DATA.iter().map(|name| prefix.join("share").join(name)).collect()
}

#[cfg(test)]
mod tests {
    use machinen_base::process::{ReservedUser, probe};

    use super::*;
    use crate::{ChannelKind, qemu::argv::tests::spec};

    #[test]
    fn a_taken_over_qemu_reaches_nothing() {
        let tcg = Accelerator::Tcg { tsc_khz: 1 };
        let spec = |channel| VmSpec { qemu: "/bin/sh".into(), ..spec(tcg, channel) };
        let (serial, vsock) = (spec(ChannelKind::Serial), spec(ChannelKind::KernelVsock));
        let user = ReservedUser::reserve().unwrap();
        let starts = [Start::Boot, Start::Template, Start::Clone];
        for (start, spec) in starts.iter().flat_map(|start| [(*start, &serial), (*start, &vsock)]) {
            let mut jail = jail(spec, start, user.run_as(Vec::new()));
            jail.ignore_hole_punching = (start == Start::Clone).then_some(9);
            assert_eq!(probe(&jail, 0).unwrap(), Vec::<String>::new(), "{start:?}");
        }
    }

    #[test]
    fn no_list_of_system_calls_has_a_way_out() {
        for accel in [Accelerator::Kvm, Accelerator::Tcg { tsc_khz: 1 }] {
            for channel in [ChannelKind::KernelVsock, ChannelKind::Serial] {
                assert_eq!(syscalls::allowed(accel, &channel).forbidden(), None);
            }
        }
    }

    #[test]
    fn data_is_in_the_prefix_of_the_program() {
        assert_eq!(data(Path::new("/opt/none/bin/qemu"))[0], Path::new("/opt/none/share/qemu"));
        assert_eq!(data(Path::new("/qemu"))[0], Path::new("/share/qemu"));
    }
}
