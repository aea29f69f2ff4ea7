//! The container of a build. Its init waits in its VM and never runs; each RUN is a process that is added to it.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use containerd_shim_protos::api::{ExecProcessRequest, Mount};
use machinen::{config::Config, fs::FileError, pod::ContainerId};
use oci_spec::image;
use protobuf::{MessageField, well_known_types::any::Any};
use serde_json::Value;
use tokio::task::spawn_blocking;

use super::{
    BuildArgs,
    containerfile::{Instruction, Step, Word},
    copying::{Copied, copy},
    error::BuildError,
};
use crate::{
    boot::{
        self, Interruption,
        spec::{self, SpecOptions},
        user::{self, ProcessUser},
    },
    copy::{make_dirs, open_root, read_small},
    find::{FindError, PodClient, PodSocket},
    image::{ImageRoot, ReadyImage},
    oci::{
        GlobalArgs, OciError,
        create::{Attachment, BootedRootfs, CreateArgs, CreatedContainer, destroy},
        exec::PROCESS_TYPE,
        foreground::follow_quietly,
        stand_in::{StandIn, StandInStreams},
    },
};

/// Where the changes of the container go, in its bundle.
const LAYER: &str = "layer";
/// The disk of the container, which is next to its changes as long as these are not complete.
const DISK: &str = "machinen-writable.ext4";
/// What the init would run. The engine looks for the program.
const SHELL: &str = "/bin/sh";
/// For an image without a shell, into which files are only copied. It is in every container.
const ALWAYS_THERE: &str = "/proc/self/exe";

/// The options of the container of a build.
pub(super) struct BuilderOptions {
    memory: Option<String>,
    scratch_mib: Option<u64>,
    outside: bool,
}

impl BuilderOptions {
    /// # Errors
    /// An option is not understood.
    pub(super) fn check(args: &BuildArgs) -> Result<Self, BuildError> {
        crate::oci::update::bytes("--memory", args.memory.as_deref())?;
        let scratch_mib = args.scratch.map(|bytes| bytes.div_ceil(1 << 20));
        Ok(Self { memory: args.memory.clone(), scratch_mib, outside: args.network.is_some() })
    }
}

/// The container of a build.
pub(super) struct Builder {
    created: CreatedContainer,
    /// The container's root directory.
    root: Arc<OwnedFd>,
    changes: PathBuf,
    disk: PathBuf,
}

impl Builder {
    /// Creates the container `id`.
    ///
    /// # Errors
    /// It cannot be created, or a signal has arrived; nothing of it is left.
    pub(super) async fn start(
        (global, config): (&GlobalArgs, &Config),
        id: ContainerId,
        base: ReadyImage,
        options: &BuilderOptions,
        interruption: &mut Interruption,
    ) -> Result<Self, BuildError> {
        let BuilderOptions { memory, scratch_mib, outside } = options;
        let has_shell = base.root.path().join("bin/sh").symlink_metadata().is_ok();
        let init = if has_shell { SHELL } else { ALWAYS_THERE };
        let options = SpecOptions::of_builder(&id, init, memory.as_deref(), *scratch_mib, *outside)?;
        let text = spec::spec(&id, &base, &options)?;
        let (bundle, held) = boot::bundle((global, config), &id, &base, &text)?;
        let started = async {
            let changes = bundle.join(LAYER).join("upper");
            for dir in [&changes, &bundle.join(LAYER).join("work")] {
                fs::create_dir_all(dir).map_err(FileError::at("create the directory", dir))?;
            }
            copy_attributes(&base.root, &changes)?;
            let boot = BootedRootfs { mount: mount(&base.root, &changes) };
            // The bundle names the image, so another process may have it now.
            drop(base);
            let args = CreateArgs::of_boot(id.to_string(), bundle.clone(), boot);
            let created = boot::create_unless(global, &args, Attachment::Detached, interruption).await?;
            let disk = bundle.join(LAYER).join(DISK);
            match root_of(&created).await {
                Ok(root) => Ok(Self { root: Arc::new(root), created, changes, disk }),
                Err(error) => {
                    destroy(&global.root, &created.state).await?;
                    Err(error)
                }
            }
        };
        let started = started.await;
        drop(held);
        if started.is_err() && bundle.exists() {
            // The first failure is the one to report.
            if let Err(error) = fs::remove_dir_all(&bundle) {
                eprintln!("machinen: cannot remove {}: {error}", bundle.display());
            }
        }
        started
    }

