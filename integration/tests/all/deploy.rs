//! The files for administrators (`deploy/`), read by the programs that they are for.

use std::fs;

use anyhow::{Result, ensure};
use machinen_integration::{
    paths::{self, Version},
    process::Invocation,
};

/// Each version of containerd knows the runtime when its configuration imports ours.
#[test]
fn containerd_takes_the_configuration() -> Result<()> {
    for (version, format) in [(Version::V1_6, 2), (Version::V1_7, 2), (Version::V2_1, 2), (Version::V2_1, 3)]
    {
        let ours = paths::workspace().join(format!("deploy/containerd/config-v{format}.toml"));
        let dir = tempfile::tempdir()?;
        let config = dir.path().join("config.toml");
        fs::write(&config, format!("version = {format}\nimports = [{ours:?}]\n"))?;
        let containerd = Invocation::new(paths::containerd_program(version, "containerd")?);
        let dump = containerd.arg("--config").arg(&config).args(["config", "dump"]).run()?.ok()?.text();
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
