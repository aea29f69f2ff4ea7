//! `machinen snapshot`: manages checkpoints on disk (snapshot bundles).

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use machinen::{
    checkpoint::{self, CheckpointError, CheckpointManifest},
    error::chain,
    fs::FileError,
    text::printable,
};
use serde_json::{Value, json};

use super::{
    output::{Align, TextTable, VerbOutput},
    text::human,
};

/// Arguments of `machinen snapshot`.
#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    /// Print JSON
    #[arg(long, global = true)]
    pub(super) json: bool,
    #[command(subcommand)]
    command: SnapshotCommand,
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    /// List the checkpoints in a directory: its subdirectories that are checkpoints
    Ls {
        /// Directory that is searched
        #[arg(default_value = ".")]
        dir: PathBuf,
    },
    /// Show what a checkpoint contains, and what is needed to restore it
    Inspect {
        /// Directory with machinen.json
        dir: PathBuf,
    },
    /// Read checkpoints and compare sizes and digests with what was written. The exit status is 1 if one has
    /// changed
    Verify {
        /// Directories with machinen.json
        #[arg(required = true, value_name = "DIR")]
        dirs: Vec<PathBuf>,
    },
    /// Remove checkpoints: the files that their manifests name, and the directories if nothing else is in
    /// them
    Rm {
        /// Directories with machinen.json
        #[arg(required = true, value_name = "DIR")]
        dirs: Vec<PathBuf>,
    },
}

/// Runs one of the commands.
///
/// # Errors
/// A directory cannot be read, or is not a checkpoint.
pub(crate) fn run(args: &SnapshotArgs) -> Result<VerbOutput, CheckpointError> {
    match &args.command {
        SnapshotCommand::Ls { dir } => {
            let found = list(dir)?;
            let value: Value = found.iter().map(|(dir, manifest)| summary(dir, manifest)).collect();
            Ok(VerbOutput::new(table(&found), value))
        }
        SnapshotCommand::Inspect { dir } => {
            let (manifest, digest) = CheckpointManifest::read_with_digest(dir)?;
            let mut fields = json!(manifest);
            fields["digest"] = json!(digest);
            Ok(VerbOutput::new(describe(&manifest, &digest), fields))
        }
        SnapshotCommand::Verify { dirs } => Ok(verify(dirs)),
        SnapshotCommand::Rm { dirs } => {
            dirs.iter().try_for_each(|dir| checkpoint::remove(dir))?;
            Ok(VerbOutput::lines(dirs.iter().map(|dir| dir.display()), json!(dirs)))
        }
    }
}

fn verify(dirs: &[PathBuf]) -> VerbOutput {
    let (mut lines, mut values, mut ok) = (Vec::new(), Vec::new(), true);
    for dir in dirs {
        let verified = checkpoint::verify(dir);
        ok &= verified.is_ok();
        let state = verified.map_or_else(|error| chain(&error), |_| "ok".to_owned());
        lines.push(format!("{} {state}", dir.display()));
        values.push(json!({ "path": dir, "state": state }));
    }
    VerbOutput { ok, ..VerbOutput::lines(lines, values) }
}