    /// Does the steps, and returns the configuration of the new image.
    ///
    /// # Errors
    /// A step fails.
    pub(super) async fn run(
        &self,
        base: image::Config,
        steps: &[Step],
        context: &Path,
    ) -> Result<image::Config, BuildError> {
        let mut image = NewImage::of(base);
        for (at, step) in steps.iter().enumerate() {
            eprintln!("step {} of {}: {}", at + 1, steps.len(), step.text);
            let done = self.step(&mut image, step, at, context).await;
            done.map_err(|error| match error {
                error @ BuildError::Failed { .. } => error,
                error => {
                    let (line, step) = (step.line, step.text.clone());
                    BuildError::Step { line, step, source: Box::new(error) }
                }
            })?;
        }
        Ok(image.config)
    }

    async fn step(
        &self,
        image: &mut NewImage,
        step: &Step,
        at: usize,
        context: &Path,
    ) -> Result<(), BuildError> {
        let expand = |word: &Word| word.expand(image.config.env().as_deref().unwrap_or_default());
        match &step.instruction {
            Instruction::From(_) => {}
            Instruction::Run(command) => {
                let status = self.execute(image, command, at).await?;
                if status != 0 {
                    return Err(BuildError::Failed { line: step.line, step: step.text.clone(), status });
                }
            }
            Instruction::Copy { sources, destination } => {
                let copied = Copied {
                    context: context.to_owned(),
                    sources: sources.iter().map(expand).collect(),
                    destination: image.path(&expand(destination)),
                    workdir: image.workdir(),
                };
                let root = Arc::clone(&self.root);
                let left_out = spawn_blocking(move || copy(&root, &copied));
                for name in left_out.await.map_err(BuildError::Worker)?? {
                    eprintln!("machinen: left out {name}");
                }
            }
            Instruction::Workdir(dir) => {
                let dir = image.path(&expand(dir));
                let (root, made) = (Arc::clone(&self.root), dir.clone());
                spawn_blocking(move || make_dirs(&root, Path::new(&made)))
                    .await
                    .map_err(BuildError::Worker)??;
                image.config.set_working_dir(Some(dir));
            }
            Instruction::User(name) => {
                let name = expand(name);
                image.config.set_user(Some(name));
                // Refused where it stands.
                self.user(image).await?;
            }
            _ => image.note(&step.instruction),
        }
        Ok(())
    }

