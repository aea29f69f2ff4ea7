//! Input and its end at any moment: `echo x | ctr run`, with a VM that boots, a clone, and a restored
//! container.

use std::{fs, fs::File, io::Write, os::unix::fs::OpenOptionsExt, path::Path};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    served::Served,
    setup::{Setup, Value},
};
use nix::{sys::stat::Mode, unistd::mkfifo};

use crate::{
    checkpoint::checkpoint,
    harness::{IMAGE, on_every_containerd, on_newest_containerd},
};

on_every_containerd!(pipelines, pipelines_into_a_vm_that_boots, pipelines_into_other_processes);
on_newest_containerd!(restored_containers_continue_reading, a_client_that_is_late, closed_at_any_moment);

/// Nothing, less and more than a pipe holds, and more than all buffers on the way hold.
const SIZES: [usize; 4] = [0, 10, 300_000, 5_000_000];

/// No two ranges of it are alike.
fn content(size: usize) -> Vec<u8> {
    (0_u64..).flat_map(|number| format!("{number}\n").into_bytes()).take(size).collect()
}

/// # Errors
/// A container did not get its input unchanged.
pub(crate) fn input_of_any_size(containerd: &Containerd) -> Result<()> {
    for size in SIZES {
        let sent = content(size);
        let output = containerd.run(IMAGE, &["cat"]).output_of_stdin(&sent)?.ok()?;
        ensure!(output.stdout == sent, "{} bytes of {size} came back", output.stdout.len());
    }
    // No pipe at all.
    let output = containerd.run(IMAGE, &["wc", "-c"]).output()?.ok()?;
    ensure!(output.text().trim() == "0", "{output}");
    Ok(())
}

fn pipelines(containerd: &mut Containerd) -> Result<()> {
    input_of_any_size(containerd)
}

fn pipelines_into_a_vm_that_boots(containerd: &mut Containerd) -> Result<()> {
    containerd.configure(&Setup::new().set("template", "mode", Value::text("off")))?;
    for size in [0, 10, 300_000] {
        let sent = content(size);
        let output = containerd.run(IMAGE, &["cat"]).output_of_stdin(&sent)?.ok()?;
        ensure!(output.stdout == sent, "{} bytes of {size} came back", output.stdout.len());
    }
    Ok(())
}

fn pipelines_into_other_processes(containerd: &mut Containerd) -> Result<()> {
    let id = containerd.idle(IMAGE, None)?;
    for size in SIZES.into_iter().chain([4; 8]) {
        let sent = content(size);
        let output = containerd.exec(&id, "e", &["cat"]).output_of_stdin(&sent)?.ok()?;
        ensure!(output.stdout == sent, "{} bytes of {size} came back", output.stdout.len());
    }
    let output = containerd.exec(&id, "e", &["wc", "-c"]).output()?.ok()?;
    ensure!(output.text().trim() == "0", "{output}");
    containerd.end(&id)
}

/// The fifos and files of a container's streams.
struct Streams {
    stdin: std::path::PathBuf,
    stdout: std::path::PathBuf,
}

impl Streams {
    fn of(served: &Served<'_>) -> Result<Self> {
        let (stdin, stdout) = (served.shim.bundle.join("stdin"), served.shim.bundle.join("stdout"));
        mkfifo(&stdin, Mode::S_IRWXU)?;
        Ok(Self { stdin, stdout })
    }

    fn name(&self, request: &mut api::CreateTaskRequest) {
        request.stdin = self.stdin.display().to_string();
        request.stdout = format!("file://{}", self.stdout.display());
    }

    fn write(&self, text: &str) -> Result<()> {
        Ok(File::options().write(true).open(&self.stdin)?.write_all(text.as_bytes())?)
    }

    /// Whether a process has the reading end open.
    fn has_reader(&self) -> bool {
        File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&self.stdin).is_ok()
    }
}

fn close(served: &Served<'_>) -> Result<()> {
    let request = api::CloseIORequest { id: served.shim.id.clone(), stdin: true, ..Default::default() };
    served.client.ok::<api::Empty>("CloseIO", &request).map(drop)
}

