//! Where errors go: callers read them from a file.

use std::fs;

use anyhow::{Context, Result, ensure};
use machinen_integration::oci::Oci;
use serde_json::Value;

use super::with_oci;

with_oci!(as_json, as_text, misuse, in_detail);

/// A caller that names a file finds it, whatever happens.
fn in_detail(oci: &Oci) -> Result<()> {
    oci.bundle("d", &["true"], |_| {})?;
    let (log, dir) = (oci.file("log.txt"), oci.bundle_dir("d"));
    let path = log.display().to_string();
    oci.command_with(&["--log", &path], &["features"])?.run()?.ok()?;
    ensure!(log.exists());
    oci.command_with(&["--debug", "--log", &path], &["run", "--bundle", &dir, "d"])?.run()?.ok()?;
    ensure!(fs::read_to_string(&log)?.contains("level=debug"));
    let output = oci.command_with(&["--debug"], &["run", "--bundle", &dir, "d"])?.run()?.ok()?;
    ensure!(output.error_text().contains("level=debug") && output.text().is_empty(), "{output}");
    Ok(())
}

/// The last line of a log.
fn last(oci: &Oci, name: &str) -> Result<String> {
    let text = fs::read_to_string(oci.file(name))?;
    text.lines().last().map(str::to_owned).context("an empty log")
}

/// Podman and containerd take the message of the line with the level `error`.
fn as_json(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("l", &["no-such-program"], |_| {})?;
    let (log, dir) = (oci.file("log.json").display().to_string(), bundle.dir().display().to_string());
    for (args, text) in [
        (&["state", "none"][..], "does not exist"),
        (&["run", "--bundle", &dir, "l"], "executable file not found in $PATH"),
        (&["create", "--bundle", "/no/such/bundle", "l"], "/no/such/bundle"),
    ] {
        let output = oci.command_with(&["--log", &log, "--log-format", "json"], args)?.run()?;
        ensure!(output.status == 1 && output.error_text().contains(text), "{args:?}: {output}");
        let line = last(oci, "log.json")?;
        let line: Value = serde_json::from_str(&line).with_context(|| format!("not JSON: {line}"))?;
        ensure!(line["level"] == "error" && line["time"].is_string(), "{line}");
        ensure!(line["msg"].as_str().is_some_and(|message| message.contains(text)), "{line}");
    }
    Ok(())
}

fn as_text(oci: &Oci) -> Result<()> {
    let log = oci.file("log.txt").display().to_string();
    for options in [&["--log", &log][..], &["--log", &log, "--log-format", "text"]] {
        oci.command_with(options, &["state", "none"])?.run()?;
        let line = last(oci, "log.txt")?;
        ensure!(line.contains("level=error") && line.contains("does not exist"), "{line}");
    }
    ensure!(fs::read_to_string(&log)?.lines().count() == 2, "the log was written anew");
    Ok(())
}

fn misuse(oci: &Oci) -> Result<()> {
    for args in [&["state"][..], &["state", "a", "b"], &["kill"], &["state", "--no-such-option", "a"]] {
        let output = oci.output(args)?;
        ensure!(output.status != 0 && !output.error_text().is_empty(), "{args:?}: {output}");
    }
    let output = oci.command_with(&["--log-format", "xml"], &["list"])?.run()?;
    ensure!(output.status != 0 && output.error_text().contains("log-format"), "{output}");
    Ok(())
}
