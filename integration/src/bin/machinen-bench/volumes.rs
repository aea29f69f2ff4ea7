//! Work on the files of a volume, against the container's own disk in the same VM, and against a bind mount with runc.
//! The page caches are warm, as those of a working tree are.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
    process::Invocation,
    samples::Samples,
};

use crate::{Kind, bare_vm::BareVm, report::Report};

/// The script's name for each kind of work, and its row in the table.
const KINDS: [(&str, &str); 5] = [
    ("write", "128 MiB written and synced"),
    ("read", "128 MiB read again"),
    ("random_reads", "2,000 reads of 4 KiB"),
    ("small_files", "1,000 files made and removed"),
    ("status", "5,000 files looked up, as by git status"),
];

/// How long all rounds together may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// The volume and a directory of the disk, as the container sees them.
const DIRS: [&str; 2] = ["/volume", "/root"];

/// With a kernel that has virtio-9p, the same is measured in a bare VM with such a share, too. `qemu` has the arguments of
/// the QEMU of a container whose VM boots.
pub(crate) fn measure(
    containerd: &Containerd,
    qemu: &[String],
    kernel_with_9p: Option<&Path>,
    rounds: usize,
    report: &mut Report,
) -> Result<()> {
    let bundle = Bundle::with_workloads(containerd)?;
    let rootfs = bundle.rootfs();
    fs::write(rootfs.join("volumes.py"), include_str!("volumes.py"))?;
    let volume = bundle.dir().join("volume");
    for dir in [&volume, &rootfs.join("root")] {
        content(dir)?;
    }
    let ours = run(containerd, &bundle, &volume, Kind::Clone, rounds)?;
    let runcs = run(containerd, &bundle, &volume, Kind::Runc, rounds)?;
    let shared = match kernel_with_9p {
        Some(kernel) => {
            eprintln!("work on volumes with virtio-9p");
            let command = format!("/usr/bin/python3.13 /volumes.py {rounds} {}", DIRS[0]);
            let vm = BareVm::new(&bundle, qemu)?;
            parsed(&vm.run_with_9p(kernel, &volume, DIRS[0], &command, PATIENCE)?, rounds)?
        }
        None => Vec::new(),
    };
    for ((name, title), (ours, runcs)) in KINDS.into_iter().zip(ours.iter().zip(&runcs)) {
        let ([volume, disk], [host, _]) = (ours, runcs);
        report.time(format!("{title}, in a volume"), format!("volume_{name}_ms"), volume);
        report.time("  the same on the container's disk", format!("volume_{name}_disk_ms"), disk);
        report.time("  in a volume with runc", format!("volume_{name}_runc_ms"), host);
    }
    for ((name, title), ([shared, _], [ours, _])) in KINDS.into_iter().zip(shared.iter().zip(&ours)) {
        let title = format!("{title}, in a bare VM with virtio-9p");
        report.time(title, format!("volume_{name}_9p_ms"), shared);
        report.share(
            "  a volume's speed as a share of that",
            &format!("volume_{name}_9p_share"),
            shared.median() / ours.median(),
        );
    }
    Ok(())
}

/// The files that the script reads.
fn content(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir.join("tree"))?;
    fs::write(dir.join("large"), vec![b'x'; 128 << 20])?;
    for number in 0..5000 {
        let dir = dir.join("tree").join((number / 50).to_string());
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(number.to_string()), "x")?;
    }
    // The host's own writing would be measured with the rest.
    Invocation::new("sync").run()?.ok()?;
    Ok(())
}

/// For each kind of work its samples in each of the directories.
fn run(
    containerd: &Containerd,
    bundle: &Bundle,
    volume: &Path,
    kind: Kind,
    rounds: usize,
) -> Result<Vec<[Samples; 2]>> {
    let count = rounds.to_string();
    let command = [&["python3.13", "/volumes.py", &count], &DIRS[..]].concat();
    let config = bundle.config(&command, |spec| {
        let source = volume.display().to_string();
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(mount(DIRS[0], "bind", &source, &["rbind", "rw"]));
    })?;
    let before = containerd.inventory()?;
    eprintln!("work on volumes with {}", kind.name());
    let running = containerd.run_spec(&config).runtime(&kind.runtime()).spawn(PATIENCE)?;
    let printed = running.wait()?.ok()?.text();
    containerd.settle(&before)?;
    parsed(&printed, rounds)
}

fn parsed(printed: &str, rounds: usize) -> Result<Vec<[Samples; 2]>> {
    KINDS.into_iter().map(|(name, _)| samples(name, printed, rounds)).collect()
}

fn samples(name: &str, printed: &str, rounds: usize) -> Result<[Samples; 2]> {
    let mut samples = [Samples::default(), Samples::default()];
    let mut counted = 0;
    for line in printed.lines() {
        let mut words = line.split(' ');
        if words.next() != Some(name) {
            continue;
        }
        for (samples, seconds) in samples.iter_mut().zip(words.by_ref()) {
            let seconds = seconds.parse().with_context(|| format!("odd line {line:?}"))?;
            samples.push(Duration::from_secs_f64(seconds));
        }
        counted += 1;
    }
    ensure!(counted == rounds, "{counted} rounds of {name}: {printed}");
    Ok(samples)
}
