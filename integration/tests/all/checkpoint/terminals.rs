//! Shells that keep `/dev/tty` open, which CRIU by itself refuses in most terminals.

use std::fs;

use anyhow::{Result, ensure};
use machinen_integration::{bundle::Bundle, containerd::Containerd, served::Served, terminal::Terminal};
use serde_json::json;

use super::checkpoint;
use crate::harness::{IMAGE, on_newest_containerd};

on_newest_containerd!(a_shell_in_a_terminal_of_another_process, a_program_in_the_foreground);

/// Runs a shell in a terminal whose master this program has. The shell gets its input from a pipe with a name.
const PROGRAM: &str = r#"
import os, pty
os.mkfifo("/dev/shm/in")
os.dup2(os.open("/dev/shm/in", os.O_RDWR), 0)
pty.spawn("sh")
"#;
/// Types a command that runs in the foreground, and waits until it does.
const BUSY: &str =
    "echo 'sleep 1000' >/dev/shm/in; until grep -qsx sleep /proc/[0-9]*/comm; do usleep 50000; done";
/// Interrupts that command by the terminal's key, and has the shell answer.
const ANSWER: &str = "rm -f /dev/shm/answer; printf '\\003' >/dev/shm/in; \
                      until ! grep -qsx sleep /proc/[0-9]*/comm; do usleep 50000; done; \
                      echo 'echo $((6*7)) >/dev/shm/answer' >/dev/shm/in; \
                      until grep -qx 42 /dev/shm/answer 2>/dev/null; do usleep 50000; done";

fn a_shell_in_a_terminal_of_another_process(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::with_workloads(containerd)?;
    let config = bundle.config(&["python3.13", "-c", PROGRAM], |spec| {
        spec["process"]["env"] = json!(["PATH=/usr/bin:/bin", "LC_ALL=C", "PYTHONDONTWRITEBYTECODE=1"]);
        // No filter of the container's matters to a checkpoint.
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["dup3"], "action": "SCMP_ACT_ERRNO"}],
        });
    })?;
    let source = Served::run(containerd, &config)?;
    let shell = |served: &Served<'_>, script: &str| -> Result<()> {
        let (status, said) = served.shell(script)?;
        ensure!(status == 0, "{script}: status {status}: {said}");
        Ok(())
    };
    shell(&source, "until [ -p /dev/shm/in ]; do usleep 50000; done")?;
    shell(&source, BUSY)?;
    // The shell's descriptor of /dev/tty.
    shell(&source, "ls /proc/[0-9]*/fd | grep -qx 10")?;
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir)?;
    shell(&source, ANSWER)?;
    source.end()?;
    let restored = Served::restored(containerd, &config, &dir)?;
    shell(&restored, ANSWER)?;
    restored.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

fn a_program_in_the_foreground(containerd: &mut Containerd) -> Result<()> {
    const REF: &str = "machinen.test/foreground:1";
    let run = containerd.run(IMAGE, &["sh"]).flag("--tty");
    let mut terminal = Terminal::run(&run.invocation()?, 80, 25)?;
    terminal.expect("# ")?;
    terminal.type_in("ls -l /proc/1/fd; echo $((6*7)); sleep 1000\r")?;
    let seen = terminal.expect("42\r")?;
    ensure!(seen.contains("/dev/tty\r"), "{seen:?}");
    let id = run.container();
    containerd.ctr_ok(&["containers", "checkpoint", "--rw", "--task", id, REF])?;
    terminal.type_in("\x03")?;
    terminal.type_in("echo $((6*8)); exit 5\r")?;
    terminal.expect("48\r")?;
    let (status, seen) = terminal.wait()?;
    ensure!(status == 5, "status {status} after {seen:?}");
    super::remove_what_containerd_leaves(containerd)?;
    containerd.ctr_ok(&["images", "rm", "--sync", REF]).map(drop)
}
