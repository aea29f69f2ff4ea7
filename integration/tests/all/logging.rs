//! Destinations of output: files, logging programs, and fifos whose readers come and go.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
};

use anyhow::{Result, ensure};
use containerd_shim_protos::api;
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    shim::{Client, Shim, V3},
};
use nix::{sys::stat::Mode, unistd::mkfifo};

use crate::{
    harness::{IMAGE, on_every_containerd, on_newest_containerd},
    shim::{fill, signal},
};

on_every_containerd!(a_file_is_appended_to, a_program_logs);
on_newest_containerd!(a_program_that_fails, readers_come_and_go, a_process_logs_too);

/// Runs a detached container to its end with its output at a URI.
fn run_logging(containerd: &Containerd, uri: &str, script: &str) -> Result<()> {
    let from = containerd.log().position();
    let run = containerd.run(IMAGE, &["sh", "-c", script]).detached().flags(&["--log-uri", uri]);
    let id = run.container().to_owned();
    run.ok()?;
    containerd.log().wait_for_event(from, "/tasks/exit")?;
    containerd.ctr_output(&["tasks", "delete", &id])?;
    containerd.ctr_ok(&["containers", "delete", &id])?;
    Ok(())
}

fn a_file_is_appended_to(containerd: &mut Containerd) -> Result<()> {
    let path = containerd.root().join("logs/of one.log");
    let uri = format!("file://{}", path.display()).replace(' ', "%20");
    run_logging(containerd, &uri, "echo one; sleep 0.3; echo two >&2")?;
    run_logging(containerd, &uri, "echo three")?;
    let logged = fs::read_to_string(&path)?;
    ensure!(logged == "one\ntwo\nthree\n", "{logged:?}");
    fs::remove_dir_all(containerd.root().join("logs"))?;
    Ok(())
}

/// A logging program of nerdctl's kind, and its log.
struct Program {
    path: PathBuf,
    log: PathBuf,
}

impl Program {
    fn new(containerd: &Containerd, script: &str) -> Result<Self> {
        let (path, log) = (containerd.root().join("logger"), containerd.root().join("logged"));
        fs::write(&path, format!("#!/bin/bash\n{script}\n"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self { path, log })
    }

    fn uri(&self) -> String {
        let log = self.log.display().to_string().replace('/', "%2F");
        format!("binary://{}?_LOG={log}", self.path.display())
    }

    fn remove(self) -> Result<String> {
        let logged = fs::read_to_string(&self.log)?;
        fs::remove_file(self.path)?;
        fs::remove_file(self.log)?;
        Ok(logged)
    }
}

/// Writes its input, and a line at its own end.
const LOGGER: &str = "[ \"$1\" = _LOG ] || exit 1\n\
                      env | grep ^CONTAINER_N >$2\nexec 5>&-\n\
                      sed -u 's/^/out: /' <&3 >>$2 & sed -u 's/^/err: /' <&4 >>$2\nwait\n\
                      echo \"end of $CONTAINER_ID\" >>$2";

fn a_program_logs(containerd: &mut Containerd) -> Result<()> {
    let program = Program::new(containerd, LOGGER)?;
    run_logging(containerd, &program.uri(), "echo one; sleep 0.3; echo two >&2; sleep 0.3; seq 1 20000")?;
    let namespace = containerd.namespace().to_owned();
    let logged = program.remove()?;
    let mut lines = logged.lines();
    ensure!(lines.next() == Some(&format!("CONTAINER_NAMESPACE={namespace}")), "{logged}");
    ensure!(lines.next() == Some("out: one") && lines.next() == Some("err: two"), "{logged}");
    let rest: Vec<_> = lines.collect();
    ensure!(rest.len() == 20_001 && rest[19_999] == "out: 20000", "{} lines", rest.len());
    ensure!(rest[20_000].starts_with("end of "), "{}", rest[20_000]);
    Ok(())
}

fn a_process_logs_too(containerd: &mut Containerd) -> Result<()> {
    let program = Program::new(containerd, LOGGER)?;
    let id = containerd.idle(IMAGE, None)?;
    let from = containerd.log().position();
    let exec = containerd.exec(&id, "the-process", &["sh", "-c", "echo from it"]);
    exec.flags(&["--detach", "--log-uri", &program.uri()]).output()?.ok()?;
    containerd.log().wait_for_event(from, "/tasks/exit")?;
    containerd.end(&id)?;
    let logged = program.remove()?;
    ensure!(logged.ends_with("out: from it\nend of the-process\n"), "{logged}");
    Ok(())
}

fn a_program_that_fails(containerd: &mut Containerd) -> Result<()> {
    let before = containerd.inventory()?;
    let run = containerd.run(IMAGE, &["true"]).detached().flags(&["--log-uri", "binary:///no/logger?a=b"]);
    let output = run.output()?;
    ensure!(output.status != 0 && output.error_text().contains("/no/logger not found"), "{output}");
    containerd.settle(&before)?;
    let program = Program::new(containerd, "exec 5>&-; echo gone >$2; exit 3")?;
    // A program that does not listen costs the container its output, and nothing else.
    run_logging(containerd, &program.uri(), "echo unheard; exit 0")?;
    ensure!(program.remove()? == "gone\n", "the program did not run");
    Ok(())
}

fn readers_come_and_go(containerd: &mut Containerd) -> Result<()> {
    let rootfs = Bundle::busybox(containerd)?;
    let shim = Shim::new(containerd)?;
    fill(&shim, &rootfs, &["sh", "-c", "i=0; while :; do i=$((i + 1)); echo $i; sleep 0.02; done"])?;
    let client = Client::connect(&shim.serve()?, V3)?;
    let fifo = shim.bundle.join("stdout");
    mkfifo(&fifo, Mode::S_IRWXU)?;
    let stdout = format!("fifo://{}", fifo.display());
    client.ok::<api::CreateTaskResponse>(
        "Create",
        &api::CreateTaskRequest { stdout, ..shim.create_request() },
    )?;
    client.ok::<api::StartResponse>(
        "Start",
        &api::StartRequest { id: shim.id.clone(), ..Default::default() },
    )?;
    let mut last = 0;
    for _ in 0..3 {
        // Each reader takes some lines and closes; the lines that it had buffered are lost with it.
        let mut reader = BufReader::with_capacity(64, File::open(&fifo)?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        for _ in 0..5 {
            line.clear();
            reader.read_line(&mut line)?;
            let number: u32 = line.trim().parse()?;
            ensure!(number > last, "{number} after {last}");
            last = number;
        }
    }
    client.ok::<api::Empty>("Kill", &signal(&shim, 9))?;
    let wait = api::WaitRequest { id: shim.id.clone(), ..Default::default() };
    let exit: api::WaitResponse = client.ok("Wait", &wait)?;
    ensure!(exit.exit_status == 137, "{exit:?}");
    client.ok::<api::DeleteResponse>(
        "Delete",
        &api::DeleteRequest { id: shim.id.clone(), ..Default::default() },
    )?;
    shim.shut_down(&client)
}
