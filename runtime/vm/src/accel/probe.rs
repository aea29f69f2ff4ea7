//! One vCPU, a few instructions: does KVM run them, and at the speed of a CPU?
//!
//! The first part is what emulators of the whole instruction set have been seen to lack, an SSE and a 16-byte
//! locked instruction; the second is a loop that takes a CPU about a millisecond and an emulator minutes.
//! Anything but HLT in time after each part is a fault.

use std::{num::NonZeroUsize, thread, time::Duration};

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

/// The deadline of both parts together, and the most attempts: a busy host must not make KVM look broken.
const DEADLINE: Duration = Duration::from_millis(60);
const TRIES: u32 = 3;

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
enum Fault {
    Certain(String),
    /// May be due to a busy host.
    Late(String),
}

/// # Errors
/// A sentence that describes what went wrong.
pub(super) fn run() -> Result<(), String> {
    let mut tries = 1;
    loop {
        // Each attempt has its own thread: the thread's signal mask, its timer and a pending signal end with
        // it.
        let attempt = thread::Builder::new().name("kvm-probe".into()).spawn(attempt);
        let attempt = attempt.map_err(|error| format!("no thread for the probe: {error}"))?;
        match attempt.join() {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(Fault::Late(_))) if tries < TRIES => tries += 1,
            Ok(Err(Fault::Late(reason) | Fault::Certain(reason))) => return Err(reason),
            Err(_) => return Err("the probe panicked".into()),
        }
    }
}

fn attempt() -> Result<(), Fault> {
    let failed = |what: &'static str| move |error| Fault::Certain(format!("{what}: {}", os_error(error)));
    let kvm = Kvm::new().map_err(failed("opening it"))?;
    let vm = kvm.create_vm().map_err(failed("making a VM"))?;
    // Intel CPUs without "unrestricted guest" need a place for a task state segment.
    vm.set_tss_address(0xfffb_d000).map_err(failed("placing the TSS"))?;
    let mut memory = GuestMemory::new(SIZE).map_err(|error| Fault::Certain(format!("no memory: {error}")))?;
    fill(&mut memory);
    memory.map_into(&vm).map_err(|error| Fault::Certain(format!("giving it memory: {error}")))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("making a vCPU"))?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("asking for the CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("setting the CPUID"))?;
    enter_long_mode(&vcpu).map_err(failed("setting registers"))?;

    let alarm = Alarm::after(DEADLINE).map_err(|error| Fault::Certain(format!("no timer: {error}")))?;
    interrupt_only_by(&vcpu, ALARM)
        .map_err(|error| Fault::Certain(format!("setting a signal mask: {error}")))?;
    for part in ["SSE and cmpxchg16b", "a short loop"] {
        until_hlt(&mut vcpu, part)?;
    }
    drop(alarm);
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
            Err(Fault::Late(format!("{part} did not end within {DEADLINE:?}")))
        }
        Err(error) => Err(Fault::Certain(format!("{part}: {}", os_error(error)))),
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

/// Interrupts this thread's vCPU once the time is over.
struct Alarm {
    _timer: Timer,
}

impl Alarm {
    fn after(time: Duration) -> nix::Result<Self> {
        SigSet::all().thread_block()?;
        let notify = SigevNotify::SigevThreadId { signal: ALARM, thread_id: gettid().as_raw(), si_value: 0 };
        let mut timer = Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(notify))?;
        timer.set(Expiration::OneShot(time.into()), TimerSetTimeFlags::empty())?;
        Ok(Self { _timer: timer })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_is_named_without_its_contents() {
        assert_eq!(name(&VcpuExit::InternalError), "InternalError");
        assert_eq!(name(&VcpuExit::IoOut(1, b"x")), "IoOut");
    }
}
