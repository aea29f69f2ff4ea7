//! One vCPU, a few instructions: does KVM run them, and at the speed of a CPU?
//!
//! The first part is what emulators of the whole instruction set have been seen to lack, an SSE and a 16-byte
//! locked instruction; the second is a loop that takes a CPU about a millisecond and an emulator minutes.
//! Anything but HLT in time after each part is a fault. Time is that of the processor, which a busy host gives late: the
//! probe's thread is charged for what its guest runs.

use std::{io, num::NonZeroUsize, thread, time::Duration};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use machinen_base::sys::kvm::{GuestMemory, interrupt_only_by, os_error};
use nix::{
    sys::{
        signal::{SigEvent, SigSet, SigevNotify, Signal},
        timer::{Expiration, Timer, TimerSetTimeFlags},
    },
    time::ClockId,
    unistd::gettid,
};

/// What both parts together may take of the processor's time. It is far more than a CPU needs, also one that is emulated
/// itself, and far less than an emulator of single instructions needs.
const CPU_TIME: Duration = Duration::from_millis(250);
/// How long they may take in all. A vCPU that neither runs nor stops is interrupted by this.
const PATIENCE: Duration = Duration::from_secs(10);

/// Blocked everywhere in the probe's thread but inside KVM_RUN, so it is never delivered.
const ALARM: Signal = Signal::SIGVTALRM;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x4000;
const DATA: u64 = 0x8000;
const SIZE: NonZeroUsize = NonZeroUsize::new(0x10000).expect("not zero");

#[rustfmt::skip]
const PROGRAM: &[u8] = &[
    0x0f, 0x57, 0xc0,                   // xorps xmm0, xmm0
    0xf0, 0x48, 0x0f, 0xc7, 0x0b,       // lock cmpxchg16b [rbx]
    0xf4,                               // hlt
    0xb9, 0x80, 0x84, 0x1e, 0x00,       // mov ecx, 2_000_000
    0xff, 0xc9,                         // dec ecx
    0x75, 0xfc,                         // jnz to the dec
    0xf4,                               // hlt
];

/// Why KVM is not fit for use.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It is not, as long as this kernel runs.
    Certain(String),
    /// It may be at another time: what failed depends on what else the host does.
    Doubtful(String),
}

impl Fault {
    fn of(what: &str, error: &io::Error) -> Self {
        let text = format!("{what}: {error}");
        match error.raw_os_error() {
            // EBUSY: another hypervisor has the processor's extensions.
            Some(libc::EBUSY | libc::EAGAIN | libc::EINTR | libc::EMFILE | libc::ENFILE | libc::ENOMEM) => {
                Self::Doubtful(text)
            }
            _ => Self::Certain(text),
        }
    }
}

/// # Errors
/// A sentence that describes what went wrong.
pub(super) fn run() -> Result<(), Fault> {
    // The thread's signal mask, its timers and a pending signal end with it.
    let probe = thread::Builder::new().name("kvm-probe".into()).spawn(probe);
    let probe = probe.map_err(|error| Fault::Doubtful(format!("no thread for the probe: {error}")))?;
    probe.join().unwrap_or_else(|_| Err(Fault::Doubtful("the probe panicked".into())))
}

fn probe() -> Result<(), Fault> {
    let failed = |what: &'static str| move |error| Fault::of(what, &os_error(error));
    let kvm = Kvm::new().map_err(failed("opening it"))?;
    let vm = kvm.create_vm().map_err(failed("making a VM"))?;
    // Intel CPUs without "unrestricted guest" need a place for a task state segment.
    vm.set_tss_address(0xfffb_d000).map_err(failed("placing the TSS"))?;
    let mut memory = GuestMemory::new(SIZE).map_err(|error| Fault::of("no memory", &error))?;
    fill(&mut memory);
    memory.map_into(&vm).map_err(|error| Fault::of("giving it memory", &error))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("making a vCPU"))?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("asking for the CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("setting the CPUID"))?;
    enter_long_mode(&vcpu).map_err(failed("setting registers"))?;

    SigSet::all().thread_block().map_err(|error| Fault::of("blocking signals", &error.into()))?;
    let alarm = |clock, time| alarm(clock, time).map_err(|error| Fault::of("no timer", &error.into()));
    let alarms =
        [alarm(ClockId::CLOCK_THREAD_CPUTIME_ID, CPU_TIME)?, alarm(ClockId::CLOCK_MONOTONIC, PATIENCE)?];
    interrupt_only_by(&vcpu, ALARM).map_err(|error| Fault::of("setting a signal mask", &error))?;
    for part in ["SSE and cmpxchg16b", "a short loop"] {
        until_hlt(&mut vcpu, part)?;
    }
    drop(alarms);
    // The VM ends before its memory does.
    drop((vcpu, vm));
    drop(memory);
    Ok(())
}