    /// The user that the image names so far, by the container's own files.
    async fn user(&self, image: &NewImage) -> Result<ProcessUser, BuildError> {
        let (root, name) = (Arc::clone(&self.root), image.config.user().clone().unwrap_or_default());
        let found = spawn_blocking(move || {
            let file = |file: &'static str| {
                let text = read_small(&root, Path::new(file));
                let text = text.map_err(|source| BuildError::UserFile { file, source: Box::new(source) })?;
                Ok::<_, BuildError>(String::from_utf8_lossy(&text.unwrap_or_default()).into_owned())
            };
            Ok(user::read(&name, &file("/etc/passwd")?, &file("/etc/group")?)?)
        });
        found.await.map_err(BuildError::Worker)?
    }

    /// Runs a process in the container to its end; returns its exit status. Its output goes to stderr.
    async fn execute(&self, image: &NewImage, command: &[String], at: usize) -> Result<u32, BuildError> {
        let CreatedContainer { state, monitor, .. } = &self.created;
        let user = self.user(image).await?;
        let process = spec::added_process(&image.config, &user, command, &state.id);
        let record = state.record()?.ok_or_else(|| OciError::NoContainer { id: state.id.to_string() })?;
        let exec = format!("build-{at}");
        let again = || -> io::Result<OwnedFd> { io::stderr().as_fd().try_clone_to_owned() };
        let again = || again().map_err(OciError::io("duplicate stderr"));
        let streams = StandInStreams::Pipes(None, again()?, again()?);
        let stand_in = StandIn::start(&state.id, &record.pod, &exec, streams)?;
        monitor.exec(request(&exec, &stand_in, &process)?).await?;
        let start = async || {
            let started = monitor.start(&exec).await;
            if started.is_err() {
                monitor.delete(&exec).await?;
            }
            stand_in.go(started?)
        };
        Ok(follow_quietly(monitor, &exec, start).await?)
    }

    /// Ends the container, and returns the directory with its changes.
    ///
    /// # Errors
    /// It does not end, or its changes are not complete.
    pub(super) async fn end(&self) -> Result<PathBuf, BuildError> {
        let monitor = &self.created.monitor;
        monitor.kill("", libc::SIGKILL.cast_unsigned(), false).await?;
        monitor.wait("").await?;
        monitor.delete("").await?;
        // The disk is removed when everything that is on it was exported.
        match self.disk.exists() {
            true => Err(BuildError::NotExported),
            false => Ok(self.changes.clone()),
        }
    }

    /// Removes the container with its bundle, in any state.
    ///
    /// # Errors
    /// A part of it cannot be removed.
    pub(super) async fn remove(self, global: &GlobalArgs) -> Result<(), OciError> {
        drop(self.root);
        destroy(&global.root, &self.created.state).await
    }
}

fn request(exec: &str, stand_in: &StandIn, process: &Value) -> Result<ExecProcessRequest, OciError> {
    Ok(ExecProcessRequest {
        exec_id: exec.to_owned(),
        stdin: stand_in.stream(0),
        stdout: stand_in.stream(1),
        stderr: stand_in.stream(2),
        spec: MessageField::some(Any {
            type_url: PROCESS_TYPE.to_owned(),
            value: serde_json::to_vec(process).map_err(OciError::Encode)?,
            ..Default::default()
        }),
        ..Default::default()
    })
}

/// The configuration of the new image so far.
struct NewImage {
    config: image::Config,
    /// CMD has come, so an entry point does not take it away.
    has_cmd: bool,
}

impl NewImage {
    /// A base without a search path gets the one that its containers have, since steps extend it by `$PATH`.
    fn of(mut config: image::Config) -> Self {
        let mut env = config.env().clone().unwrap_or_default();
        if !env.iter().any(|variable| variable.starts_with("PATH=")) {
            env.push(spec::PATH.to_owned());
            config.set_env(Some(env));
        }
        Self { config, has_cmd: false }
    }

    fn workdir(&self) -> String {
        let dir = self.config.working_dir().clone().filter(|dir| !dir.is_empty());
        dir.unwrap_or_else(|| "/".to_owned())
    }

    /// An absolute path in the container.
    fn path(&self, path: &str) -> String {
        match path.starts_with('/') {
            true => path.to_owned(),
            false => format!("{}/{path}", self.workdir().trim_end_matches('/')),
        }
    }

