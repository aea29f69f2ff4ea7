//! The files for administrators (`deploy/`), read by the programs that they are for.

use std::fs;

use anyhow::{Result, ensure};
use machinen::config::Config;
use machinen_integration::{
    paths::{self, Version},
    process::Invocation,
};

/// Each version of containerd knows the runtime, and keeps what its configuration had: with version 2 our section is
/// appended, and with version 3 imported.
#[test]
fn containerd_takes_the_configuration() -> Result<()> {
    for (version, format) in [(Version::V1_6, 2), (Version::V1_7, 2), (Version::V2_1, 2), (Version::V2_1, 3)]
    {
        let ours = paths::workspace().join(format!("deploy/containerd/config-v{format}.toml"));
        let dir = tempfile::tempdir()?;
        let config = dir.path().join("config.toml");
        let (plugin, imports, appended) = match format {
            2 => ("io.containerd.grpc.v1.cri", String::new(), fs::read_to_string(&ours)?),
            _ => ("io.containerd.cri.v1.runtime", format!("imports = [{ours:?}]\n"), String::new()),
        };
        let existing = format!(
            "[plugins.{plugin:?}.containerd.runtimes.existing]\nruntime_type = \"io.containerd.runc.v2\"\n"
        );
        fs::write(&config, format!("version = {format}\n{imports}{existing}{appended}"))?;
        let containerd = Invocation::new(paths::containerd_program(version, "containerd")?);
        let dump = containerd.arg("--config").arg(&config).args(["config", "dump"]).run()?.ok()?.text();
        ensure!(
            dump.contains("containerd.runtimes.existing]"),
            "{} has lost a runtime: {dump}",
            version.name()
        );
        let dump = dump.replace('\'', "\"");
        let lines = ["runtime_type = \"io.machinen.v1\"", "privileged_without_host_devices = true"];
        let option = ["ConfigPath = \"/etc/machinen/nopool.toml\""];
        for (section, lines) in
            [("machinen", &lines[..]), ("machinen-nopool", &lines), ("machinen-nopool.options", &option)]
        {
            let runtime = dump.split(&format!("containerd.runtimes.{section}]")).nth(1).unwrap_or_default();
            let runtime = runtime.split("containerd.runtimes.").next().unwrap_or_default();
            for line in lines {
                ensure!(
                    section_has(runtime, line),
                    "{} has no {line} for {section} from {}: {dump}",
                    version.name(),
                    ours.display()
                );
            }
        }
    }
    Ok(())
}

fn section_has(section: &str, line: &str) -> bool {
    section.lines().any(|it| it.trim() == line)
}

/// The configurations of the further handlers that the installer installs, and their RuntimeClasses.
#[test]
fn each_further_handler_has_a_valid_configuration_and_a_runtime_class() -> Result<()> {
    let deploy = paths::workspace().join("deploy");
    let classes = fs::read_to_string(deploy.join("kubernetes/runtimeclass.yaml"))?;
    let list = fs::read_to_string(deploy.join("installer/kustomization.yaml"))?;
    let mut names = Vec::new();
    for entry in fs::read_dir(deploy.join("installer/handlers"))? {
        let path = entry?.path();
        Config::parse(&fs::read_to_string(&path)?, &path)?;
        let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        ensure!(
            section_has(&list, &format!("- handlers/{name}.toml")),
            "the installer has no {name}: {list}"
        );
        ensure!(
            section_has(&classes, &format!("handler: machinen-{name}")),
            "no class for {name}: {classes}"
        );
        names.push(name);
    }
    ensure!(names == ["nopool"], "{names:?}");
    Ok(())
}
