//! `machinen image build`: an image from a base and steps, without any daemon.
//!
//! ```text
//!   base ──unpack──> cache ──> container in a VM, whose init never runs (builder.rs)
//!   steps: RUN   a process that is added to it
//!          COPY  through the view of its files (copying.rs)
//!   end:   what it has written ──> layer ──> image layout: the base's layers and this one (layout.rs)
//! ```
//! The host mounts nothing that the guest has written: the changes leave the VM in the archive of each container's end.

mod builder;
mod containerfile;
mod copying;
mod error;
mod layout;
mod record;

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::{Duration, SystemTime},
};

use clap::{Args, Subcommand, ValueEnum};
use machinen::{config::Config, fs::FileError, pod::ContainerId};
use oci_spec::image::{HistoryBuilder, ImageConfiguration};
use tokio::task::spawn_blocking;

use self::{
    builder::{Builder, BuilderOptions},
    containerfile::{Instruction, Step, Word},
    layout::{Cancelled, LayoutWriter},
    record::HeldRecord,
};
pub(crate) use self::{error::BuildError, record::left};
use crate::{
    boot::{self, Interruption},
    image::{BaseImage, BaseLayers, ImageCache, Packed, pack, prepare_base},
    oci::GlobalArgs,
};

/// Most bytes of a Containerfile or a script; a script is one argument of the shell, for which Linux has a bound.
const MAX_FILE: u64 = 100 << 10;
/// The names of a file with steps, in the order in which they are looked for.
const NAMES: [&str; 2] = ["Containerfile", "Dockerfile"];

/// Arguments of `machinen image`.
#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    verb: ImageVerb,
}

#[derive(Debug, Subcommand)]
enum ImageVerb {
    /// Build an image from another one and steps, which run in a VM.
    #[command(
        long_about = "Build an image from another one and steps, which run in a VM, without any daemon. The steps are those \
        of a Containerfile (FROM with a path, RUN, COPY, ENV, WORKDIR, USER, CMD and ENTRYPOINT; others are refused), or a \
        script for /bin/sh. The result is an OCI image layout, or an archive of one if PATH ends with .tar: the layers of \
        the base, and one with all changes; or with --format rootfs a tar of all files. Nothing is left of a build that fails or is interrupted."
    )]
    Build(Box<BuildArgs>),
}

/// How the steps are connected with the outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OutsideChoice {
    /// By pasta(1)
    Pasta,
}

/// What a build writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OutputFormat {
    /// An OCI image layout, or an archive of one if the path ends with .tar
    Oci,
    /// A tar of the root file system
    Rootfs,
}

/// What is to be written after the steps.
struct Output {
    format: OutputFormat,
    tag: Option<String>,
    layers: BaseLayers,
    /// The unpacked base. The bundle of the container keeps it.
    base: PathBuf,
}

/// Arguments of `machinen image build`.
#[derive(Debug, Args)]
struct BuildArgs {
    /// File with the steps [default: Containerfile or Dockerfile in CONTEXT]
    #[arg(long, short, value_name = "FILE", conflicts_with = "base")]
    file: Option<PathBuf>,
    /// Image to build on, instead of a Containerfile: what `machinen boot` takes
    #[arg(long, value_name = "IMAGE")]
    base: Option<PathBuf>,
    /// Which image of a base with several
    #[arg(long = "ref", value_name = "NAME")]
    reference: Option<String>,
    /// Script that is run by /bin/sh -e in the base
    #[arg(long, value_name = "FILE", requires = "base")]
    script: Option<PathBuf>,
    /// Variable of the new image, after those of the steps; may be repeated
    #[arg(long, short, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Working directory of the new image
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<String>,
    /// Command of the new image, as a list in JSON or for the shell
    #[arg(long, value_name = "COMMAND")]
    cmd: Option<String>,
    /// Entry point of the new image, as a list in JSON or for the shell
    #[arg(long, value_name = "COMMAND")]
    entrypoint: Option<String>,
    /// What is written: an image layout, or a tar of the root file system, without command and environment
    #[arg(long, value_enum, default_value_t = OutputFormat::Oci)]
    format: OutputFormat,
    /// Path of the new image, which must not exist
    #[arg(long, short, value_name = "PATH")]
    output: PathBuf,
    /// Name of the new image in its layout
    #[arg(long, short, value_name = "NAME")]
    tag: Option<String>,
    /// How long the steps may take in all
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "10min")]
    timeout: Duration,
    /// Most bytes that the steps can write [default: as for other containers]
    #[arg(long, value_name = "SIZE", value_parser = crate::rootdisk::size)]
    scratch: Option<u64>,
    /// Most memory of the steps, in bytes or with k, m or g
    #[arg(long, short, value_name = "SIZE")]
    memory: Option<String>,
    /// Connections to the outside: by pasta (package passt), or none without this option
    #[arg(long, value_enum)]
    network: Option<OutsideChoice>,
    /// Directory with what COPY copies
    #[arg(value_name = "CONTEXT", default_value = ".")]
    context: PathBuf,
}

