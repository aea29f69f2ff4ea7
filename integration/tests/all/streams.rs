//! Exit codes and standard streams, on every containerd.

use std::{io::Write, time::Duration};

use anyhow::{Context, Result, ensure};
use machinen_integration::containerd::Containerd;

use crate::harness::{IMAGE, on_every_containerd, on_newest_containerd};

on_every_containerd!(exit_codes, output_is_separate_and_complete, stdin_reaches_its_end);
on_newest_containerd!(stdin_is_live, output_after_the_first_process, no_reader_no_hang, much_over_vsock);

fn exit_codes(containerd: &mut Containerd) -> Result<()> {
    for (command, status) in [
        (&["true"][..], 0),
        (&["false"], 1),
        (&["sh", "-c", "exit 42"], 42),
        (&["sh", "-c", "no-such-command"], 127),
        (&["sh", "-c", "/bin/not-executable"], 126),
        (&["sh", "-c", "sh -c 'kill -TERM $$'; exit $?"], 143),
        (&["sh", "-c", "exit 255"], 255),
    ] {
        let output = containerd.run(IMAGE, command).output()?;
        ensure!(output.status == status, "{command:?} should end with {status}, ended with {output}");
    }
    Ok(())
}

fn output_is_separate_and_complete(containerd: &mut Containerd) -> Result<()> {
    // More than any buffer on the way holds, and every line is different.
    let lines = 1_500_000;
    let script = format!("echo first >&2; seq 1 {lines}; echo last >&2; exit 3");
    let output = containerd.run(IMAGE, &["sh", "-c", &script]).output()?;
    ensure!(output.status == 3, "{output}");
    ensure!(output.error_text() == "first\nlast\n", "{output}");
    let wanted: String = (1..=lines).map(|line| format!("{line}\n")).collect();
    let same = output.stdout.iter().zip(wanted.as_bytes()).take_while(|(a, b)| a == b).count();
    ensure!(
        output.stdout == wanted.as_bytes(),
        "stdout has {} of {} bytes, right up to {same}",
        output.stdout.len(),
        wanted.len()
    );
    Ok(())
}

fn stdin_reaches_its_end(containerd: &mut Containerd) -> Result<()> {
    let text: String = (0..100_000).map(|line| format!("line {line}\n")).collect();
    let output = containerd.run(IMAGE, &["wc", "-c"]).output_of_stdin(text.as_bytes())?.ok()?;
    ensure!(output.text().trim() == text.len().to_string(), "{output}");
    let output = containerd.run(IMAGE, &["cat"]).output_of_stdin(b"")?.ok()?;
    ensure!(output.stdout.is_empty(), "{output}");
    Ok(())
}

/// By large writes, which the agent must split: the daemon drops packets that are too long for it.
fn much_over_vsock(containerd: &mut Containerd) -> Result<()> {
    const BLOCKS: usize = 500;
    let count = format!("count={BLOCKS}");
    let run = containerd.run(IMAGE, &["dd", "if=/dev/zero", "bs=65536", &count]);
    let output = run.flags(&["--annotation", "io.machinen.channel=vsock"]).output()?.ok()?;
    ensure!(output.stdout.len() == BLOCKS << 16, "{} bytes of {}", output.stdout.len(), BLOCKS << 16);
    Ok(())
}

fn stdin_is_live(containerd: &mut Containerd) -> Result<()> {
    let from = containerd.log().position();
    let run = containerd.run(IMAGE, &["sh", "-c", "read line; echo got $line; read line || echo end"]);
    let mut running = run.with_stdin().spawn(Duration::from_secs(60))?;
    let mut stdin = running.stdin().context("no stdin")?;
    containerd.log().wait_for_event(from, "/tasks/start")?;
    writeln!(stdin, "hello")?;
    drop(stdin);
    let output = running.wait()?.ok()?;
    ensure!(output.text() == "got hello\nend\n", "{output}");
    Ok(())
}

fn output_after_the_first_process(containerd: &mut Containerd) -> Result<()> {
    // The container ends with its init, whose children are killed; their earlier output still arrives.
    let script = "(echo child; echo child >&2) & wait; (sleep 1000 &) ; echo parent";
    let output = containerd.run(IMAGE, &["sh", "-c", script]).output()?.ok()?;
    ensure!(output.text() == "child\nparent\n" && output.error_text() == "child\n", "{output}");
    Ok(())
}

fn no_reader_no_hang(containerd: &mut Containerd) -> Result<()> {
    let from = containerd.log().position();
    let run = containerd.run(IMAGE, &["sh", "-c", "seq 1 100000; exit 5"]).detached().flag("--null-io");
    let id = run.container().to_owned();
    run.ok()?;
    containerd.log().wait_for_event(from, "/tasks/exit")?;
    let deleted = containerd.ctr_output(&["tasks", "delete", &id])?;
    ensure!(deleted.error_text().contains("exit code 5") || deleted.status == 5, "{deleted}");
    containerd.ctr_ok(&["containers", "delete", &id])?;
    Ok(())
}
