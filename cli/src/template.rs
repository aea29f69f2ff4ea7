//! `machinen template`: manages the saved VMs.

use std::time::{Duration, UNIX_EPOCH};

use clap::{Args, Subcommand};
use machinen::{
    assets::{Assets, MissingAsset},
    config::Config,
    container_disk::ContainerDiskError,
    error::{ErrorKind, HasKind},
    pod::{self, PodError},
    pool,
    template::{self, ListedTemplate, TemplateError, TemplateStore},
};
use serde_json::{Value, json};

use super::{
    output::{Align, TextTable, VerbOutput},
    prefix::{self, PrefixError},
    text::{ago, human},
};

/// Arguments of `machinen template`.
#[derive(Debug, Args)]
pub(crate) struct TemplateArgs {
    /// Print JSON
    #[arg(long, global = true)]
    pub(super) json: bool,
    #[command(subcommand)]
    command: TemplateCommand,
}

#[derive(Debug, Subcommand)]
enum TemplateCommand {
    /// Build the template that containers without annotations and limits start from, unless it exists
    #[command(
        long_about = "Build the template that containers without annotations and limits start from, unless it \
        exists. Options stand for the annotations of the same name, to build it for containers that have them."
    )]
    Build {
        /// Memory of the VM, MiB
        #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(128..))]
        memory_ceiling: Option<u32>,
        /// Virtual CPUs
        #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=64))]
        vcpus: Option<u32>,
        /// containerd's namespace of the containers, where each has templates of its own (template.per_namespace)
        #[arg(long, value_name = "NAME", default_value = "default")]
        namespace: String,
    },
    /// List the templates, the most recently used first
    Ls,
    /// Read templates and compare all that is in them with what was built. The exit status is 1 if one has
    /// changed
    Verify {
        /// Keys or their first digits; all templates if none is given
        #[arg(value_name = "KEY")]
        keys: Vec<String>,
    },
    /// Remove templates; VMs that were cloned from them keep running
    Rm {
        /// Keys or their first digits
        #[arg(value_name = "KEY", required_unless_present = "all")]
        keys: Vec<String>,
        /// All of them
        #[arg(long, conflicts_with = "keys")]
        all: bool,
    },
}

/// Why the command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TemplateCliError {
    #[error(transparent)]
    Key(#[from] PrefixError),
    #[error(transparent)]
    Asset(#[from] MissingAsset),
    #[error(transparent)]
    Spec(#[from] PodError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(transparent)]
    Disk(#[from] ContainerDiskError),
}

impl HasKind for TemplateCliError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Key(error) => error.kind(),
            Self::Asset(error) => error.kind(),
            Self::Spec(error) => error.kind(),
            Self::Template(error) => error.kind(),
            Self::Disk(error) => error.kind(),
        }
    }
}

/// Runs one of the commands; prints progress on stderr.
///
/// # Errors
/// As the functions of [`TemplateStore`], or a key does not name exactly one template.
pub(crate) fn run(args: &TemplateArgs, mut config: Config) -> Result<VerbOutput, TemplateCliError> {
    let templates = TemplateStore::at(&config.template.dir);
    match &args.command {
        TemplateCommand::Build { memory_ceiling, vcpus, namespace } => {
            config.vm.memory_mib = memory_ceiling.unwrap_or(config.vm.memory_mib);
            config.vm.vcpus = vcpus.unwrap_or(config.vm.vcpus);
            let spec = pod::default_vm_spec(&config, &Assets::find(&config.assets.dir)?, namespace)?;
            let mut progress = |line| eprintln!("{line}");
            let disks = pool::warm_up::disks(&config)?;
            let budget = config.template.budget_mib;
            let built = template::build(&templates, &spec, budget, Some(disks), &mut progress)?;
            let key = built.manifest.shape.key();
            Ok(VerbOutput::lines([&key], json!({ "key": key, "allocated": built.manifest.allocated })))
        }
        TemplateCommand::Ls => {
            let listed = templates.list()?;
            Ok(VerbOutput::new(table(&listed), listed.iter().map(listed_json).collect::<Value>()))
        }
        TemplateCommand::Verify { keys } => verify(&templates, keys),
        TemplateCommand::Rm { keys, all } => {
            let keys = if *all { templates.remove_all()? } else { remove(&templates, keys)? };
            Ok(VerbOutput::lines(&keys, keys.as_slice()))
        }
    }
}

fn verify(templates: &TemplateStore, keys: &[String]) -> Result<VerbOutput, TemplateCliError> {
    let (mut lines, mut values, mut ok) = (Vec::new(), Vec::new(), true);
    for listed in chosen(templates.list()?, keys)? {
        let same = templates.verify(&listed)?;
        ok &= same;
        let state = if same { "ok" } else { "changed" };
        lines.push(format!("{} {state}", listed.key));
        values.push(json!({ "key": listed.key, "state": state }));
    }
    Ok(VerbOutput { ok, ..VerbOutput::lines(lines, values) })
}

/// Removes the templates that the keys name.
fn remove(templates: &TemplateStore, keys: &[String]) -> Result<Vec<String>, TemplateCliError> {
    let keys: Vec<_> = chosen(templates.list()?, keys)?.into_iter().map(|listed| listed.key).collect();
    for key in &keys {
        templates.remove(key)?;
    }
    Ok(keys)
}

/// The templates that the keys name; all if there are no keys.
fn chosen(listed: Vec<ListedTemplate>, keys: &[String]) -> Result<Vec<ListedTemplate>, TemplateCliError> {
    for key in keys {
        prefix::find(&listed, |template| template.key.clone(), key, "template")?;
    }
    let named =
        |template: &ListedTemplate| keys.is_empty() || keys.iter().any(|key| template.key.starts_with(key));
    Ok(listed.into_iter().filter(named).collect())
}

fn table(listed: &[ListedTemplate]) -> String {
    let mut table = TextTable::new([
        ("KEY", Align::Left),
        ("MEMORY", Align::Right),
        ("VCPUS", Align::Right),
        ("TAKES", Align::Right),
        ("CREATED", Align::Left),
        ("USED", Align::Left),
        ("STATE", Align::Left),
    ]);
    for template in listed {
        let ListedTemplate { key, manifest, used, .. } = template;
        table.row([
            key.clone(),
            format!("{}MiB", manifest.memory_mib),
            manifest.vcpus.to_string(),
            human(manifest.allocated + manifest.original_memory),
            ago(Some(UNIX_EPOCH + Duration::from_secs(manifest.created))),
            ago(*used),
            state(template).to_owned(),
        ]);
    }
    table.to_string()
}

fn state(template: &ListedTemplate) -> &'static str {
    match (template.alive, template.manifest.shape.is_current()) {
        (false, _) => "gone",
        (true, false) => "outdated",
        (true, true) => "ready",
    }
}

fn listed_json(listed: &ListedTemplate) -> Value {
    let seconds =
        listed.used.and_then(|time| time.duration_since(UNIX_EPOCH).ok()).map(|time| time.as_secs());
    json!({
        "key": listed.key,
        "memoryMib": listed.manifest.memory_mib,
        "vcpus": listed.manifest.vcpus,
        "allocated": listed.manifest.allocated,
        "qemu": listed.manifest.original_memory,
        "created": listed.manifest.created,
        "used": seconds,
        "state": state(listed),
        "holder": listed.manifest.pid,
        "shape": listed.manifest.shape,
    })
}
