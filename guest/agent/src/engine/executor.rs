//! The user's command, which is looked up before the container is created and executed when it is started.
//!
//! libcontainer's own executor loses the order of the environment, takes seconds for a large one, leaves
//! SIGPIPE ignored, and reports errors in other words than other runtimes.

use std::{
    collections::HashMap,
    convert::Infallible,
    ffi::CString,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::{
    errno::Errno,
    sys::stat::makedev,
    unistd::{AccessFlags, dup2_stderr, dup2_stdin, dup2_stdout, eaccess, execve},
};
use oci_spec::runtime::{Capability, Process, Spec};

use super::report::{Refusal, Report, Reporter};
use crate::sys;

const NULL_DEVICE: u64 = makedev(1, 3);

#[derive(Debug, Clone)]
pub(super) struct CommandExecutor {
    reporter: Reporter,
}

/// Why a command cannot be executed, in runc's words.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum CommandError {
    #[error("exec: {name:?}: executable file not found in $PATH")]
    NotInPath { name: String },
    #[error("exec: {name:?}: stat {name}: {}", .errno.desc().to_lowercase())]
    Stat { name: String, errno: Errno },
    #[error("exec: {name:?}: {}", .errno.desc().to_lowercase())]
    NotExecutable { name: String, errno: Errno },
    #[error("exec {name}: {}", .errno.desc().to_lowercase())]
    Exec { name: String, errno: Errno },
    #[error("the process has no arguments")]
    NoArgs,
    #[error("a NUL byte in an argument or environment variable")]
    Nul,
}

impl CommandError {
    pub(super) fn refusal(&self) -> Refusal {
        match self {
            Self::NotInPath { .. } | Self::Stat { errno: Errno::ENOENT | Errno::ENOTDIR, .. } => {
                Refusal::NotFound
            }
            // The file exists: its interpreter is missing.
            Self::Exec { errno: Errno::ENOENT, .. } => Refusal::NotFound,
            Self::Stat { .. } | Self::NotExecutable { .. } | Self::Exec { .. } => Refusal::NotExecutable,
            Self::NoArgs | Self::Nul => Refusal::Spec,
        }
    }
}

impl CommandExecutor {
    pub(super) fn new(reporter: Reporter) -> Self {
        Self { reporter }
    }

    fn refuse(&self, err: &CommandError) {
        self.reporter.send(Report::Refused { refusal: err.refusal(), text: err.to_string() });
    }
}

/// Replaces this program by a process's command, or by the program at `path` with the process's arguments.
///
/// # Errors
/// The command does not exist, or is not executable.
pub(super) fn execute(process: &Process, path: Option<&Path>) -> Result<Infallible, CommandError> {
    let path = match path {
        Some(path) => path.to_owned(),
        None => find(process)?,
    };
    let name = path.display().to_string();
    let path = c_string(path.into_os_string().into_encoded_bytes())?;
    let args = process.args().iter().flatten().map(|arg| c_string(arg.as_str()));
    let args = args.collect::<Result<Vec<_>, _>>()?;
    let env = process.env().iter().flatten().map(|var| c_string(var.as_str()));
    let env = env.collect::<Result<Vec<_>, _>>()?;
    sys::reset_signals();
    execve(&path, &args, &env).map_err(|errno| CommandError::Exec { name, errno })
}

impl Executor for CommandExecutor {
    /// Runs in the container, as the container's user, before the container is reported as created.
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let failed =
            |err: io::Error| ExecutorValidationError::ArgValidationError(format!("/dev/null: {err}"));
        reopen_null().map_err(failed)?;
        let found = spec.process().as_ref().ok_or(CommandError::NoArgs).and_then(find);
        found.map(drop).map_err(|err| {
            self.refuse(&err);
            ExecutorValidationError::ArgValidationError(err.to_string())
        })
    }

    /// Does nothing: execve gets the environment.
    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let Err(err) =
            spec.process().as_ref().ok_or(CommandError::NoArgs).and_then(|process| execute(process, None));
        self.refuse(&err);
        Err(ExecutorError::Other(err.to_string()))
    }
}

