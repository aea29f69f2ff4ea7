//! What the agent tells a human: one line each, on the console that the host keeps and quotes in its errors.

use std::{error::Error, io::Write, sync::OnceLock};

use nix::{
    sys::reboot::{RebootMode, reboot},
    time::{ClockId, clock_gettime},
    unistd::getpid,
};

/// Set once at boot: print the boot's timeline.
static TRACE: OnceLock<bool> = OnceLock::new();
/// Set once at boot: what to do when the agent cannot go on.
static LAST_RESORT: OnceLock<LastResort> = OnceLock::new();

/// How the agent ends when it has to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum LastResort {
    /// It is the VM's init: the VM goes with it.
    PowerOff,
    /// It is an ordinary process.
    Exit,
}

pub(crate) fn set_last_resort(last: LastResort) {
    // Only the first call counts, and boot makes it before anything else can fail.
    let _ = LAST_RESORT.set(last);
}

pub(crate) fn enable_trace() {
    let _ = TRACE.set(true);
}

/// Prints one line.
pub(crate) fn say(text: &str) {
    let line = format!("machinen-agent: {}\n", text.replace('\n', " "));
    // Nobody is left to be told when the console fails.
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

/// Prints how long after the kernel's start a step of the boot was done, when the command line asks for it.
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

/// An error with all its causes, in one line.
pub(crate) fn chain(err: &dyn Error) -> String {
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(err) = cause {
        let more = err.to_string();
        // Some crates repeat their cause in their own text.
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = err.source();
    }
    text
}

/// Prints the error and ends the VM, or the process where the agent is not the VM's init.
pub(crate) fn fatal(err: &dyn Error) -> ! {
    say(&format!("fatal: {}", chain(err)));
    end(1)
}

/// Ends the VM or the process.
pub(crate) fn end(code: i32) -> ! {
    // The console is buffered: an error that never reached the host would be a riddle.
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

/// A panic ends the VM at once, with its place and text on the console.
pub(crate) fn install_panic_hook() {
    let agent = getpid();
    std::panic::set_hook(Box::new(move |info| {
        say(&format!("fatal: {info}"));
        // A forked child only ends itself.
        if getpid() == agent { end(101) } else { crate::sys::exit_now(101) }
    }));
}