/// Runs a verb for images.
///
/// # Errors
/// The image cannot be built; nothing is left of it.
pub(crate) async fn run(global: &GlobalArgs, args: &ImageArgs) -> Result<(), BuildError> {
    let ImageVerb::Build(args) = &args.verb;
    build(global, args).await
}

async fn build(global: &GlobalArgs, args: &BuildArgs) -> Result<(), BuildError> {
    let config = Config::load()?;
    let steps = steps(args)?;
    if args.format == OutputFormat::Rootfs {
        lost_steps(&steps)
            .for_each(|step| eprintln!("machinen: a tar of a root file system does not keep {step}"));
    }
    if args.output.symlink_metadata().is_ok() {
        return Err(BuildError::Exists { path: args.output.clone() });
    }
    let options = BuilderOptions::check(args)?;
    let mut interruption = Interruption::watch()?;
    let base = interruption.unless(base(&config, args, &steps)).await??;
    let cancelled = Cancelled::default();
    let id = ContainerId::parse(&boot::made_up("build")?)?;
    let held = HeldRecord::write(&config.boot.dir, id.as_str(), &global.root, &args.output)?;
    // Before the steps, so that a directory that cannot be written is reported at once.
    let layout = LayoutWriter::begin(&args.output, &held.record.unfinished, &cancelled)?;
    let BaseImage { ready, configuration, layers } = base;
    let (format, tag, base) = (args.format, args.tag.clone(), ready.root.path().to_owned());
    let output = Output { format, tag, layers, base };
    let builder = Builder::start((global, &config), id, ready, &options, &mut interruption).await?;
    let built = async {
        let (builder, new) = (&builder, configuration.config().clone().unwrap_or_default());
        let run = tokio::time::timeout(args.timeout, builder.run(new, &steps, &args.context));
        let timeout = |_| BuildError::Timeout { limit: args.timeout };
        let new = interruption.unless(run).await?.map_err(timeout)??;
        let changes = interruption.unless(builder.end()).await??;
        let configuration = completed(configuration, new, &steps);
        eprintln!("writing {}", args.output.display());
        let written = spawn_blocking(move || write(layout, &output, &changes, configuration));
        let mut written = std::pin::pin!(written);
        match interruption.unless(&mut written).await {
            Ok(written) => written.map_err(BuildError::Worker)?,
            Err(interrupted) => {
                cancelled.store(true, Ordering::Relaxed);
                // What it has written is removed when it ends.
                let _ = written.await;
                Err(interrupted.into())
            }
        }
    };
    let built = built.await;
    let removed = builder.remove(global).await;
    built?;
    removed?;
    println!("{}", args.output.display());
    Ok(())
}

/// The steps whose effect is not in the files.
fn lost_steps(steps: &[Step]) -> impl Iterator<Item = &str> {
    let lost = |step: &&Step| {
        use Instruction::{Cmd, Entrypoint, Env, User, Workdir};
        matches!(step.instruction, Cmd(_) | Entrypoint(_) | Env(_) | User(_) | Workdir(_))
    };
    steps.iter().filter(lost).map(|step| step.text.as_str())
}

/// The base and its layers, and the changes as one more.
fn write(
    mut layout: LayoutWriter,
    output: &Output,
    changes: &Path,
    configuration: ImageConfiguration,
) -> Result<(), BuildError> {
    if output.format == OutputFormat::Rootfs {
        return layout.finish_rootfs(changes, &output.base);
    }
    output
        .layers
        .for_each(|layer| layout.copy_layer(&layer.name, layer.content, layer.digest, layer.diff))?;
    layout.write_layer(|archive| Ok(pack(archive, changes, Packed::Changes)?))?;
    layout.finish(configuration, output.tag.as_deref())
}