    /// The instructions that change nothing but the configuration.
    fn note(&mut self, instruction: &Instruction) {
        match instruction {
            Instruction::Env(variables) => {
                let mut env = self.config.env().clone().unwrap_or_default();
                // All values are those from before the instruction.
                let values: Vec<_> =
                    variables.iter().map(|(name, value)| (name, value.expand(&env))).collect();
                for (name, value) in values {
                    env.retain(|known| known.split_once('=').is_none_or(|(known, _)| known != name));
                    env.push(format!("{name}={value}"));
                }
                self.config.set_env(Some(env));
            }
            Instruction::Cmd(command) => {
                self.has_cmd = true;
                self.config.set_cmd(Some(command.clone()));
            }
            Instruction::Entrypoint(command) => {
                self.config.set_entrypoint(Some(command.clone()));
                if !self.has_cmd {
                    // That of the base is for the base's entry point.
                    self.config.set_cmd(None);
                }
            }
            _ => {}
        }
    }
}

/// The root directory of the container, as the process that stands for it has it.
async fn root_of(created: &CreatedContainer) -> Result<OwnedFd, BuildError> {
    let CreatedContainer { state, .. } = created;
    let missing = || OciError::NoContainer { id: state.id.to_string() };
    let record = state.record()?.ok_or_else(missing)?;
    let pod = PodClient::connect(&PodSocket(record.pod.socket()))?.describe().await?;
    let known = pod.containers.iter().find(|known| *known.id == *state.id.as_str());
    let pid = known.map(|known| known.pid).filter(|pid| *pid > 0);
    let pid = pid.ok_or_else(|| FindError::NoContainer { name: state.id.to_string() })?;
    Ok(open_root(pid)?)
}

/// An overlay whose upper directory receives what the container has written.
fn mount(root: &ImageRoot, changes: &Path) -> Mount {
    let escaped = |path: &Path| path.to_string_lossy().replace('\\', "\\\\").replace(':', "\\:");
    let work = changes.with_file_name("work");
    Mount {
        type_: "overlay".to_owned(),
        options: vec![
            format!("lowerdir={}", escaped(root.path())),
            format!("upperdir={}", escaped(changes)),
            format!("workdir={}", escaped(&work)),
        ],
        ..Default::default()
    }
}

/// The root of an overlay has the attributes of the upper directory.
fn copy_attributes(root: &ImageRoot, changes: &Path) -> Result<(), FileError> {
    use std::os::unix::fs::{MetadataExt as _, chown};
    let opened = File::open(root.path()).and_then(|root| root.metadata());
    let status = opened.map_err(FileError::at("look up", root.path()))?;
    let failed = || FileError::at("set the attributes of", changes);
    chown(changes, Some(status.uid()), Some(status.gid())).map_err(failed())?;
    fs::set_permissions(changes, status.permissions()).map_err(failed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::containerfile::step;

    #[test]
    fn the_configuration_follows_the_steps() {
        let base = image::ConfigBuilder::default()
            .env(vec!["PATH=/bin".to_owned()])
            .cmd(vec!["base".to_owned()])
            .working_dir("/w".to_owned())
            .build()
            .unwrap();
        let bare = NewImage::of(image::Config::default());
        assert!(bare.config.env().clone().unwrap()[0].starts_with("PATH=/usr/local/sbin:"));
        let mut image = NewImage::of(base);
        let mut note = |text: &str| image.note(&step(1, text).unwrap().instruction);
        note("ENV PATH=/opt:$PATH A=1");
        note("ENV A=2 B=$A");
        note("ENTRYPOINT [\"/e\"]");
        let config = image.config.clone();
        assert_eq!(config.env().clone().unwrap(), ["PATH=/opt:/bin", "A=2", "B=1"]);
        assert_eq!((config.cmd().clone(), config.entrypoint().clone()), (None, Some(vec!["/e".to_owned()])));
        image.note(&step(1, "CMD [\"c\"]").unwrap().instruction);
        image.note(&step(1, "ENTRYPOINT [\"/f\"]").unwrap().instruction);
        assert_eq!(image.config.cmd().clone(), Some(vec!["c".to_owned()]));
        assert_eq!((image.path("a"), image.path("/a")), ("/w/a".to_owned(), "/a".to_owned()));
        image.config.set_working_dir(None);
        assert_eq!(image.path("a"), "/a");
    }
}
