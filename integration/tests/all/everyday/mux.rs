//! Several containers on one terminal.

use anyhow::{Result, ensure};
use machinen_integration::{oci::Oci, terminal::Terminal};

use super::{boot, on_a_host};

on_a_host!(switched);

fn switched(oci: &Oci) -> Result<()> {
    for name in ["a", "b"] {
        let script = format!(
            "echo begun-{name}; while read line; do echo got-{name}-$line; [ $line = size ] && \
             until [ \"$(stty size)\" = '31 91' ]; do sleep 0.1; done && echo resized-{name}; \
             [ $line = end ] && exit 5; done"
        );
        boot(oci, &["--detach", "--tty", "--name", name], &script)?.ok()?;
    }
    // Not in the list: nothing keeps its streams.
    oci.bundle("plain", &["sleep", "1000"], |_| {})?;
    let _plain = oci.launch("plain")?;
    let mut terminal = Terminal::run(&oci.command(&["mux"])?, 70, 20)?;
    let listed = terminal.expect("q ends")?;
    ensure!(listed.contains("1  a") && listed.contains("2  b") && !listed.contains("plain"), "{listed}");
    terminal.type_in("1\r")?;
    terminal.expect("begun-a")?;
    terminal.type_in("one\r")?;
    terminal.expect("got-a-one")?;
    terminal.type_in("\x1d\x1d")?;
    // The list sets the terminal back to its first screen.
    terminal.expect("\x1b[?1049l")?;
    terminal.type_in("nothing\rb\r")?;
    terminal.expect("there is no nothing in the list")?;
    terminal.expect("begun-b")?;
    terminal.resize(91, 31)?;
    // The host of the test passes no signals on, but the size is also that of the next connection.
    terminal.type_in("\x1d\x1db\rsize\r")?;
    terminal.expect("resized-b")?;
    // Two at once, and what follows at once.
    terminal.type_in("\x1d\x1da\r")?;
    // What was printed before is shown again; a container that ends returns to the list.
    terminal.type_in("end\r")?;
    let text = terminal.expect("a has ended with status 5")?;
    ensure!(text.matches("got-a-one").count() >= 2, "{text}");
    terminal.type_in("\x1d\r")?;
    terminal.type_in("q\r")?;
    let (status, text) = terminal.wait()?;
    ensure!(status == 0, "{status}: {text}");
    oci.has_status("b", "running")?;
    oci.fails(&["mux"], 1, "mux needs a terminal")?;
    for name in ["a", "b", "plain"] {
        oci.ok(&["delete", "--force", name])?;
    }
    Ok(())
}