async fn base(config: &Config, args: &BuildArgs, steps: &[Step]) -> Result<BaseImage, BuildError> {
    let path = match (&args.base, steps.first().map(|step| &step.instruction)) {
        (Some(base), _) => base.clone(),
        // As the other paths in the file.
        (None, Some(Instruction::From(image))) => args.context.join(image),
        (None, _) => return Err(BuildError::NoSteps),
    };
    let (dir, reference) = (config.boot.dir.clone(), args.reference.clone());
    let prepared = spawn_blocking(move || {
        let cache = ImageCache::open(&dir)?;
        prepare_base(&path, reference.as_deref(), &cache, &mut |line| eprintln!("{line}"))
    });
    Ok(prepared.await.map_err(BuildError::Worker)??)
}

/// The steps of the file or the script, and those of the options.
fn steps(args: &BuildArgs) -> Result<Vec<Step>, BuildError> {
    let mut steps = match &args.base {
        Some(_) => script(args)?.into_iter().collect(),
        None => containerfile::parse(&read(&file(args)?)?)?,
    };
    for text in &args.env {
        let takes = "NAME=VALUE";
        let odd = || BuildError::Option { option: "--env", text: text.clone(), takes };
        let (name, value) = text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(odd)?;
        let instruction = Instruction::Env(vec![(name.to_owned(), Word::literal(value))]);
        steps.push(Step { line: 0, text: format!("--env {name}"), instruction });
    }
    if let Some(dir) = &args.workdir {
        if !dir.starts_with('/') {
            let takes = "an absolute path";
            return Err(BuildError::Option { option: "--workdir", text: dir.clone(), takes });
        }
        let instruction = Instruction::Workdir(Word::literal(dir));
        steps.push(Step { line: 0, text: format!("--workdir {dir}"), instruction });
    }
    // An entry point takes the command of the base away, so it comes first.
    for (option, name, text) in
        [("--entrypoint", "ENTRYPOINT", &args.entrypoint), ("--cmd", "CMD", &args.cmd)]
    {
        let Some(text) = text else { continue };
        let takes = "a command of the shell, or a list of texts in JSON";
        let odd = |_| BuildError::Option { option, text: text.clone(), takes };
        steps.push(containerfile::step(0, &format!("{name} {text}")).map_err(odd)?);
    }
    Ok(steps)
}

fn script(args: &BuildArgs) -> Result<Option<Step>, BuildError> {
    let Some(path) = &args.script else { return Ok(None) };
    let command = ["/bin/sh", "-e", "-c", &read(path)?].map(str::to_owned).to_vec();
    let text = format!("--script {}", path.display());
    Ok(Some(Step { line: 0, text, instruction: Instruction::Run(command) }))
}

fn file(args: &BuildArgs) -> Result<PathBuf, BuildError> {
    if let Some(file) = &args.file {
        return Ok(file.clone());
    }
    let found = NAMES.iter().map(|name| args.context.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| BuildError::NoFile { context: args.context.clone() })
}

fn read(path: &Path) -> Result<String, BuildError> {
    let failed = || FileError::at("read", path);
    let mut text = String::new();
    let file = File::open(path).map_err(FileError::at("open", path))?;
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(failed())?;
    match text.len() as u64 > MAX_FILE {
        true => Err(BuildError::LongFile { path: path.to_owned(), most: MAX_FILE }),
        false => Ok(text),
    }
}

/// The configuration of the new image, but for the digests of its layers.
fn completed(
    mut configuration: ImageConfiguration,
    new: oci_spec::image::Config,
    steps: &[Step],
) -> ImageConfiguration {
    let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    let steps: Vec<&str> = steps.iter().map(|step| step.text.as_str()).collect();
    let history = HistoryBuilder::default().created(now.clone()).created_by(steps.join("\n"));
    let history = history.build().expect("every field has a default");
    configuration.history_mut().get_or_insert_default().push(history);
    configuration.set_config(Some(new));
    configuration.set_created(Some(now));
    configuration
}
