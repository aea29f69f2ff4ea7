//! Work on files in a container, against the same on its disk without the overlay, in the same VM.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    bundle::Bundle, containerd::Containerd, process::Invocation, samples::Samples, served::Served,
};
use serde_json::json;

/// One kind of work.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) title: &'static str,
    pub(crate) key: &'static str,
    pub(crate) container: Samples,
    pub(crate) bare: Samples,
}

/// What the script calls it, and its row.
const KINDS: [(&str, &str, &str); 3] = [
    ("untar", "untar of 5,000 files", "untar"),
    ("small_synced", "300 writes of 4 KiB, each synced", "synced_writes"),
    ("sequential", "256 MiB written and synced", "sequential"),
];

pub(crate) fn measure(containerd: &Containerd, rounds: usize) -> Result<Vec<Work>> {
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
        // A container may not reach its own disk otherwise.
        spec["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
        // Its device file is made there.
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.retain(|mount| mount["destination"] != "/dev");
        mounts.push(machinen_integration::bundle::mount("/dev", "tmpfs", "tmpfs", &["mode=755"]));
    })?;
    let said = containerd.root().join("disk-work");
    let mut served = Served::of(containerd, &config)?;
    served.create(|request| {
        request.stdout = format!("file://{}", said.display());
        request.stderr.clone_from(&request.stdout);
    })?;
    served.begin()?;
    let status = served.wait("")?.exit_status;
    served.end_stopped()?;
    let said = fs::read_to_string(&said)?;
    ensure!(status == 0, "the work ended with {status}: {said}");
    KINDS.iter().map(|kind| work(*kind, &said, rounds)).collect()
}

fn work((name, title, key): (&str, &'static str, &'static str), said: &str, rounds: usize) -> Result<Work> {
    let mut work = Work { title, key, container: Samples::default(), bare: Samples::default() };
    let mut counted = 0;
    for line in said.lines().filter_map(|line| line.strip_prefix(name)) {
        let (container, bare) = line.trim().split_once(' ').with_context(|| format!("odd line {line:?}"))?;
        work.container.push(Duration::from_secs_f64(container.parse()?));
        work.bare.push(Duration::from_secs_f64(bare.parse()?));
        counted += 1;
    }
    ensure!(counted == rounds, "{counted} rounds of {name}: {said}");
    Ok(work)
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
