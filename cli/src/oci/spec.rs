//! `machinen spec` and `machinen features`: what a configuration starts from, and what the runtime supports.

use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use clap::Args;
use machinen::{fs::FileError, spec::OCI_VERSION};
use oci_spec::runtime::{LinuxNamespaceType, RootBuilder, Spec};

use super::error::OciError;

/// Arguments of `machinen spec`.
#[derive(Debug, Args)]
pub(crate) struct SpecArgs {
    /// Directory that gets the file
    #[arg(long, short, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// A configuration for a caller that is not root; machinen needs root
    #[arg(long, hide = true)]
    rootless: bool,
}

/// # Errors
/// There is a config.json, or it cannot be written.
pub(super) fn run(args: &SpecArgs) -> Result<(), OciError> {
    if args.rootless {
        let reason = "machinen needs root";
        return Err(OciError::Unsupported { what: "--rootless", reason });
    }
    let path = args.bundle.join("config.json");
    let spec = example(is_unified()).map_err(OciError::io("make a configuration"))?;
    let text = serde_json::to_string_pretty(&spec).map_err(OciError::Encode)?;
    let file = OpenOptions::new().write(true).create_new(true).open(&path);
    let written = file.and_then(|mut file| writeln!(file, "{text}"));
    Ok(written.map_err(FileError::at("write", path))?)
}

/// Whether the host has cgroups of version 2 only.
fn is_unified() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// A configuration that runs `sh` on a terminal. As with runc, its cgroup namespace is the host's where cgroups have version
/// 1: callers add one of their own.
fn example(is_unified: bool) -> io::Result<Spec> {
    let mut spec = Spec::default();
    let root = RootBuilder::default().path("rootfs").readonly(true).build().map_err(io::Error::other)?;
    spec.set_version(OCI_VERSION.to_owned()).set_hostname(Some("machinen".to_owned())).set_root(Some(root));
    if let Some(process) = spec.process_mut() {
        process.set_terminal(Some(true));
        // As runc's since CVE-2022-29162: a program gets no capabilities by its file.
        if let Some(mut capabilities) = process.capabilities().clone() {
            capabilities.set_inheritable(None).set_ambient(None);
            process.set_capabilities(Some(capabilities));
        }
    }
    if let Some(linux) = spec.linux_mut()
        && !is_unified
    {
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Cgroup);
        linux.set_namespaces(Some(namespaces));
    }
    Ok(spec)
}

/// Prints the features document (runtime-spec, features.md).
///
/// # Errors
/// The document cannot be encoded.
pub(super) fn features() -> Result<(), OciError> {
    let text = serde_json::to_string_pretty(&machinen::features::document()).map_err(OciError::Encode)?;
    println!("{text}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_namespace_needs_version_2() {
        let has = |is_unified| {
            let spec = example(is_unified).unwrap();
            let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().clone()).unwrap();
            namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Cgroup)
        };
        assert!(has(true) && !has(false));
    }
}
