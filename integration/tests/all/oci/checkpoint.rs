//! `checkpoint` and `restore` with runc's options.

use std::fs;

use anyhow::{Context, Result, ensure};
use machinen_integration::{oci::Oci, runtime::Runtime};

use super::with_oci;

with_oci!(restored, left_running, twice, refused);

/// Counts in memory, and writes each number to a file.
const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i > /count; sleep 0.1; done";

/// Waits until the counter has exceeded a number, and returns the counter.
fn count(oci: &Oci, id: &str, above: u32) -> Result<u32> {
    let script = format!(
        "until n=$(cat /count) && [ ${{n:-0}} -gt {above} ]; do sleep 0.1; done 2> /dev/null; echo $n"
    );
    Ok(oci.ok(&["exec", id, "sh", "-c", &script])?.trim_end().parse()?)
}

fn started(oci: &Oci) -> Result<u32> {
    oci.bundle("c", &["sh", "-c", COUNTER], |_| {})?;
    // The pipes of the first container are not those of the restored one.
    drop(oci.launch("c")?);
    count(oci, "c", 3)
}

fn restored(oci: &Oci) -> Result<()> {
    let seen = started(oci)?;
    oci.ok(&["exec", "c", "sh", "-c", "echo kept > /kept"])?;
    let pid = oci.pid("c")?;
    let (image, work) = (oci.file("image").display().to_string(), oci.file("work").display().to_string());
    oci.ok(&["checkpoint", "--image-path", &image, "--work-path", &work, "c"])?;
    oci.wait(pid)?;
    ensure!(fs::read_dir(&image)?.count() > 0, "no files in {image}");
    // It ends the container and deletes it.
    super::is_gone(oci, "c")?;
    // What the container has written is in its directory, with runc, and in its checkpoint, with machinen.
    for _ in 0..2 {
        let (bundle, pid_file) = (oci.bundle_dir("c"), oci.file("restored.pid").display().to_string());
        let args = [
            "restore",
            "--image-path",
            &image,
            "--bundle",
            &bundle,
            "--detach",
            "--pid-file",
            &pid_file,
            "c",
        ];
        let mut restore = oci.command(&args)?.spawn()?;
        ensure!(restore.wait_for_exit()? == 0, "{:?}", restore.written());
        oci.has_status("c", "running")?;
        ensure!(fs::read_to_string(&pid_file)? == oci.pid("c")?.to_string());
        count(oci, "c", seen)?;
        ensure!(oci.ok(&["exec", "c", "cat", "/kept"])? == "kept\n");
        oci.ok(&["delete", "--force", "c"])?;
    }
    Ok(())
}

fn left_running(oci: &Oci) -> Result<()> {
    let seen = started(oci)?;
    let pid = oci.pid("c")?;
    let image = oci.file("image").display().to_string();
    oci.ok(&["checkpoint", "--image-path", &image, "--leave-running", "c"])?;
    oci.has_status("c", "running")?;
    ensure!(oci.pid("c")? == pid);
    let now = count(oci, "c", seen)?;
    count(oci, "c", now)?;
    oci.ok(&["delete", "--force", "c"]).map(drop)
}

/// The second checkpoint takes the place of the first.
fn twice(oci: &Oci) -> Result<()> {
    let seen = started(oci)?;
    let image = oci.file("image").display().to_string();
    oci.ok(&["checkpoint", "--image-path", &image, "--leave-running", "c"])?;
    let later = count(oci, "c", seen + 5)?;
    oci.ok(&["checkpoint", "--image-path", &image, "c"])?;
    // Nothing of the first is left, and nothing next to it.
    let parent = oci.file("image");
    let parent = parent.parent().context("it is in a directory")?;
    let names: Vec<_> = fs::read_dir(parent)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    ensure!(names == ["image"], "{names:?}");
    // The file has what the counter has written last.
    let (bundle, args) = (oci.bundle_dir("c"), ["restore", "--image-path", &image, "--detach", "--bundle"]);
    let mut restore = oci.command(&[&args[..], &[&bundle, "c"]].concat())?.spawn()?;
    ensure!(restore.wait_for_exit()? == 0, "{:?}", restore.written());
    count(oci, "c", later)?;
    oci.ok(&["delete", "--force", "c"]).map(drop)
}

/// Only a checkpoint is replaced.
#[test]
fn other_files_are_left_alone() {
    super::run(Runtime::Machinen, |oci| {
        started(oci)?;
        let image = oci.file("image");
        let checkpoint = ["checkpoint", "--leave-running", "--image-path", &image.display().to_string(), "c"];
        oci.ok(&checkpoint)?;
        fs::write(image.join("mine"), "x")?;
        oci.fails(&checkpoint, 1, "\"mine\"")?;
        oci.has_status("c", "running")?;
        ensure!(fs::read_to_string(image.join("mine"))? == "x" && image.join("machinen.json").exists());
        oci.ok(&["delete", "--force", "c"]).map(drop)
    });
}

fn refused(oci: &Oci) -> Result<()> {
    oci.bundle("c", &super::SLEEP, |_| {})?;
    let _container = oci.create("c")?;
    let image = oci.file("image").display().to_string();
    oci.fails(&["restore", "--image-path", &image, "--bundle", &oci.bundle_dir("c"), "other"], 1, "")?;
    super::is_gone(oci, "other")?;
    let pid = oci.pid("c")?;
    oci.ok(&["kill", "c", "KILL"])?;
    oci.wait(pid)?;
    oci.fails(&["checkpoint", "--image-path", &image, "c"], 1, "")?;
    oci.ok(&["delete", "c"]).map(drop)
}