/// Replaces the VM's /dev/null by the container's. libcontainer does so too, but opens it only for reading,
/// so that writes to it fail.
pub(super) fn reopen_null() -> io::Result<()> {
    let is_null = |file: &fs::Metadata| file.file_type().is_char_device() && file.rdev() == NULL_DEVICE;
    let at_null = |fd: BorrowedFd<'_>| -> io::Result<bool> {
        Ok(is_null(&fs::File::from(fd.try_clone_to_owned()?).metadata()?))
    };
    let at = [at_null(io::stdin().as_fd())?, at_null(io::stdout().as_fd())?, at_null(io::stderr().as_fd())?];
    if at == [false; 3] {
        return Ok(());
    }
    let null = fs::File::options().read(true).write(true).open("/dev/null")?;
    // The file system belongs to the tenant: a name proves nothing.
    if !is_null(&null.metadata()?) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let [at_in, at_out, at_err] = at;
    if at_in {
        dup2_stdin(&null)?;
    }
    if at_out {
        dup2_stdout(&null)?;
    }
    if at_err {
        dup2_stderr(&null)?;
    }
    Ok(())
}

fn c_string(bytes: impl Into<Vec<u8>>) -> Result<CString, CommandError> {
    CString::new(bytes).map_err(|_| CommandError::Nul)
}

/// Finds the command like a shell: a name with a slash is a path, others are looked up in PATH.
fn find(process: &Process) -> Result<PathBuf, CommandError> {
    let name = process.args().as_ref().and_then(|args| args.first()).ok_or(CommandError::NoArgs)?;
    if name.contains('/') {
        let errno = |err: &io::Error| Errno::from_raw(err.raw_os_error().unwrap_or(libc::EIO));
        let metadata = fs::metadata(name)
            .map_err(|err| CommandError::Stat { name: name.clone(), errno: errno(&err) })?;
        return executable(process, Path::new(name), &metadata)
            .map(|()| name.into())
            .map_err(|errno| CommandError::NotExecutable { name: name.clone(), errno });
    }
    let path = process.env().iter().flatten().rev().find_map(|var| var.strip_prefix("PATH="));
    let mut denied = None;
    for dir in path.unwrap_or_default().split(':') {
        // An empty element means the working directory.
        let candidate = Path::new(if dir.is_empty() { "." } else { dir }).join(name);
        match fs::metadata(&candidate).map(|metadata| executable(process, &candidate, &metadata)) {
            Ok(Ok(())) => return Ok(candidate),
            Ok(Err(Errno::EACCES)) => denied = Some(Errno::EACCES),
            _ => {}
        }
    }
    let name = name.clone();
    Err(denied.map_or(CommandError::NotInPath { name: name.clone() }, |errno| CommandError::NotExecutable {
        name,
        errno,
    }))
}

fn executable(process: &Process, path: &Path, metadata: &fs::Metadata) -> Result<(), Errno> {
    if metadata.is_dir() {
        return Err(Errno::EISDIR);
    }
    // Root may execute a file with any of the three bits set, which access(2) takes into account. access(2)
    // also knows whether the file system allows execution.
    if metadata.mode() & 0o111 == 0 {
        return Err(Errno::EACCES);
    }
    match eaccess(path, AccessFlags::X_OK) {
        // This process does not have the capability yet that the command will have.
        Err(Errno::EACCES) if overrides_modes(process) => Ok(()),
        checked => checked,
    }
}

/// Whether the process may execute files whatever their modes say of its user (capabilities(7)).
fn overrides_modes(process: &Process) -> bool {
    let effective = process.capabilities().as_ref().and_then(|sets| sets.effective().as_ref());
    effective.is_some_and(|set| set.contains(&Capability::DacOverride))
}
