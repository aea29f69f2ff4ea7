//! `machinen boot`: a container from an image in a file or a directory, without any daemon.
//!
//! ```text
//!   IMAGE ──unpack──> cache ──┐
//!   image's configuration ────┼──> bundle ──> the same way as `machinen run`
//!   options ──────────────────┘               └─ --detach: a keeper holds the streams (keeper.rs)
//! ```

mod error;
mod interruption;
pub(crate) mod keeper;
pub(crate) mod spec;
pub(crate) mod user;

use std::{
    io::{IsTerminal as _, Read as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, ValueEnum};
use containerd_shim_protos::api::Mount;
use machinen::{
    config::Config,
    fs::{FileError, create_private_dirs, hex},
    pod::ContainerId,
};
use tokio::task::spawn_blocking;

use self::keeper::Kept;
pub(crate) use self::{error::BootError, interruption::Interruption};
use crate::{
    failure::Failure,
    image::{self, ImageCache, ImageRoot, ReadyImage},
    oci::{
        GlobalArgs,
        create::{Attachment, BootedRootfs, CreateArgs, CreatedContainer, create, destroy},
        run::{StayArgs, proceed},
        state::StateDir,
    },
};

/// The exit status if the container could not be started, as docker's.
const NOT_STARTED: u8 = 125;
/// The directory of the bundles, below `boot.dir`.
pub(crate) const BUNDLES: &str = "bundles";

/// How a container without a network namespace is connected with the outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OutsideChoice {
    /// By pasta(1)
    Pasta,
}

