//! The files for administrators (`deploy/`), read by the programs that they are for.

use std::fs;

use anyhow::{Result, ensure};
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
        let runtime = dump.split("containerd.runtimes.machinen]").nth(1).unwrap_or_default();
        let runtime = runtime.replace('\'', "\"");
        for line in ["runtime_type = \"io.machinen.v1\"", "privileged_without_host_devices = true"] {
            ensure!(
                runtime.contains(line),
                "{} has no {line} from {}: {dump}",
                version.name(),
                ours.display()
            );
        }
    }
    Ok(())
}