fn until_hlt(vcpu: &mut VcpuFd, part: &str) -> Result<(), Fault> {
    match vcpu.run() {
        Ok(VcpuExit::Hlt) => Ok(()),
        Ok(exit) => Err(Fault::Certain(format!("{part} ended with {}", name(&exit)))),
        Err(error) if error.errno() == libc::EINTR => {
            Err(Fault::Doubtful(format!("{part} did not end within {CPU_TIME:?} of CPU time")))
        }
        Err(error) => Err(Fault::of(part, &os_error(error))),
    }
}

/// The name of the exit without what it carries.
fn name(exit: &VcpuExit<'_>) -> String {
    let text = format!("{exit:?}");
    text.split(['(', ' ', '{']).next().unwrap_or_default().to_owned()
}

fn fill(memory: &mut GuestMemory) {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    for (table, entry) in
        [(PML4, PDPT | PRESENT_WRITABLE), (PDPT, PD | PRESENT_WRITABLE), (PD, PRESENT_WRITABLE | LARGE)]
    {
        memory.write(table as usize, &entry.to_le_bytes());
    }
    memory.write(CODE as usize, PROGRAM);
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let segment = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..kvm_segment::default() };
    sregs.cs = kvm_segment { selector: 8, type_: 0xb, l: 1, ..segment };
    let data = kvm_segment { selector: 16, type_: 3, db: 1, ..segment };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr3 = PML4;
    // PAE, OSFXSR, OSXMMEXCPT.
    sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 10;
    // PE, MP, ET, NE, PG.
    sregs.cr0 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 31;
    // LME, LMA.
    sregs.efer = 1 << 8 | 1 << 10;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: CODE,
        rbx: DATA,
        rsp: SIZE.get() as u64,
        rflags: 2,
        ..kvm_regs::default()
    })
}

/// Interrupts this thread's vCPU once the time is over, unless the timer is dropped before.
fn alarm(clock: ClockId, time: Duration) -> nix::Result<Timer> {
    let notify = SigevNotify::SigevThreadId { signal: ALARM, thread_id: gettid().as_raw(), si_value: 0 };
    let mut timer = Timer::new(clock, SigEvent::new(notify))?;
    timer.set(Expiration::OneShot(time.into()), TimerSetTimeFlags::empty())?;
    Ok(timer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_pass_is_in_doubt() {
        for (errno, doubtful) in [(libc::EBUSY, true), (libc::ENOMEM, true), (libc::EINVAL, false)] {
            let fault = Fault::of("making a VM", &io::Error::from_raw_os_error(errno));
            assert_eq!(matches!(fault, Fault::Doubtful(_)), doubtful, "{fault:?}");
        }
    }

    /// The alarm of the probe counts what this thread computes, and not how long it waits.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "the test is about time that passes without work")]
    fn an_alarm_counts_the_time_of_the_processor() {
        SigSet::all().thread_block().unwrap();
        let pending = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let signals = status.lines().find_map(|line| line.strip_prefix("SigPnd:\t")).unwrap();
            u64::from_str_radix(signals, 16).unwrap() & 1 << (ALARM as u32 - 1) != 0
        };
        let _alarm = alarm(ClockId::CLOCK_THREAD_CPUTIME_ID, Duration::from_millis(20)).unwrap();
        thread::sleep(Duration::from_millis(60));
        assert!(!pending());
        while !pending() {}
    }

    #[test]
    fn the_exit_is_named_without_its_contents() {
        assert_eq!(name(&VcpuExit::InternalError), "InternalError");
        assert_eq!(name(&VcpuExit::IoOut(1, b"x")), "IoOut");
    }
}
