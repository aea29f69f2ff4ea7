//! Terminals, with `ctr` on a terminal of the harness's own.

use anyhow::{Result, ensure};
use machinen_integration::{containerd::Containerd, terminal::Terminal};
use nix::sys::signal::Signal;

use crate::harness::{IMAGE, on_every_containerd, on_newest_containerd};

// A line ends with \r\n, to which the terminal of ctr adds another \r: the searched texts end with the first.

on_every_containerd!(a_session_on_an_init, a_session_on_another_process);
on_newest_containerd!(
    the_console_is_the_terminal,
    what_a_terminal_does_with_bytes,
    detached_and_attached_again
);

// The client sets its initial size when the process runs already, so a change of the size may come before the
// test's own.
const SESSION: &str = "trap 'stty size' WINCH; tty; test -t 0 && test -t 1 && test -t 2 && echo ready; \
                       until [ \"$(stty size)\" = '37 101' ]; do sleep 0.1; done; echo resized; \
                       while read -r line; do echo \"got $line\"; done; echo end; exit 5";

fn session(mut terminal: Terminal) -> Result<()> {
    let seen = terminal.expect("ready\r")?;
    ensure!(seen.contains("/dev/pts/"), "{seen:?}");
    terminal.resize(101, 37)?;
    let seen = terminal.expect("resized\r")?;
    ensure!(seen.contains("37 101\r"), "{seen:?}");
    terminal.type_in("hello\r")?;
    terminal.expect("got hello\r")?;
    // The end of input, as typed on a terminal.
    terminal.type_in("\x04")?;
    terminal.expect("end\r")?;
    let (status, seen) = terminal.wait()?;
    ensure!(status == 5, "status {status} after {seen:?}");
    Ok(())
}

fn a_session_on_an_init(containerd: &mut Containerd) -> Result<()> {
    let run = containerd.run(IMAGE, &["sh", "-c", SESSION]).flag("--tty");
    session(Terminal::run(&run.invocation()?, 80, 25)?)
}

fn a_session_on_another_process(containerd: &mut Containerd) -> Result<()> {
    let id = containerd.idle(IMAGE, None)?;
    let exec = containerd.exec(&id, "e", &["sh", "-c", SESSION]).flags(&["--tty"]);
    session(Terminal::run(&exec.invocation()?, 80, 25)?)?;
    containerd.end(&id)
}

fn the_console_is_the_terminal(containerd: &mut Containerd) -> Result<()> {
    let script = "echo to the console >/dev/console; echo to the terminal >/dev/tty; ps -o pid,tty";
    let run = containerd.run(IMAGE, &["sh", "-c", script]).flag("--tty");
    let (status, seen) = Terminal::run(&run.invocation()?, 80, 25)?.wait()?;
    ensure!(status == 0, "status {status} after {seen:?}");
    for text in ["to the console\r", "to the terminal\r", "136,0"] {
        ensure!(seen.contains(text), "{text:?} was not printed, but {seen:?}");
    }
    Ok(())
}

fn what_a_terminal_does_with_bytes(containerd: &mut Containerd) -> Result<()> {
    let id = containerd.idle(IMAGE, None)?;
    // Interrupts arrive as signals, and raw bytes unchanged, in both directions.
    let script = "trap 'echo interrupted; exit 7' INT; stty raw -echo isig; echo ready; \
                  head -c 4 | od -An -tx1; while :; do sleep 0.1; done";
    let exec = containerd.exec(&id, "e", &["sh", "-c", script]).flags(&["--tty"]);
    let mut terminal = Terminal::run(&exec.invocation()?, 80, 25)?;
    terminal.expect("ready")?;
    terminal.type_in("\x01\x7f\u{e4}")?;
    terminal.expect("01 7f c3 a4")?;
    terminal.type_in("\x03")?;
    terminal.expect("interrupted")?;
    let (status, seen) = terminal.wait()?;
    ensure!(status == 7, "status {status} after {seen:?}");
    containerd.end(&id)
}

fn detached_and_attached_again(containerd: &mut Containerd) -> Result<()> {
    let run = containerd.run(IMAGE, &["sh", "-c", "while read -r line; do echo \"got $line\"; done"]);
    let run = run.detached().flag("--tty");
    let id = run.container().to_owned();
    let (status, printed) = Terminal::run(&run.invocation()?, 80, 25)?.wait()?;
    ensure!(status == 0, "status {status} after {printed:?}");
    for round in ["one", "two"] {
        let mut terminal = Terminal::run(&containerd.ctr(["tasks", "attach", &id])?, 80, 25)?;
        terminal.type_in(&format!("{round}\r"))?;
        terminal.expect(&format!("got {round}\r"))?;
        // The client detaches; the container is unaffected.
        terminal.signal(Signal::SIGKILL)?;
        terminal.wait()?;
    }
    containerd.end(&id)
}
