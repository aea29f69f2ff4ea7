//! Standard streams are inherited, or are a terminal that is handed over; and who the container's parent is.

use std::{fs, fs::File, io::Write, os::fd::AsFd, time::Duration};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    oci::{ConsoleSocket, Oci},
    process::Stream,
};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::json;

use super::with_oci;

with_oci!(pipes, files, without_a_reader, a_terminal, reaped_by_its_monitor, terminals_are_refused);

/// What a file gets of a terminal's output has no carriage returns but those that the process has written. runc prints the
/// same, and needs a terminal of its own for it.
#[test]
fn a_terminal_that_is_printed_to_a_pipe() {
    super::run(machinen_integration::runtime::Runtime::Machinen, |oci| {
        let script = "test -t 1 && echo one; printf 'two\\r\\nthree'";
        oci.bundle("t", &["sh", "-c", script], |spec| spec["process"]["terminal"] = json!(true))?;
        let output = oci.output(&["run", "--bundle", &oci.bundle_dir("t"), "t"])?.ok()?;
        ensure!(output.text() == "one\ntwo\r\nthree", "{output}");
        Ok(())
    });
}

/// The master of a terminal that was handed over.
pub(super) struct Console {
    master: File,
    output: Stream,
}

impl Console {
    pub(super) fn new(master: File) -> Result<Self> {
        let output = Stream::read(master.try_clone()?);
        Ok(Self { master, output })
    }

    pub(super) fn type_in(&mut self, text: &str) -> Result<()> {
        self.master.write_all(text.as_bytes()).context("cannot type")
    }

    pub(super) fn expect(&self, text: &str) -> Result<()> {
        let seen = self.output.contains(text, Duration::from_secs(60));
        ensure!(seen, "{text:?} was not printed, but {:?}", String::from_utf8_lossy(&self.output.so_far()));
        Ok(())
    }
}

fn pipes(oci: &Oci) -> Result<()> {
    let script = "cat; echo err >&2; dd if=/dev/zero bs=1024 count=300 2> /dev/null | tr '\\0' x";
    oci.bundle("p", &["sh", "-c", script], |_| {})?;
    let mut container = oci.create("p")?;
    let pid = oci.pid("p")?;
    let mut stdin = container.stdin().context("it was asked for")?;
    stdin.write_all(b"before the start\n")?;
    oci.ok(&["start", "p"])?;
    stdin.write_all(b"after the start\n")?;
    drop(stdin);
    oci.wait(pid)?;
    oci.ok(&["delete", "p"])?;
    // The streams end with the container.
    let output = container.wait()?;
    let text = output.text();
    let rest =
        text.strip_prefix("before the start\nafter the start\n").with_context(|| output.to_string())?;
    ensure!(rest.len() == 300 << 10, "{output}");
    ensure!(output.error_text() == "err\n", "{output}");
    Ok(())
}

fn files(oci: &Oci) -> Result<()> {
    oci.bundle("f", &["sh", "-c", "read a; read b; echo $b $a; echo err >&2"], |_| {})?;
    fs::write(oci.file("in"), "one\ntwo\n")?;
    fs::write(oci.file("out"), "appended to\n")?;
    let file = |name: &str| oci.file(name).display().to_string();
    let dir = oci.bundle_dir("f");
    let script = format!("exec \"$@\" < {} >> {} 2> {}", file("in"), file("out"), file("err"));
    let create = oci.scripted(&script, &["create", "--bundle", &dir, "f"])?;
    create.run()?.ok()?;
    let pid = oci.pid("f")?;
    oci.ok(&["start", "f"])?;
    oci.wait(pid)?;
    oci.ok(&["delete", "f"])?;
    let (out, err) = (fs::read_to_string(file("out"))?, fs::read_to_string(file("err"))?);
    ensure!(out == "appended to\ntwo one\n" && err == "err\n", "{out:?} {err:?}");
    Ok(())
}

