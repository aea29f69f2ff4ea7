//! A rootdisk from a tree of 200 MB in 10,000 files, against mke2fs alone.

use std::{fs, path::Path};

use anyhow::{Result, ensure};
use machinen_integration::{
    containerd::Containerd,
    image::{Image, Layer},
    paths,
    process::Invocation,
    samples::Samples,
};

use crate::report::Report;

const FILES: u64 = 10_000;
const BYTES: u64 = 200_000_000;
const DIRS: u64 = 100;

pub(crate) fn measure(containerd: &Containerd, rounds: usize, report: &mut Report) -> Result<()> {
    let (tree, cache, disk) = (
        containerd.root().join("tree"),
        containerd.root().join("converted"),
        containerd.root().join("bare.ext4"),
    );
    Image::new("tree", vec![layer()]).unpack(&tree)?;
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    // The first of each finds cold caches and is not counted.
    for round in 0..=rounds {
        let machinen = Invocation::new(paths::release_dir()?.join("machinen"))
            .arg("rootdisk")
            .arg("--dir")
            .arg(&cache)
            .arg("build")
            .arg(&tree)
            .run()?
            .ok()?;
        let bare = bare(&tree, &disk)?;
        if round > 0 {
            ours.push(machinen.duration);
            theirs.push(bare);
        }
        fs::remove_dir_all(&cache)?;
        fs::remove_file(&disk)?;
    }
    fs::remove_dir_all(&tree)?;
    report.time("rootdisk of 200 MB in 10,000 files", "conversion_ms", &ours);
    report.time("bare mke2fs -d of the same tree", "mke2fs_ms", &theirs);
    report.target("conversion: at most 1.2 x mke2fs", ours.median() / theirs.median(), 1.2, "x");
    Ok(())
}

fn bare(tree: &Path, disk: &Path) -> Result<std::time::Duration> {
    let output = Invocation::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(tree)
        .arg(disk)
        .arg("2G")
        .run()?;
    ensure!(output.status == 0, "mke2fs: {output}");
    Ok(output.duration)
}

/// Sizes vary as in a real tree: most files are small, a few are large.
fn layer() -> Layer {
    let mut layer = (0..DIRS).fold(Layer::new(), |layer, dir| layer.dir(&format!("dir{dir:03}"), 0o755));
    let weights = |file: u64| if file.is_multiple_of(50) { 60 } else { 1 + file % 10 };
    let total: u64 = (0..FILES).map(weights).sum();
    for file in 0..FILES {
        let path = format!("dir{:03}/file{file:05}", file % DIRS);
        layer = layer.noise(&path, file + 1, weights(file) * BYTES / total);
    }
    layer
}