/// The output of a container that copies its input, after it has ended by itself.
fn copied(served: &Served<'_>, stdout: &Path) -> Result<String> {
    let exit = served.wait("")?;
    ensure!(exit.exit_status == 0, "{exit:?}");
    fs::read_to_string(stdout).with_context(|| format!("nothing in {}", stdout.display()))
}

/// The whole life of a container that copies its input; `early` and `late` happen before and after its start.
fn copies(
    containerd: &Containerd,
    rootfs: &Bundle,
    early: impl Fn(&Served<'_>, &Streams) -> Result<()>,
    late: impl Fn(&Served<'_>, &Streams) -> Result<()>,
) -> Result<String> {
    let mut served = Served::of(containerd, &rootfs.config(&["cat"], |_| ())?)?;
    let streams = Streams::of(&served)?;
    served.create(|request| streams.name(request))?;
    ensure!(!streams.has_reader(), "stdin is read before the start");
    early(&served, &streams)?;
    served.begin()?;
    late(&served, &streams)?;
    let text = copied(&served, &streams.stdout)?;
    served.end_stopped()?;
    Ok(text)
}

fn closed_at_any_moment(containerd: &mut Containerd) -> Result<()> {
    let rootfs = Bundle::busybox(containerd)?;
    let text = copies(containerd, &rootfs, |served, _| close(served), |_, _| Ok(()))?;
    ensure!(text.is_empty(), "{text:?}");
    let text = copies(
        containerd,
        &rootfs,
        |_, _| Ok(()),
        |served, streams| {
            streams.write("one ")?;
            streams.write("two")?;
            close(served)?;
            // A second request has the same result.
            close(served)
        },
    )?;
    ensure!(text == "one two", "{text:?}");
    // A client that opens and closes the fifo without writing.
    let text = copies(containerd, &rootfs, |_, _| Ok(()), |_, _| Ok(()))?;
    ensure!(text.is_empty(), "{text:?}");
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "a client that writes nothing for longer than the shim waits for one"
)]
fn a_client_that_is_late(containerd: &mut Containerd) -> Result<()> {
    let rootfs = Bundle::busybox(containerd)?;
    let mut served = Served::of(containerd, &rootfs.config(&["cat"], |_| ())?)?;
    let streams = Streams::of(&served)?;
    served.create(|request| streams.name(request))?;
    std::thread::scope(|scope| -> Result<()> {
        // The client waits in open(2) during the start, and then writes nothing for a while.
        let client = scope.spawn(|| -> Result<()> {
            let mut fifo = File::options().write(true).open(&streams.stdin)?;
            std::thread::sleep(std::time::Duration::from_secs(3));
            Ok(fifo.write_all(b"late")?)
        });
        served.begin()?;
        client.join().expect("the client does not panic")?;
        close(&served)
    })?;
    let text = copied(&served, &streams.stdout)?;
    ensure!(text == "late", "{text:?}");
    served.end_stopped()
}

fn restored_containers_continue_reading(containerd: &mut Containerd) -> Result<()> {
    let rootfs = Bundle::busybox(containerd)?;
    let config = rootfs.config(&["cat"], |_| ())?;
    let mut first = Served::of(containerd, &config)?;
    let streams = Streams::of(&first)?;
    first.create(|request| streams.name(request))?;
    first.begin()?;
    streams.write("before")?;
    let taken = first.shim.bundle.join("taken");
    checkpoint(&first, &taken)?;
    for (input, early) in [("", true), ("after", false)] {
        let mut second = Served::of(containerd, &config)?;
        let streams = Streams::of(&second)?;
        second.create(|request| {
            streams.name(request);
            request.checkpoint = taken.display().to_string();
        })?;
        if early {
            close(&second)?;
        }
        second.begin()?;
        if !early {
            streams.write(input)?;
            close(&second)?;
        }
        let text = copied(&second, &streams.stdout)?;
        ensure!(text == input || text == format!("before{input}"), "{text:?} after {input:?}");
        second.end_stopped()?;
    }
    close(&first)?;
    let text = copied(&first, &streams.stdout)?;
    ensure!(text == "before", "{text:?}");
    first.end_stopped()
}
