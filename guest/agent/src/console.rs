//! Messages of the agent to a human, each one line, on the console. The host keeps the console's text and
//! quotes it in its errors.

use std::{error::Error, io::Write, sync::OnceLock};

use machinen_protocol::error::chain;
use nix::{
    sys::reboot::{RebootMode, reboot},
    time::{ClockId, clock_gettime},
    unistd::getpid,
};

/// Set once at boot: whether the boot's timeline is printed.
static TRACE: OnceLock<bool> = OnceLock::new();
/// Set once at boot: what the agent does when it cannot continue.
static LAST_RESORT: OnceLock<LastResort> = OnceLock::new();

/// How the agent ends when it has to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum LastResort {
    /// The agent is the VM's init: the VM ends with it.
    PowerOff,
    /// The agent is an ordinary process.
    Exit,
}

pub(crate) fn set_last_resort(last: LastResort) {
    // Only the first call has an effect, and boot makes it before anything else can fail.
    let _ = LAST_RESORT.set(last);
}

pub(crate) fn enable_trace() {
    let _ = TRACE.set(true);
}

/// Prints one line.
pub(crate) fn say(text: &str) {
    let line = format!("machinen-agent: {}\n", text.replace('\n', " "));
    // A failure of the console cannot be reported anywhere.
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

/// Prints when a step of the boot was done, as the time since the kernel's start, if the command line asks
/// for it.
pub(crate) fn trace(step: &str) {
    if TRACE.get().is_some_and(|on| *on)
        && let Ok(now) = clock_gettime(ClockId::CLOCK_BOOTTIME)
    {
        say(&format!(
            "trace: {}.{:03} ms {step}",
            now.tv_sec() * 1000 + now.tv_nsec() / 1_000_000,
            now.tv_nsec() / 1000 % 1000
        ));
    }
}

/// Prints one line and ends this process at once, which is one that the agent has forked.
pub(crate) fn fail(text: &str) -> ! {
    say(text);
    crate::sys::exit_now(1)
}

/// Prints an error with all its causes.
pub(crate) fn report(err: &dyn Error) {
    say(&chain(err));
}

/// Prints the error and ends the VM, or the process where the agent is not the VM's init.
pub(crate) fn fatal(err: &dyn Error) -> ! {
    say(&format!("fatal: {}", chain(err)));
    end(1)
}

/// Ends the VM or the process.
pub(crate) fn end(code: i32) -> ! {
    // The console is buffered, and the last message must reach the host.
    let _ = nix::sys::termios::tcdrain(std::io::stderr());
    match LAST_RESORT.get() {
        Some(LastResort::PowerOff) => {
            let Err(err) = reboot(RebootMode::RB_POWER_OFF);
            say(&format!("cannot power off: {err}"));
            std::process::exit(code)
        }
        Some(LastResort::Exit) | None => std::process::exit(code),
    }
}

/// Makes a panic end the VM at once, with its location and text on the console.
pub(crate) fn install_panic_hook() {
    let agent = getpid();
    std::panic::set_hook(Box::new(move |info| {
        say(&format!("fatal: {info}"));
        // A forked child ends only itself.
        if getpid() == agent { end(101) } else { crate::sys::exit_now(101) }
    }));
}
