//! Processes that are added to a running container.

use std::{fs, fs::File, io::Write};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    oci::{ConsoleSocket, Oci},
    runtime::Runtime,
};
use serde_json::json;

use super::{SLEEP, with_oci};

with_oci!(arguments, exit_codes, a_process_file, fed, detached, on_a_terminal, in_a_paused_container);

/// The process begins when the container is resumed.
fn in_a_paused_container(oci: &Oci) -> Result<()> {
    started(oci)?;
    ensure!(oci.ok(&["exec", "--ignore-paused", "e", "echo", "runs"])? == "runs\n");
    oci.ok(&["pause", "e"])?;
    oci.fails(&["exec", "e", "true"], 255, "cannot exec in a paused container")?;
    let waiting =
        oci.command(&["exec", "--ignore-paused", "e", "sh", "-c", "echo resumed; exit 3"])?.spawn()?;
    oci.has_status("e", "paused")?;
    ensure!(waiting.written()[0].is_empty(), "{:?}", waiting.written());
    oci.ok(&["resume", "e"])?;
    let output = waiting.wait()?;
    ensure!(output.status == 3 && output.text() == "resumed\n", "{output}");
    remove(oci)
}

/// A container that ends while it is paused gets no process.
#[test]
fn in_a_paused_container_that_ends() {
    super::run(Runtime::Machinen, |oci| {
        started(oci)?;
        oci.ok(&["pause", "e"])?;
        let waiting = oci.command(&["exec", "--ignore-paused", "e", "true"])?.spawn()?;
        oci.has_status("e", "paused")?;
        oci.ok(&["kill", "e", "KILL"])?;
        let output = waiting.wait()?;
        ensure!(output.status == 255 && output.error_text().contains("stopped container"), "{output}");
        remove(oci)
    });
}

/// A container that runs until it is removed.
fn started(oci: &Oci) -> Result<()> {
    oci.bundle("e", &SLEEP, |_| {})?;
    oci.launch("e").map(drop)
}

fn remove(oci: &Oci) -> Result<()> {
    oci.ok(&["delete", "--force", "e"]).map(drop)
}

fn arguments(oci: &Oci) -> Result<()> {
    started(oci)?;
    let script = "id -u; id -g; id -G; pwd; echo $A; grep CapEff /proc/self/status | cut -f 2; \
                  grep NoNewPrivs /proc/self/status | cut -f 2";
    let flags =
        ["--user", "7:8", "--additional-gids", "9", "--cwd", "/tmp", "--env", "A=b c", "--no-new-privs"];
    let output = oci.ok(&[&["exec"], &flags[..], &["e", "sh", "-c", script]].concat())?;
    ensure!(output == "7\n8\n8 9\n/tmp\nb c\n0000000000000000\n1\n", "{output}");
    let output = oci.ok(&["exec", "--cap", "CAP_SYS_TIME", "e", "grep", "CapBnd", "/proc/self/status"])?;
    ensure!(output.contains("00000000020000eb"), "{output}");
    // What is not given is as in the container's own specification.
    let output = oci.ok(&["exec", "e", "sh", "-c", "id -u; pwd; echo $PATH"])?;
    ensure!(output == "0\n/\n/usr/bin:/bin\n", "{output}");
    remove(oci)
}

fn exit_codes(oci: &Oci) -> Result<()> {
    started(oci)?;
    for (command, status) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "exit 255"], 255),
        (&["sh", "-c", "kill -9 $$"], 137),
        (&["sh", "-c", "kill -TERM $$"], 143),
    ] {
        let output = oci.output(&[&["exec", "e"], command].concat())?;
        ensure!(output.status == status && output.error_text().is_empty(), "{command:?}: {output}");
    }
    oci.fails(&["exec", "e", "no-such-command"], 255, "executable file not found in $PATH")?;
    oci.fails(&["exec", "e", "/no/such/file"], 255, "no such file or directory")?;
    oci.fails(&["exec", "e", "/bin/not-executable"], 255, "permission denied")?;
    oci.fails(&["exec", "--cwd", "/no/such/directory", "e", "true"], 255, "/no/such/directory")?;
    oci.fails(&["exec", "e"], 255, "")?;
    remove(oci)
}

fn a_process_file(oci: &Oci) -> Result<()> {
    started(oci)?;
    let file = oci.file("process.json");
    let process = json!({
        "args": ["sh", "-c", "id -u; pwd; echo $A; awk '/Max processes/ {print $3}' /proc/self/limits; exit 3"],
        "env": ["PATH=/bin", "A=b"],
        "cwd": "/tmp",
        "user": { "uid": 7, "gid": 8 },
        "rlimits": [{ "type": "RLIMIT_NPROC", "soft": 100, "hard": 200 }],
    });
    fs::write(&file, process.to_string())?;
    let output = oci.output(&["exec", "--process", &file.display().to_string(), "e"])?;
    ensure!(output.status == 3 && output.text() == "7\n/tmp\nb\n100\n", "{output}");
    fs::write(&file, "{}")?;
    oci.fails(&["exec", "--process", &file.display().to_string(), "e"], 255, "")?;
    oci.fails(&["exec", "--process", "/no/such/file", "e"], 255, "/no/such/file")?;
    remove(oci)
}

/// The streams are the caller's own; the end of its input is the end of the process's.
fn fed(oci: &Oci) -> Result<()> {
    started(oci)?;
    let script = "tr a-z A-Z; echo err >&2; exit 4";
    let mut running = oci.command(&["exec", "e", "sh", "-c", script])?.with_stdin().spawn()?;
    let mut stdin = running.stdin().context("it was asked for")?;
    stdin.write_all(b"a line\n")?;
    drop(stdin);
    let output = running.wait()?;
    ensure!(output.status == 4 && output.text() == "A LINE\n" && output.error_text() == "err\n", "{output}");
    remove(oci)
}

fn detached(oci: &Oci) -> Result<()> {
    started(oci)?;
    let pid_file = oci.file("exec.pid").display().to_string();
    let script = "read line; echo got $line; exit 6";
    let args = ["exec", "--detach", "--pid-file", &pid_file, "e", "sh", "-c", script];
    let mut process = oci.monitored("exec", &pid_file, &args)?;
    let mut stdin = process.running.stdin().context("it was asked for")?;
    stdin.write_all(b"it\n")?;
    process.running.wait_for_stdout("got it\n")?;
    let (pid, status) = process.wait()?;
    ensure!(status == 6 && pid.to_string() == fs::read_to_string(&pid_file)?, "{pid} {status}");
    remove(oci)
}

/// By a socket, as conmon does it.
fn on_a_terminal(oci: &Oci) -> Result<()> {
    started(oci)?;
    let (socket, pid_file) = (oci.file("console.sock"), oci.file("exec.pid").display().to_string());
    let console = ConsoleSocket::listen(&socket)?;
    let socket = socket.display().to_string();
    let script = "tty; read line; echo got-$line; test -t 0 -a -t 1 -a -t 2";
    let flags = ["--tty", "--detach", "--console-socket", &socket, "--pid-file", &pid_file];
    let process =
        oci.monitored("exec", &pid_file, &[&["exec"], &flags[..], &["e", "sh", "-c", script]].concat())?;
    let mut terminal = super::streams::Console::new(File::from(console.receive()?))?;
    terminal.expect("/dev/pts/0")?;
    terminal.type_in("typed\r")?;
    terminal.expect("got-typed")?;
    let (_, status) = process.wait()?;
    ensure!(status == 0, "{status}");
    remove(oci)
}
