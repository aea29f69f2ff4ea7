//! Unread bytes of the standard streams when a checkpoint is taken: the restored container gets them, in
//! order and once, and so does the source.

use std::{fs, io::Write as _, path::PathBuf, thread, time::Instant};

use anyhow::{Result, ensure};
use containerd_shim_protos::{
    api::{CloseIORequest, CreateTaskRequest, Empty},
    shim::oci::CheckpointOptions,
};
use machinen_integration::{bundle::Bundle, containerd::Containerd, process::DEADLINE, served::Served};
use nix::{sys::stat::Mode, unistd::mkfifo};

use super::{checkpoint, request};
use crate::harness::on_newest_containerd;

on_newest_containerd!(
    input_that_waits,
    an_end_that_waits,
    output_arrives_once,
    an_init_that_pipes_its_own_output
);

/// Reads a line, and the rest when /go exists, which the next container on the bundle must not find.
const READER: &str =
    "read -r first; echo $first; until [ -e /go ]; do usleep 20000; done; rm /go; cat; echo end";

/// A container's streams in the host's files.
struct Streams {
    input: PathBuf,
    output: PathBuf,
}

impl Streams {
    fn new(containerd: &Containerd, name: &str) -> Result<Self> {
        let path = |kind: &str| containerd.root().join(format!("{name}.{kind}"));
        let (input, output) = (path("in"), path("out"));
        mkfifo(&input, Mode::S_IRWXU)?;
        Ok(Self { input, output })
    }

    fn name(&self, request: &mut CreateTaskRequest) {
        request.stdin = self.input.display().to_string();
        request.stdout = format!("file://{}", self.output.display());
    }

    /// Afterwards the bytes are in the fifo, or have been read from it.
    fn write(&self, bytes: &[u8]) -> Result<()> {
        Ok(fs::File::options().read(true).write(true).open(&self.input)?.write_all(bytes)?)
    }

