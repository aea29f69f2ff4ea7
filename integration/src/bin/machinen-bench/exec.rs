//! Processes in a running container: what starting one costs, against runc, and how fast their output
//! arrives.

use std::{
    fs::File,
    io::Read,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{bundle::Bundle, containerd::Containerd, paths, samples::Samples, served::Served};
use nix::{sys::stat::Mode, unistd::mkfifo};

use crate::report::Report;

/// Output of one measurement, MiB.
const OUTPUT: usize = 256;

/// `ctr tasks exec` of true, by turns in a container of machinen's and one of runc's; and output.
pub(crate) fn measure(
    containerd: &Containerd,
    image: &str,
    rounds: usize,
    report: &mut Report,
) -> Result<()> {
    let (mut machinen, mut runc) = (Samples::default(), Samples::default());
    let ours = containerd.idle(image, Some(&paths::runtime()))?;
    let theirs = containerd.idle(image, Some(paths::RUNC))?;
    // Not counted: a VM's first is slower than the others.
    for id in [&ours, &theirs] {
        run(containerd, id)?;
    }
    for _ in 0..rounds {
        machinen.push(run(containerd, &ours)?);
        runc.push(run(containerd, &theirs)?);
    }
    containerd.end(&ours)?;
    containerd.end(&theirs)?;
    report.time("ctr tasks exec true, machinen", "exec_ms", &machinen);
    report.time("ctr tasks exec true, runc", "exec_runc_ms", &runc);
    report.target("exec: at most 3 x runc", machinen.median() / runc.median(), 3.0, "x");
    let rate = throughput(containerd, 3)?;
    report.rate("stdout through a fifo", "stdout_mb_s", rate);
    report.target_at_least("stdout: at least 50 MB/s", rate, 50.0, "MB/s");
    Ok(())
}

fn run(containerd: &Containerd, id: &str) -> Result<Duration> {
    let output = containerd.exec(id, "bench", &["true"]).output()?;
    ensure!(output.status == 0, "exec in {id}: {output}");
    Ok(output.duration)
}

/// MB/s of a process's stdout, read from its fifo by a reader that does nothing else. The median of some
/// rounds.
fn throughput(containerd: &Containerd, rounds: usize) -> Result<f64> {
    let rootfs = Bundle::busybox(containerd)?;
    let mut rates = (0..rounds).map(|_| rate(containerd, &rootfs)).collect::<Result<Vec<f64>>>()?;
    rates.sort_by(f64::total_cmp);
    Ok(rates[rates.len() / 2])
}

fn rate(containerd: &Containerd, rootfs: &Bundle) -> Result<f64> {
    let count = format!("count={}", OUTPUT * 16);
    // Uses the fast channel, which clones of a template do not have on every host.
    let config = rootfs.config(&["dd", "if=/dev/zero", "bs=65536", &count], |spec| {
        spec["annotations"]["io.machinen.channel"] = "vsock".into();
    })?;
    let mut served = Served::of(containerd, &config)?;
    let fifo = served.shim.bundle.join("stdout");
    mkfifo(&fifo, Mode::S_IRWXU)?;
    served.create(|request| request.stdout = fifo.display().to_string())?;
    let reader = std::thread::spawn(move || read(File::open(fifo)?));
    served.begin()?;
    let rate = reader.join().ok().context("the reader panicked")??;
    served.wait("")?;
    served.end_stopped()?;
    Ok(rate)
}

fn read(mut fifo: File) -> Result<f64> {
    let mut buffer = vec![0; 1 << 20];
    let mut left = OUTPUT << 20;
    // The clock starts with the first bytes, when the process runs.
    left -= fifo.read(&mut buffer)?;
    let begun = Instant::now();
    let counted = left;
    while left > 0 {
        let length = fifo.read(&mut buffer)?;
        ensure!(length > 0, "the output ends {left} bytes early");
        left = left.checked_sub(length).context("more output than there should be")?;
    }
    Ok(counted as f64 / begun.elapsed().as_secs_f64() / 1e6)
}
