//! Work on files in a container, against the same on its disk without the overlay, in the same VM.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    bundle::Bundle, containerd::Containerd, process::Invocation, samples::Samples, served::Served,
};
use serde_json::json;

use crate::report::Report;

/// The script's name for each kind of work, its row in the table, and its target.
const KINDS: [(&str, &str, &str); 3] = [
    ("untar", "untar of 5,000 files", "untar: at least 0.9 x as fast as on the bare disk"),
    (
        "small_synced",
        "300 writes of 4 KiB, each synced",
        "synced writes: at least 0.9 x as fast as on the bare disk",
    ),
    (
        "sequential",
        "256 MiB written and synced",
        "sequential writing: at least 0.9 x as fast as on the bare disk",
    ),
];

pub(crate) fn measure(containerd: &Containerd, rounds: usize, report: &mut Report) -> Result<()> {
    let bundle = Bundle::with_workloads(containerd)?;
    let rootfs = bundle.rootfs();
    fs::write(rootfs.join("disk.py"), include_str!("disk.py"))?;
    archive(&rootfs)?;
    let config = bundle.config(&["python3.13", "/disk.py", &rounds.to_string()], |spec| {
        spec["process"]["env"] = json!(["PATH=/usr/bin:/bin", "LC_ALL=C", "PYTHONDONTWRITEBYTECODE=1"]);
        for set in ["bounding", "effective", "permitted"] {
            let set = spec["process"]["capabilities"][set].as_array_mut().expect("an array");
            set.extend([json!("CAP_SYS_ADMIN"), json!("CAP_MKNOD")]);
        }
        // Only with these rights can the container reach its own disk without the overlay.
        spec["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
        // The device file of that disk is made here.
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.retain(|mount| mount["destination"] != "/dev");
        mounts.push(machinen_integration::bundle::mount("/dev", "tmpfs", "tmpfs", &["mode=755"]));
    })?;
    let printed = containerd.root().join("disk-work");
    let mut served = Served::of(containerd, &config)?;
    served.create(|request| {
        request.stdout = format!("file://{}", printed.display());
        request.stderr.clone_from(&request.stdout);
    })?;
    served.begin()?;
    let status = served.wait("")?.exit_status;
    served.end_stopped()?;
    let printed = fs::read_to_string(&printed)?;
    ensure!(status == 0, "the work ended with {status}: {printed}");
    for (name, title, target) in KINDS {
        let (container, bare) = samples(name, &printed, rounds)?;
        report.time(format!("{title}, in a container"), format!("disk_{name}_ms"), &container);
        report.time("  the same on its disk without the overlay", format!("disk_{name}_bare_ms"), &bare);
        report.target_at_least(target, bare.median() / container.median(), 0.9, "x");
    }
    Ok(())
}

fn samples(name: &str, printed: &str, rounds: usize) -> Result<(Samples, Samples)> {
    let (mut in_container, mut on_disk, mut counted) = (Samples::default(), Samples::default(), 0);
    for line in printed.lines().filter_map(|line| line.strip_prefix(name)) {
        let (container, bare) = line.trim().split_once(' ').with_context(|| format!("odd line {line:?}"))?;
        in_container.push(Duration::from_secs_f64(container.parse()?));
        on_disk.push(Duration::from_secs_f64(bare.parse()?));
        counted += 1;
    }
    ensure!(counted == rounds, "{counted} rounds of {name}: {printed}");
    Ok((in_container, on_disk))
}

/// 5,000 files of 1 to 8 KiB in 50 directories, as an archive in the root file system.
fn archive(rootfs: &std::path::Path) -> Result<()> {
    let tree = rootfs.join("files");
    for number in 0..5000_usize {
        let dir = tree.join((number / 100).to_string());
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(number.to_string()), vec![b'x'; 1024 * (1 + number % 8)])?;
    }
    Invocation::new("tar")
        .arg("-C")
        .arg(&tree)
        .arg("-cf")
        .arg(rootfs.join("files.tar"))
        .arg(".")
        .run()?
        .ok()?;
    Ok(fs::remove_dir_all(&tree)?)
}
