//! The writes of a container are in its snapshot after its end, and visible at the next start.

mod directory;
mod host;
mod killed;
mod snapshotters;
mod writes;

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{Context, Result};
use machinen_integration::containerd::Containerd;

/// Name of the disk with a container's writes, next to the snapshot's directories.
const DISK: &str = "machinen-writable.ext4";

/// A container that stays, with its snapshot, between tasks.
struct Kept<'a> {
    containerd: &'a Containerd,
    id: String,
    snapshotter: &'static str,
}

impl<'a> Kept<'a> {
    /// Starts the container in the background.
    fn start(
        containerd: &'a Containerd,
        image: &str,
        snapshotter: &'static str,
        script: &str,
    ) -> Result<Self> {
        let run = containerd.run(image, &["sh", "-ec", script]).detached().flag("--null-io");
        let run = run.flag("--snapshotter").flag(snapshotter);
        let id = run.container().to_owned();
        run.ok()?;
        Ok(Self { containerd, id, snapshotter })
    }

    /// Starts the container and waits for the end of its task, which must be a success.
    fn run(containerd: &'a Containerd, image: &str, snapshotter: &'static str, script: &str) -> Result<Self> {
        let from = containerd.log().position();
        let kept = Self::start(containerd, image, snapshotter, script)?;
        containerd.log().wait_for_event(from, "/tasks/exit")?;
        Ok(kept)
    }

    fn snapshots(&self, args: &[&str]) -> Result<Vec<u8>> {
        let all = [&["snapshots", "--snapshotter", self.snapshotter], args].concat();
        Ok(self.containerd.ctr(all)?.run()?.ok()?.stdout)
    }

    /// The directory on the host that has the container's changes, or (native) everything.
    fn dir(&self) -> Result<PathBuf> {
        let mounts = String::from_utf8(self.snapshots(&["mounts", "/nowhere", &self.id])?)?;
        let options = mounts.split([' ', ',']).find_map(|option| option.strip_prefix("upperdir="));
        let source = mounts.split(' ').nth(3);
        let dir = options.or(source).context("no directory")?.trim();
        Ok(PathBuf::from(dir))
    }

    fn delete_task(&self) -> Result<i32> {
        let output = self.containerd.ctr_output(&["tasks", "delete", &self.id])?;
        let error = output.error_text();
        let digits = error
            .split("exit code ")
            .nth(1)
            .and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
        Ok(digits.and_then(|digits| digits.parse().ok()).unwrap_or(output.status))
    }

    /// Runs a new task on the same snapshot to its end; returns its output.
    fn again(&self) -> Result<String> {
        let output = self.containerd.ctr(["tasks", "start", &self.id])?.run()?.ok()?;
        Ok(output.text())
    }

    fn remove(self) -> Result<()> {
        self.containerd.ctr_ok(&["containers", "delete", &self.id])?;
        Ok(())
    }

    /// The changes in containerd's own view: the content of the archive of `ctr snapshots diff`, by path.
    fn diff(&self) -> Result<BTreeMap<String, tar::Header>> {
        let kind = "application/vnd.oci.image.layer.v1.tar";
        let bytes = self.snapshots(&["diff", "--media-type", kind, &self.id])?;
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut found = BTreeMap::new();
        for entry in archive.entries()? {
            let entry = entry?;
            let path = entry.path()?.display().to_string();
            found.insert(path.trim_end_matches('/').to_owned(), entry.header().clone());
        }
        Ok(found)
    }
}
