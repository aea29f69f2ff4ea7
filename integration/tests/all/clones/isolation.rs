//! A template contains nothing of a container, and only root can read it.

use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    containerd::Containerd,
    image::hex,
    process::Invocation,
    templates::{Listed, Templates},
};
use nix::unistd::{Whence, lseek};

use super::{automatic, works_from};
use crate::harness::{IMAGE, on_newest_containerd};

on_newest_containerd!(secrets_stay_out_of_templates);

/// A text in every guest's memory: if it is found, the search works.
const KNOWN: &[u8] = b"machinen-agent";

fn secrets_stay_out_of_templates(containerd: &mut Containerd) -> Result<()> {
    let templates = automatic(containerd)?;
    let mut watch = templates.watch()?;
    let mut secrets = Vec::new();
    for origin in ["boot", "clone"] {
        let [argument, variable, file] = [secret()?, secret()?, secret()?];
        // The script creates the file inside the container, so that each secret is in one place only.
        let script = format!("echo {file} > /secret; sync; cat /secret; echo $VARIABLE $0");
        let run = containerd.run(IMAGE, &["sh", "-c", &script, &argument]);
        let run = run.flags(&["--env", &format!("VARIABLE={variable}")]);
        let output = works_from(containerd, &run, origin)?;
        ensure!(output.text() == format!("{file}\n{variable} {argument}\n"), "{output}");
        secrets.extend([argument, variable, file]);
        // The container that was booted has requested the template.
        watch.wait_for("json")?;
    }
    let template = templates.only()?;
    verified(&templates)?;
    let (known, found) = search(&template, &secrets)?;
    ensure!(known, "{KNOWN:?} is not even in the template");
    ensure!(found.is_empty(), "{found:?} in the template");
    for entry in fs::read_dir(&templates.dir)? {
        let entry = entry?;
        // Skips the fifo, which has no content.
        if !entry.file_type()?.is_file() {
            continue;
        }
        let path = entry.path();
        let text = fs::read(&path)?;
        let found = secrets.iter().find(|secret| contains(&text, secret.as_bytes()));
        ensure!(found.is_none(), "{found:?} is in {}", path.display());
    }
    only_roots(&templates, &template)?;
    templates.remove_all()
}

fn verified(templates: &Templates<'_>) -> Result<()> {
    let printed = templates.command(&["verify"])?.ok()?;
    ensure!(printed.text().trim_end().ends_with(" ok"), "{printed}");
    Ok(())
}

fn secret() -> Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("planted{}", hex(&bytes)))
}

/// Whether the known text, and which of the secrets, are in the memory and device state that the holder
/// keeps.
fn search(template: &Listed, secrets: &[String]) -> Result<(bool, Vec<String>)> {
    let (mut known, mut found) = (false, Vec::new());
    let mut read = 0;
    for number in [3, 4] {
        let path = format!("/proc/{}/fd/{number}", template.holder);
        let file = File::open(&path).with_context(|| format!("cannot open {path}"))?;
        for (start, end) in extents(&file)? {
            let mut bytes = vec![0; usize::try_from(end - start)?];
            file.read_exact_at(&mut bytes, start)?;
            read += bytes.len() as u64;
            known |= contains(&bytes, KNOWN);
            found.extend(secrets.iter().filter(|secret| contains(&bytes, secret.as_bytes())).cloned());
        }
    }
    ensure!(read >= template.allocated, "{read} of {} bytes were read", template.allocated);
    Ok((known, found))
}

/// The ranges of a sparse file that have data.
fn extents(file: &File) -> Result<Vec<(u64, u64)>> {
    let length = i64::try_from(file.metadata()?.len())?;
    let mut extents = Vec::new();
    let mut at = 0;
    while at < length {
        match lseek(file, at, Whence::SeekData) {
            Ok(start) => {
                at = lseek(file, start, Whence::SeekHole)?;
                extents.push((u64::try_from(start)?, u64::try_from(at)?));
            }
            Err(nix::errno::Errno::ENXIO) => break,
            Err(error) => return Err(error).context("cannot find the data of a file"),
        }
    }
    Ok(extents)
}

/// Looks for the first byte first: a template is tens of megabytes, and tests are not optimised.
fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    let mut rest = bytes;
    let first = needle[0];
    while let Some(at) = rest.iter().position(|byte| *byte == first) {
        if rest[at..].starts_with(needle) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

fn only_roots(templates: &Templates<'_>, template: &Listed) -> Result<()> {
    let private = |path: &Path| -> Result<()> {
        let meta = fs::symlink_metadata(path)?;
        let open = meta.mode() & 0o077;
        ensure!(meta.uid() == 0 && open == 0, "{} has mode {:o}", path.display(), meta.mode());
        Ok(())
    };
    private(&templates.dir)?;
    for entry in fs::read_dir(&templates.dir)? {
        private(&entry?.path())?;
    }
    for number in [3, 4] {
        let path = format!("/proc/{}/fd/{number}", template.holder);
        let unprivileged =
            Invocation::new("setpriv").args(["--reuid=65534", "--clear-groups", "head", "-c1", &path]);
        let output = unprivileged.run()?;
        ensure!(output.status != 0 && output.error_text().contains("Permission denied"), "{output}");
    }
    Ok(())
}