/// Entries that are not checkpoints are skipped. A checkpoint of another version is an error.
fn list(dir: &Path) -> Result<Vec<(PathBuf, CheckpointManifest)>, CheckpointError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(FileError::at("read", dir))? {
        let path = entry.map_err(FileError::at("read", dir))?.path();
        match CheckpointManifest::read(&path) {
            Ok(manifest) => found.push((path, manifest)),
            Err(CheckpointError::NoManifest { .. }) => {}
            Err(CheckpointError::File(_)) if !path.is_dir() => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_by(|(_, a), (_, b)| b.created.cmp(&a.created));
    Ok(found)
}

fn bytes(manifest: &CheckpointManifest) -> u64 {
    manifest.files.iter().fold(0, |sum: u64, file| sum.saturating_add(file.size))
}

fn table(found: &[(PathBuf, CheckpointManifest)]) -> String {
    let mut table = TextTable::new([
        ("PATH", Align::Left),
        ("CONTAINER", Align::Left),
        ("CREATED", Align::Left),
        ("SIZE", Align::Right),
    ]);
    for (path, manifest) in found {
        table.row([
            printable(&path.to_string_lossy()),
            printable(&manifest.container),
            printable(&manifest.created),
            human(bytes(manifest)),
        ]);
    }
    table.to_string()
}

fn summary(path: &Path, manifest: &CheckpointManifest) -> Value {
    json!({
        "path": path, "container": manifest.container, "created": manifest.created, "bytes": bytes(manifest),
    })
}

fn describe(manifest: &CheckpointManifest, digest: &str) -> String {
    // A manifest has words of the guest, and any other program may have written it.
    let CheckpointManifest { format, machinen, arch, created, container, kernel, criu, config, .. } =
        manifest;
    let [machinen, arch, created, container, kernel, criu, config] =
        [machinen, arch, created, container, kernel, criu, config].map(|text| printable(text));
    let rootdisk = manifest.rootdisk.as_deref().map_or("a disk of the snapshotter's own".into(), printable);
    let mut text = format!(
        "container  {container}\ncreated    {created}, by machinen {machinen} (format {format})\nneeds      {arch}, \
         kernel {kernel} or newer, {} CPU features\ncriu       {criu}\nrootdisk   {rootdisk}\nconfig     {config}\n\
         digest     {digest}\nterminal   {}\nsize       {} in {} files\n",
        manifest.cpu_flags.len(),
        if manifest.terminal { "yes" } else { "no" },
        human(bytes(manifest)),
        manifest.files.len(),
    );
    for mount in &manifest.mounts {
        let source =
            mount.source.as_ref().map_or("a file of the configuration".into(), |path| path.to_string_lossy());
        let destination = mount.destination.to_string_lossy();
        text += &format!("mount      {} from {}\n", printable(&destination), printable(&source));
    }
    for volume in &manifest.volumes {
        let destination = volume.destination.to_string_lossy();
        let kind = if volume.is_file { "file" } else { "directory" };
        let access = if volume.read_only { "read-only" } else { "writable" };
        text += &format!("volume     {} a {kind}, {access}\n", printable(&destination));
    }
    for copy in &manifest.copies {
        let destination = copy.destination.to_string_lossy();
        text += &format!("copy       {} of {}\n", printable(&destination), printable(&copy.rootdisk));
    }
    for (name, value) in &manifest.limits {
        text += &format!("limit      {} {}\n", printable(name), printable(value.trim()));
    }
    text
}

#[cfg(test)]
mod tests {
    use machinen::checkpoint::{ManifestCopy, ManifestMount, ManifestVolume};

    use super::*;

    #[test]
    fn what_a_checkpoint_says_reaches_no_terminal_as_it_is() {
        let evil = || format!("6.12\n\x1b[31m{}", "x".repeat(1 << 20));
        let manifest = CheckpointManifest {
            container: evil(),
            created: evil(),
            kernel: evil(),
            criu: evil(),
            rootdisk: Some(evil()),
            mounts: vec![ManifestMount { destination: evil().into(), source: Some(evil().into()) }],
            volumes: vec![ManifestVolume {
                destination: evil().into(),
                is_file: true,
                read_only: true,
                mounted_at: Some(evil().into()),
            }],
            copies: vec![ManifestCopy { destination: evil().into(), rootdisk: evil() }],
            limits: [(evil(), evil())].into(),
            ..CheckpointManifest::default()
        };
        let texts = [describe(&manifest, "sha256:0"), table(&[(evil().into(), manifest)])];
        for text in &texts {
            assert!(!text.contains('\x1b') && text.len() < 16 << 10, "{text:.200}");
        }
        assert_eq!(
            texts[0].lines().filter(|line| line.starts_with('\u{1b}') || line.contains("[31m")).count(),
            9
        );
    }
}
