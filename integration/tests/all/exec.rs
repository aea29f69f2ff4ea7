//! Processes in addition to a container's init, as added by `ctr tasks exec`.

use std::time::Duration;

use anyhow::{Result, ensure};
use machinen_integration::{containerd::Containerd, process::Running};

use crate::harness::{IMAGE, on_every_containerd, on_newest_containerd};

on_every_containerd!(exit_codes_and_streams, stdin_reaches_its_end, events_come_in_order);
on_newest_containerd!(
    twenty_at_once,
    a_hundred_megabytes_both_ways,
    what_cannot_be_executed,
    processes_end_with_their_container,
    user_and_directory,
);

fn exit_codes_and_streams(containerd: &mut Containerd) -> Result<()> {
    let id = containerd.idle(IMAGE, None)?;
    for (command, status, stdout, stderr) in [
        (&["true"][..], 0, "", ""),
        (&["sh", "-c", "echo out; echo err >&2; exit 42"], 42, "out\n", "err\n"),
        (&["sh", "-c", "kill -TERM $$"], 143, "", ""),
        (&["sh", "-c", "/bin/not-executable 2>/dev/null"], 126, "", ""),
        (&["sh", "-c", "cat /proc/1/cmdline | tr '\\0' ' '"], 0, "sleep 100000 ", ""),
    ] {
        // The same id each time: it is free again.
        let output = containerd.exec(&id, "e", command).output()?;
        let streams = (output.text(), output.error_text());
        // ctr adds a line of its own to stderr when the status is not 0.
        ensure!(
            output.status == status && streams.0 == stdout && streams.1.starts_with(stderr),
            "{command:?} should end with {status}, ended with {output}"
        );
    }
    containerd.end(&id)
}

fn stdin_reaches_its_end(containerd: &mut Containerd) -> Result<()> {
    let id = containerd.idle(IMAGE, None)?;
    let text: String = (0..100_000).map(|line| format!("line {line}\n")).collect();
    let output = containerd.exec(&id, "e", &["wc", "-c"]).output_of_stdin(text.as_bytes())?.ok()?;
    ensure!(output.text().trim() == text.len().to_string(), "{output}");
    let output = containerd.exec(&id, "f", &["cat"]).output_of_stdin(b"")?.ok()?;
    ensure!(output.stdout.is_empty(), "{output}");
    containerd.end(&id)
}

fn events_come_in_order(containerd: &mut Containerd) -> Result<()> {
    let id = containerd.idle(IMAGE, None)?;
    let wanted = ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"];
    for round in 0..5 {
        let from = containerd.log().position();
        containerd.exec(&id, &format!("e{round}"), &["true"]).output()?.ok()?;
        containerd.log().wait_for_event(from, "/tasks/exit")?;
        // The start of the container may be reported late.
        let mut events = containerd.log().events(from);
        events.retain(|event| event != "/tasks/start");
        ensure!(events == wanted, "{events:?} instead of {wanted:?}");
    }
    containerd.end(&id)
}

fn twenty_at_once(containerd: &mut Containerd) -> Result<()> {
    let id = containerd.idle(IMAGE, None)?;
    let script = |number| {
        format!(
            "echo {number}; while [ ! -e /tmp/go ]; do sleep 0.1; done; echo $(({number} * 2)); exit {number}"
        )
    };
    let running = (0..20)
        .map(|number| {
            let exec = containerd.exec(&id, &format!("e{number}"), &["sh", "-c", &script(number)]);
            exec.spawn(Duration::from_secs(180))
        })
        .collect::<Result<Vec<Running>>>()?;
    for (number, process) in running.iter().enumerate() {
        process.wait_for_stdout(&format!("{number}\n"))?;
    }
    // All of the processes run now.
    containerd.exec(&id, "go", &["touch", "/tmp/go"]).output()?.ok()?;
    for (number, process) in (0_i32..).zip(running) {
        let output = process.wait()?;
        let wanted = format!("{number}\n{}\n", number * 2);
        ensure!(output.status == number && output.text() == wanted, "process {number}: {output}");
    }
    containerd.end(&id)
}

fn a_hundred_megabytes_both_ways(containerd: &mut Containerd) -> Result<()> {
    let id = containerd.idle(IMAGE, None)?;
    // No two blocks are alike.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let input: Vec<u8> = (0..100_000_000 / 8)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect();
    let output = containerd.exec(&id, "e", &["cat"]).output_of_stdin(&input)?.ok()?;
    let same = output.stdout.iter().zip(&input).take_while(|(a, b)| a == b).count();
    let (length, wanted) = (output.stdout.len(), input.len());
    ensure!(output.stdout == input, "{length} of {wanted} bytes came back, right up to {same}");
    println!("100 MB in and out again took {:.1?}", output.duration);
    containerd.end(&id)
}

fn what_cannot_be_executed(containerd: &mut Containerd) -> Result<()> {
    let id = containerd.idle(IMAGE, None)?;
    for (command, words) in [
        ("no-such-command", "exec: \"no-such-command\": executable file not found in $PATH"),
        ("/no/such/command", "exec: \"/no/such/command\": stat /no/such/command: no such file or directory"),
        ("/bin/not-executable", "exec: \"/bin/not-executable\": permission denied"),
        ("/etc", "exec: \"/etc\": is a directory"),
        ("/bin/bad-interpreter", "exec /bin/bad-interpreter: no such file or directory"),
    ] {
        let output = containerd.exec(&id, "e", &[command]).output()?;
        ensure!(output.status != 0 && output.error_text().contains(words), "{command}: {output}");
    }
    let output = containerd.exec(&id, "e", &["true"]).flags(&["--cwd", "/no/where"]).output()?;
    ensure!(output.error_text().contains("chdir to cwd (\"/no/where\")"), "{output}");
    containerd.exec(&id, "e", &["true"]).output()?.ok()?;
    containerd.end(&id)
}

fn processes_end_with_their_container(containerd: &mut Containerd) -> Result<()> {
    let id = containerd.idle(IMAGE, None)?;
    let exec = containerd.exec(&id, "e", &["sh", "-c", "echo ready; sleep 1000"]);
    let running = exec.spawn(Duration::from_secs(60))?;
    running.wait_for_stdout("ready\n")?;
    let from = containerd.log().position();
    containerd.ctr_ok(&["tasks", "kill", "--signal", "SIGKILL", &id])?;
    let output = running.wait()?;
    ensure!(output.status == 137, "{output}");
    containerd.ctr_output(&["tasks", "delete", &id])?;
    containerd.log().wait_for_event(from, "/tasks/delete")?;
    let events = containerd.log().events(from);
    // The init's exit is reported last: until then its processes might still be reported.
    ensure!(events == ["/tasks/exit", "/tasks/exit", "/tasks/delete"], "{events:?}");
    containerd.ctr_ok(&["containers", "delete", &id])?;
    Ok(())
}

fn user_and_directory(containerd: &mut Containerd) -> Result<()> {
    let id = containerd.idle(IMAGE, None)?;
    let exec = containerd.exec(
        &id,
        "e",
        &["sh", "-c", "id -u; id -g; pwd; echo $HOME; cat /proc/self/oom_score_adj"],
    );
    let output = exec.flags(&["--user", "1000:50", "--cwd", "/tmp"]).output()?.ok()?;
    ensure!(output.text() == "1000\n50\n/tmp\n/home/alice\n0\n", "{output}");
    containerd.end(&id)
}