/// Arguments of `machinen boot`.
#[derive(Debug, Args)]
pub(crate) struct BootArgs {
    /// Name of the container, unique on this host; made up if not given
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Which image of a layout or an archive with several
    #[arg(long = "ref", value_name = "NAME")]
    reference: Option<String>,
    /// Most memory of the container, in bytes or with k, m or g
    #[arg(long, short, value_name = "SIZE")]
    memory: Option<String>,
    /// Most processors, such as 2 or 0.5
    #[arg(long, value_name = "NUMBER")]
    cpus: Option<f64>,
    /// Variable of the environment; without a value that of the caller; may be repeated
    #[arg(long, short, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Working directory in the container
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<String>,
    /// User, as a name or a number, and group
    #[arg(long, short, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Program instead of the image's entry point; the image's command is not used then
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Directory or file of the host that is mounted in the container; may be repeated
    #[arg(long, short, value_name = "SOURCE:DESTINATION[:ro]")]
    volume: Vec<String>,
    /// Directory of the host that the container gets a copy of, which it may change; may be repeated
    #[arg(long, value_name = "SOURCE:DESTINATION")]
    copy_mount: Vec<String>,
    /// Network namespace of the host by its path; without it the container has a loopback interface only, unless it
    /// has --network or --publish
    #[arg(long, value_name = "PATH", conflicts_with_all = ["network", "publish"])]
    netns: Option<PathBuf>,
    /// pasta: connections to the outside, by the program of that name (package passt)
    #[arg(long, value_enum)]
    network: Option<OutsideChoice>,
    /// Port of the host that leads to a port of the container, at 127.0.0.1 unless an address is given; may be repeated.
    /// Includes --network pasta
    #[arg(long, short, value_name = "[ADDRESS:]HOST:CONTAINER[/udp]")]
    publish: Vec<String>,
    /// Hostname instead of the name
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// The root file system cannot be written
    #[arg(long)]
    read_only: bool,
    /// The process gets a terminal
    #[arg(long, short)]
    tty: bool,
    /// Keep stdin open for `machinen attach`; without --detach stdin is always connected
    #[arg(long, short)]
    interactive: bool,
    /// Go away when the container runs, and print its name
    #[arg(long, short)]
    detach: bool,
    /// Delete the container when it ends; the default without --detach
    #[arg(long, conflicts_with = "keep")]
    rm: bool,
    /// Keep the container when it has ended, until `machinen delete`
    #[arg(long)]
    keep: bool,
    /// OCI image layout, archive of an image (docker save, skopeo copy), tar of a root file system, or directory
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// The command and its arguments instead of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs a container. One that cannot be started is reported with exit status 125.
pub(crate) async fn run(global: &GlobalArgs, args: BootArgs) -> ExitCode {
    match boot(global, args).await {
        Ok(code) => code,
        Err(error) => {
            global.report(&Failure::from(error));
            ExitCode::from(NOT_STARTED)
        }
    }
}

async fn boot(global: &GlobalArgs, args: BootArgs) -> Result<ExitCode, BootError> {
    let config = Config::load()?;
    let id = match &args.name {
        Some(name) => ContainerId::parse(name)?,
        None => ContainerId::parse(&made_up("boot")?)?,
    };
    // Refused before anything is unpacked.
    if global.root.join(id.as_str()).exists() {
        return Err(crate::oci::OciError::Exists { id: id.into() }.into());
    }
    let options = spec::SpecOptions::check(&args, &id)?;
    let mut interruption = Interruption::watch()?;
    let image = interruption.unless(prepare(&config, &args)).await??;
    let text = spec::spec(&id, &image, &options)?;
    let (bundle, held) = bundle((global, &config), &id, &image, &text)?;
    let boot = BootedRootfs { mount: mount(&image.root) };
    // The bundle names the image, so another process may have it now.
    drop(image);
    let create_args = CreateArgs::of_boot(id.to_string(), bundle.clone(), boot);
    let started = match args.detach {
        true => detached(global, &args, &create_args, &bundle, &mut interruption).await,
        false => attached(global, &args, &create_args, &mut interruption).await,
    };
    drop(held);
    if started.is_err() && bundle.exists() {
        // The first failure is the one to report.
        if let Err(error) = std::fs::remove_dir_all(&bundle) {
            eprintln!("machinen: cannot remove {}: {error}", bundle.display());
        }
    }
    started
}

async fn prepare(config: &Config, args: &BootArgs) -> Result<ReadyImage, BootError> {
    let (dir, path, reference) = (config.boot.dir.clone(), args.image.clone(), args.reference.clone());
    let prepared = spawn_blocking(move || {
        let cache = ImageCache::open(&dir)?;
        image::prepare(&path, reference.as_deref(), &cache, &mut |line| eprintln!("{line}"))
    });
    Ok(prepared.await.map_err(BootError::Worker)??)
}

/// Makes the bundle, locked until the returned file is closed. It is removed with the container.
///
/// # Errors
/// The file system refuses.
pub(crate) fn bundle(
    (global, config): (&GlobalArgs, &Config),
    id: &ContainerId,
    image: &ReadyImage,
    text: &[u8],
) -> Result<(PathBuf, std::fs::File), BootError> {
    let bundles = config.boot.dir.join(BUNDLES);
    create_private_dirs(&bundles).map_err(FileError::at("create the directory", &bundles))?;
    let made = tempfile::Builder::new().prefix(&format!("{id}-")).tempdir_in(&bundles);
    let made = made.map_err(FileError::at("create a directory in", &bundles))?;
    // `machinen gc` removes a bundle whose container does not exist.
    let held = std::fs::File::open(made.path()).map_err(FileError::at("open", made.path()))?;
    machinen::fs::lock(&held).map_err(FileError::at("lock", made.path()))?;
    let (rootfs, file) = (made.path().join("rootfs"), made.path().join("config.json"));
    std::fs::create_dir(&rootfs).map_err(FileError::at("create the directory", &rootfs))?;
    std::fs::write(&file, text).map_err(FileError::at("write", &file))?;
    let file = made.path().join(CONTAINER);
    let state =
        std::path::absolute(global.root.join(id.as_str())).map_err(FileError::at("find", &global.root))?;
    std::fs::write(&file, state.as_os_str().as_encoded_bytes()).map_err(FileError::at("write", &file))?;
    if let ImageRoot::Cached(cached) = &image.root {
        let file = made.path().join(IMAGE_KEY);
        std::fs::write(&file, &cached.key).map_err(FileError::at("write", &file))?;
    }
    Ok((made.keep(), held))
}

/// The file of a bundle that names the directory of its container's state.
pub(crate) const CONTAINER: &str = "container";
/// The file of a bundle that names the unpacked image that it uses.
pub(crate) const IMAGE_KEY: &str = "image";

/// An unpacked image never changes, so its disk is found by its identity. A directory of the user's is compared each time,
/// and not written to.
fn mount(root: &ImageRoot) -> Mount {
    let path = root.path().to_string_lossy();
    match root {
        ImageRoot::Cached(_) => {
            let escaped = path.replace('\\', "\\\\").replace(':', "\\:");
            Mount {
                type_: "overlay".to_owned(),
                options: vec![format!("lowerdir={escaped}")],
                ..Default::default()
            }
        }
        ImageRoot::Dir(_) => Mount {
            type_: "bind".to_owned(),
            source: path.into_owned(),
            options: vec!["rbind".to_owned(), "ro".to_owned()],
            ..Default::default()
        },
    }
}

async fn attached(
    global: &GlobalArgs,
    args: &BootArgs,
    create_args: &CreateArgs,
    interruption: &mut Interruption,
) -> Result<ExitCode, BootError> {
    let created = create_unless(global, create_args, Attachment::Foreground, interruption).await?;
    let stay = StayArgs { detach: false, keep: args.keep, no_subreaper: false };
    Ok(proceed(global, created, &stay).await?)
}

async fn detached(
    global: &GlobalArgs,
    args: &BootArgs,
    create_args: &CreateArgs,
    bundle: &Path,
    interruption: &mut Interruption,
) -> Result<ExitCode, BootError> {
    let Kept { streams, keeper } = keeper::start(&global.root, create_args, bundle, args)?;
    let created = create_unless(global, create_args, Attachment::Kept(streams), interruption).await?;
    if let Err(error) = created.monitor.start("").await {
        destroy(&global.root, &created.state).await?;
        return Err(error.into());
    }
    keeper.begin()?;
    println!("{}", created.state.id);
    Ok(ExitCode::SUCCESS)
}

/// Creates a container. If a signal arrives meanwhile, nothing of it is left.
///
/// # Errors
/// The container cannot be created, or a signal has arrived.
pub(crate) async fn create_unless(
    global: &GlobalArgs,
    args: &CreateArgs,
    attachment: Attachment<'_>,
    interruption: &mut Interruption,
) -> Result<CreatedContainer, BootError> {
    match interruption.unless(create(global, args, attachment, None)).await {
        Ok(created) => Ok(created?),
        Err(interrupted) => {
            // Whose it is, is not in doubt: the name was free, and the record names the bundle.
            if let Ok(state) = StateDir::find(&global.root, args.id())
                && state.record()?.is_none_or(|record| record.bundle == args.bundle())
            {
                destroy(&global.root, &state).await?;
            }
            Err(interrupted)
        }
    }
}

/// A name that no other container has.
///
/// # Errors
/// There are no random numbers.
pub(crate) fn made_up(prefix: &str) -> Result<String, FileError> {
    let mut bytes = [0; 6];
    let source = Path::new("/dev/urandom");
    let read = std::fs::File::open(source).and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(FileError::at("read", source))?;
    Ok(format!("{prefix}-{}", hex(&bytes)))
}

impl BootArgs {
    /// The size of the caller's terminal, for a process that gets one.
    fn terminal_size(&self) -> Option<(u16, u16)> {
        if !self.tty || !std::io::stdin().is_terminal() {
            return None;
        }
        let size = rustix::termios::tcgetwinsize(std::io::stdin()).ok()?;
        Some((size.ws_col, size.ws_row)).filter(|(columns, rows)| *columns > 0 && *rows > 0)
    }
}