/// The reader of its output has gone, which is a SIGPIPE or an error for the container and no end of it.
fn without_a_reader(oci: &Oci) -> Result<()> {
    let script = "trap '' PIPE; read line; echo lost 2> /dev/null; echo written > /result; sleep 1000";
    oci.bundle("w", &["sh", "-c", script], |_| {})?;
    let mut container = oci.launch("w")?;
    let stdin = container.stdin().context("it was asked for")?;
    drop(container);
    drop(stdin);
    let seen = oci.ok(&["exec", "w", "sh", "-c", "until cat /result; do sleep 0.1; done 2> /dev/null"])?;
    ensure!(seen == "written\n", "{seen}");
    oci.ok(&["delete", "--force", "w"]).map(drop)
}

fn a_terminal(oci: &Oci) -> Result<()> {
    let script = "stty size; tty; read line; echo got-$line; stty size; read line; exit 3";
    oci.bundle("t", &["sh", "-c", script], |spec| {
        spec["process"]["terminal"] = json!(true);
        spec["process"]["consoleSize"] = json!({ "height": 20, "width": 70 });
    })?;
    let socket = oci.file("console.sock");
    let console = ConsoleSocket::listen(&socket)?;
    let socket = socket.display().to_string();
    let container = oci.create_with("t", &["--console-socket", &socket])?;
    let master = File::from(console.receive()?);
    let mut terminal = Console::new(master.try_clone()?)?;
    let pid = oci.pid("t")?;
    oci.ok(&["start", "t"])?;
    terminal.expect("20 70")?;
    // A path below /dev/pts, or /dev/console.
    terminal.expect("/dev/")?;
    let size = Winsize { ws_row: 30, ws_col: 90, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(master.as_fd(), size)?;
    terminal.type_in("typed\r")?;
    terminal.expect("got-typed")?;
    terminal.expect("30 90")?;
    terminal.type_in("\x04")?;
    oci.wait(pid)?;
    oci.ok(&["delete", "t"])?;
    let output = container.wait()?;
    ensure!(output.text().is_empty() && output.error_text().is_empty(), "{output}");
    Ok(())
}

/// The process of the pid file is the child of a subreaper, and ends as the container's does.
fn reaped_by_its_monitor(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("m", &["true"], |_| {})?;
    for (number, (script, wanted)) in
        [("exit 7", 7), ("sleep 1000", 137), ("sleep 1000", 143)].into_iter().enumerate()
    {
        let id = "m";
        oci.configure(
            &bundle,
            id,
            &["sh", "-c", &format!("trap 'exit 143' TERM; {script} & wait $!")],
            |_| {},
        )?;
        let pid_file = oci.file(&format!("{number}.pid")).display().to_string();
        let dir = oci.bundle_dir(id);
        let name = format!("m{number}");
        let container =
            oci.monitored(&name, &pid_file, &["create", "--bundle", &dir, "--pid-file", &pid_file, id])?;
        ensure!(fs::read_to_string(&pid_file)? == oci.pid(id)?.to_string());
        oci.ok(&["start", id])?;
        match wanted {
            137 => drop(oci.ok(&["kill", id, "KILL"])?),
            143 => {
                // The shell has its trap when it has a child.
                oci.ok(&["exec", id, "sh", "-c", "until ps | grep -q '[s]leep 1000'; do sleep 0.1; done"])?;
                oci.ok(&["kill", id])?;
            }
            _ => {}
        }
        let (pid, status) = container.wait()?;
        let script_status = if number == 0 { status == 7 } else { status == wanted };
        ensure!(script_status, "{script}: the process {pid} ended with {status}");
        oci.has_status(id, "stopped")?;
        oci.ok(&["delete", id])?;
    }
    Ok(())
}

/// A terminal needs a socket, and a socket a terminal.
fn terminals_are_refused(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("t", &["true"], |spec| spec["process"]["terminal"] = json!(true))?;
    let dir = oci.bundle_dir("t");
    oci.fails(&["create", "--bundle", &dir, "t"], 1, "console socket")?;
    oci.configure(&bundle, "t", &["true"], |_| {})?;
    let args = ["create", "--bundle", &dir, "--console-socket", "/no/such/socket", "t"];
    oci.fails(&args, 1, "console socket")?;
    super::is_gone(oci, "t")
}