    fn has(&self, wanted: &[u8]) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        loop {
            let found = fs::read(&self.output).unwrap_or_default();
            if found == wanted {
                return Ok(());
            }
            ensure!(
                Instant::now() < end && found.len() <= wanted.len(),
                "{} bytes of output instead of {}, the same up to {:?}",
                found.len(),
                wanted.len(),
                found.iter().zip(wanted).position(|(found, wanted)| found != wanted)
            );
            #[expect(clippy::disallowed_methods, reason = "a change of a file has no event")]
            thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    fn remove(self) -> Result<()> {
        fs::remove_file(self.input)?;
        Ok(fs::remove_file(self.output)?)
    }
}

fn close(served: &Served<'_>) -> Result<()> {
    let close = CloseIORequest { id: served.shim.id.clone(), stdin: true, ..Default::default() };
    served.client.ok::<Empty>("CloseIO", &close).map(drop)
}

fn go(served: &Served<'_>) -> Result<()> {
    ensure!(served.exec_to("go", &["touch", "/go"], "")? == 0, "cannot start the reading");
    Ok(())
}

/// Lines that all differ.
fn lines(range: std::ops::Range<u32>) -> Vec<u8> {
    range.flat_map(|n| format!("{n:07}\n").into_bytes()).collect()
}

fn input_that_waits(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sh", "-c", READER], |_| ())?;
    let dir = containerd.root().join("images");
    // The unread bytes fit into the pipe, or fill the buffers before it too.
    for (n, waiting) in [lines(0..4), lines(0..30_000)].into_iter().enumerate() {
        let (first, second) = (Streams::new(containerd, "first")?, Streams::new(containerd, "second")?);
        let mut source = Served::of(containerd, &config)?;
        source.create(|request| first.name(request))?;
        source.begin()?;
        first.write(b"begin\n")?;
        first.has(b"begin\n")?;
        first.write(&waiting)?;
        // Most of the bytes have left the fifo by then.
        checkpoint(&source, &dir)?;
        ensure!(dir.join("machinen-stdin").is_file(), "nothing was waiting");
        let carried = fs::read(dir.join("machinen-stdin"))?;
        ensure!(
            waiting.starts_with(&carried) && carried.len() >= waiting.len().min(200_000),
            "{}",
            carried.len()
        );
        first.write(b"the source's\n")?;
        close(&source)?;
        go(&source)?;
        ensure!(source.wait("")?.exit_status == 0, "the source does not end well");
        first.has(&[b"begin\n", &waiting[..], b"the source's\nend\n"].concat())?;
        source.end_stopped()?;
        // A second generation, which reads no more than the first.
        let mut restored = Served::of(containerd, &config)?;
        restored.create(|request| {
            second.name(request);
            request.checkpoint = dir.display().to_string();
        })?;
        fs::remove_dir_all(&dir)?;
        restored.begin()?;
        second.write(b"the second's\n")?;
        let mut expected = carried.clone();
        if n == 1 {
            let again = containerd.root().join("again");
            checkpoint(&restored, &again)?;
            let unread = fs::read(again.join("machinen-stdin"))?;
            ensure!(unread.starts_with(&carried) && unread.len() <= carried.len() + 13, "{}", unread.len());
            fs::remove_dir_all(&again)?;
        }
        expected.extend_from_slice(b"the second's\nend\n");
        close(&restored)?;
        go(&restored)?;
        ensure!(restored.wait("")?.exit_status == 0, "the container does not end with 0");
        second.has(&expected)?;
        restored.end_stopped()?;
        first.remove()?;
        second.remove()?;
    }
    Ok(())
}

fn an_end_that_waits(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sh", "-c", READER], |_| ())?;
    let dir = containerd.root().join("images");
    let streams = Streams::new(containerd, "first")?;
    let mut source = Served::of(containerd, &config)?;
    source.create(|request| streams.name(request))?;
    source.begin()?;
    streams.write(b"begin\nrest\n")?;
    close(&source)?;
    streams.has(b"begin\n")?;
    let exit = CheckpointOptions { exit: true, ..Default::default() };
    source.client.ok::<Empty>("Checkpoint", &request(&source, &dir, Some(&exit))?)?;
    ensure!(source.wait("")?.exit_status == 137, "the container has not ended");
    source.end_stopped()?;
    streams.remove()?;
    // The restored container's client gives it an input of its own, or none.
    for with_input in [true, false] {
        let streams = Streams::new(containerd, "second")?;
        let mut restored = Served::of(containerd, &config)?;
        restored.create(|request| {
            streams.name(request);
            if !with_input {
                request.stdin.clear();
            }
            request.checkpoint = dir.display().to_string();
        })?;
        restored.begin()?;
        if with_input {
            streams.write(b"more\n")?;
            close(&restored)?;
        }
        go(&restored)?;
        ensure!(restored.wait("")?.exit_status == 0, "the container does not end with 0");
        streams.has(if with_input { b"rest\nmore\nend\n" } else { b"rest\nend\n" })?;
        restored.end_stopped()?;
        streams.remove()?;
    }
    Ok(fs::remove_dir_all(&dir)?)
}

fn output_arrives_once(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    // More than all buffers between the process and its reader hold.
    let script = "touch /begun; seq 1000000 1300000; touch /done; sleep 1000";
    let config = bundle.config(&["sh", "-c", script], |_| ())?;
    let fifo = containerd.root().join("full");
    mkfifo(&fifo, Mode::S_IRWXU)?;
    // The fifo has no reader yet.
    let held = fs::File::options().read(true).write(true).open(&fifo)?;
    let mut source = Served::of(containerd, &config)?;
    source.create(|request| request.stdout = fifo.display().to_string())?;
    source.begin()?;
    ensure!(
        source.exec_to("begun", &["sh", "-c", "until [ -e /begun ]; do usleep 20000; done; sleep 1"], "")?
            == 0,
        "no output"
    );
    let dir = containerd.root().join("images");
    let exit = CheckpointOptions { exit: true, ..Default::default() };
    source.client.ok::<Empty>("Checkpoint", &request(&source, &dir, Some(&exit))?)?;
    // The reader comes only now.
    let reader = {
        let fifo = fifo.clone();
        thread::spawn(move || -> Result<Vec<u8>> {
            let mut text = Vec::new();
            std::io::Read::read_to_end(&mut fs::File::open(fifo)?, &mut text)?;
            Ok(text)
        })
    };
    source.wait("")?;
    source.end_stopped()?;
    drop(held);
    let first = reader.join().expect("no panic")?;
    let rest = containerd.root().join("rest");
    let mut restored = Served::of(containerd, &config)?;
    restored.create(|request| {
        request.stdout = format!("file://{}", rest.display());
        request.checkpoint = dir.display().to_string();
    })?;
    restored.begin()?;
    let done = "until [ -e /done ]; do usleep 20000; done";
    ensure!(restored.exec_to("done", &["sh", "-c", done], "")? == 0, "the container does not continue");
    restored.end()?;
    let all: Vec<u8> = (1_000_000..=1_300_000).flat_map(|n: u32| format!("{n}\n").into_bytes()).collect();
    let second = fs::read(&rest)?;
    ensure!(!first.is_empty() && !second.is_empty(), "{} and {} bytes", first.len(), second.len());
    ensure!(
        [&first[..], &second].concat() == all,
        "{} and {} bytes of {}",
        first.len(),
        second.len(),
        all.len()
    );
    fs::remove_file(&fifo)?;
    fs::remove_file(&rest)?;
    Ok(fs::remove_dir_all(&dir)?)
}

/// The effect of `exec > >(tee log)` at the start of a script: the pipe to the agent is no longer the first
/// process's output.
const OWN_PIPE: &str = "import os, time
read, write = os.pipe()
if os.fork() == 0:
    os.close(write)
    while text := os.read(read, 100):
        os.write(1, b'out: ' + text)
    os._exit(0)
os.close(read)
os.dup2(write, 1)
os.close(write)
n = 0
while True:
    os.write(1, b'%d\\n' % n)
    n += 1
    while not os.path.exists('/go%d' % n):
        time.sleep(0.02)
";

fn an_init_that_pipes_its_own_output(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::with_workloads(containerd)?;
    let config = bundle.config(&["python3.13", "-c", OWN_PIPE], |_| ())?;
    let streams = |name: &str| Streams::new(containerd, name);
    let (first, second) = (streams("first")?, streams("second")?);
    let mut source = Served::of(containerd, &config)?;
    source.create(|request| first.name(request))?;
    source.begin()?;
    first.has(b"out: 0\n")?;
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir)?;
    source.exec_to("go", &["touch", "/go1"], "")?;
    first.has(b"out: 0\nout: 1\n")?;
    source.end()?;
    let mut restored = Served::of(containerd, &config)?;
    restored.create(|request| {
        second.name(request);
        request.checkpoint = dir.display().to_string();
    })?;
    restored.begin()?;
    restored.exec_to("go", &["touch", "/go1"], "")?;
    second.has(b"out: 1\n")?;
    restored.end()?;
    first.remove()?;
    second.remove()?;
    Ok(fs::remove_dir_all(&dir)?)
}
