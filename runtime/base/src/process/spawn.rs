//! The description of a child process, and its start.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{fs::MetadataExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
};

use command_fds::{CommandFdExt as _, FdMapping};

use super::{Jail, ProcessError, ProcessExit, child, tool};
use crate::{
    cgroup,
    sys::{self, child::Bond},
};

/// Where one of a child's three standard streams goes.
#[derive(Debug, Default)]
pub enum Stdio {
    /// The stream is /dev/null.
    #[default]
    Null,
    /// The stream is the one of this process.
    Inherit,
    /// Read or written by the parent.
    Pipe,
    /// The stream is this descriptor.
    Fd(OwnedFd),
}

/// The description of a child process. Nothing happens until [`Spawn::start`] or [`Spawn::run`].
///
/// The child gets no file descriptors except its three standard streams and those given to [`Spawn::fd`]. It
/// is killed when the thread that started it ends, so start long-lived children on a thread that lives as
/// long as the process.
#[derive(Debug)]
pub struct Spawn {
    program: OsString,
    arg0: Option<OsString>,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    clear_env: bool,
    dir: Option<PathBuf>,
    stdin: Stdio,
    stdout: Stdio,
    stderr: Stdio,
    fds: Vec<(OwnedFd, i32)>,
    jail: Jail,
    namespaces: Vec<OwnedFd>,
    cgroups: Vec<PathBuf>,
}

/// The result of a tool that has ended.
#[derive(Debug)]
pub struct ToolOutput {
    /// The name or path of the tool.
    pub program: String,
    /// How the tool ended.
    pub exit: ProcessExit,
    /// The first 64 KiB.
    pub stdout: Vec<u8>,
    /// The first 64 KiB.
    pub stderr: Vec<u8>,
}

impl Spawn {
    /// `program` is a path, or a name that is looked up in PATH.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            arg0: None,
            args: Vec::new(),
            env: Vec::new(),
            clear_env: false,
            dir: None,
            stdin: Stdio::Null,
            stdout: Stdio::Null,
            stderr: Stdio::Null,
            fds: Vec::new(),
            jail: Jail::default(),
            namespaces: Vec::new(),
            cgroups: Vec::new(),
        }
    }

    /// The name under which the program is listed (ps(1)), instead of its path.
    pub fn arg0(mut self, name: impl AsRef<OsStr>) -> Self {
        self.arg0 = Some(name.as_ref().to_owned());
        self
    }

    /// Adds arguments of the program.
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Adds to the inherited environment, or replaces a variable of it.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// The child does not inherit this process's environment.
    pub fn clear_env(mut self) -> Self {
        self.clear_env = true;
        self
    }

    /// The working directory, entered before the identity changes: the child need not be able to reach it by
    /// its path.
    pub fn dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dir = Some(dir.into());
        self
    }

    /// Where the standard input of the child comes from; [`Stdio::Null`] unless this is called.
    pub fn stdin(mut self, stdin: Stdio) -> Self {
        self.stdin = stdin;
        self
    }

    /// Where the standard output of the child goes; [`Stdio::Null`] unless this is called.
    pub fn stdout(mut self, stdout: Stdio) -> Self {
        self.stdout = stdout;
        self
    }

    /// Where the standard error of the child goes; [`Stdio::Null`] unless this is called.
    pub fn stderr(mut self, stderr: Stdio) -> Self {
        self.stderr = stderr;
        self
    }

    /// The child inherits `fd` under `number` (3 to 63, each once).
    pub fn fd(mut self, fd: OwnedFd, number: i32) -> Self {
        self.fds.push((fd, number));
        self
    }

    /// What the child may see, use and call; as much as this process unless this is called.
    pub fn jail(mut self, jail: Jail) -> Self {
        self.jail = jail;
        self
    }

    /// The child runs in the network namespace that `netns` is open on (setns(2)).
    pub fn join_netns(self, netns: OwnedFd) -> Self {
        self.join_namespaces([netns])
    }

    /// The child runs in the namespaces that these are open on (setns(2)), of any type but pid.
    pub fn join_namespaces(mut self, namespaces: impl IntoIterator<Item = OwnedFd>) -> Self {
        self.namespaces.extend(namespaces);
        self
    }

    /// The child runs in the groups with these directories, which it enters before it executes its program; in
    /// those of this process unless this is called.
    pub fn cgroups(mut self, groups: impl IntoIterator<Item = PathBuf>) -> Self {
        self.cgroups.extend(groups);
        self
    }

    /// Forks and executes; returns once the program runs, with the name to use in messages.
    pub(super) fn spawn_std(self) -> Result<(std::process::Child, String), ProcessError> {
        self.prepare(Bond::Child)?.start()
    }

    /// Starts the program in a session of its own, in which it outlives this process. Inside a tokio runtime
    /// it is reaped if it ends first. Returns its pid.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn detach(self) -> Result<u32, ProcessError> {
        let (child, program) = self.prepare(Bond::Detached)?.start()?;
        let pid = child.id();
        child::reap_in_background(child, program);
        Ok(pid)
    }

    /// Replaces this process by the program; returns only if that fails.
    pub fn replace(self) -> ProcessError {
        match self.prepare(Bond::Replacement) {
            Ok(mut prepared) => prepared.program.not_started(prepared.command.exec()),
            Err(error) => error,
        }
    }

    /// Builds the command, which does the rest of the work between fork and exec.
    fn prepare(self, bond: Bond) -> Result<Prepared, ProcessError> {
        let program = ProgramName(self.program.clone());
        let executable = Executable::find(&self).map_err(|error| program.not_started(error))?;
        #[expect(clippy::disallowed_methods, reason = "the one place that starts programs")]
        let mut command = std::process::Command::new(&executable.path);
        command.arg0(self.arg0.as_ref().unwrap_or(&self.program));
        if self.clear_env || self.jail.empty_environment {
            command.env_clear();
        }
        command.args(&self.args).envs(self.env);
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        command.stdin(self.stdin).stdout(self.stdout).stderr(self.stderr);
        let root = self.jail.root(&executable.path);
        let root = root.map_err(|source| ProcessError::Root { program: program.to_string(), source })?;
        // Before the descriptors move to their numbers, or the move could overwrite one that the setup uses.
        let setup = self.jail.setup().map_err(|error| program.failed(error))?;
        let cgroups = self.cgroups.iter().map(|group| cgroup::open_for_entry(group));
        let cgroups = cgroups.collect::<io::Result<Vec<_>>>().map_err(|error| program.failed(error))?;
        let namespaces = self.namespaces;
        sys::child::on_fork(
            &mut command,
            sys::child::ChildSetup { join_namespaces: namespaces, cgroups, bond, root, ..setup },
        );
        let mappings = self
            .fds
            .into_iter()
            .map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd })
            .collect::<Vec<_>>();
        command.fd_mappings(mappings).map_err(|error| program.failed(io::Error::other(error)))?;
        let last = sys::child::LastSetup { limits: self.jail.limits(), filters: self.jail.filters() };
        sys::child::just_before_exec(&mut command, last);
        let new_pid_namespace = self.jail.namespaces.pid;
        Ok(Prepared { command, program, new_pid_namespace, _executable: executable })
    }
}

/// A command that is complete.
struct Prepared {
    command: std::process::Command,
    program: ProgramName,
    new_pid_namespace: bool,
    /// Must exist until the program runs.
    _executable: Executable,
}

impl Prepared {
    fn start(mut self) -> Result<(std::process::Child, String), ProcessError> {
        let started = match self.new_pid_namespace {
            true => sys::child::spawn_in_new_pid_namespace(self.command),
            false => self.command.spawn(),
        };
        let child = started.map_err(|error| self.program.not_started(error))?;
        Ok((child, self.program.to_string()))
    }
}

/// The program in messages.
struct ProgramName(OsString);

impl ProgramName {
    fn failed(&self, source: io::Error) -> ProcessError {
        ProcessError::Spawn { program: self.to_string(), source }
    }

    /// The program could not be executed.
    fn not_started(&self, source: io::Error) -> ProcessError {
        match source.kind() {
            io::ErrorKind::NotFound => {
                let hint = tool::hint(Path::new(&self.0));
                ProcessError::NotFound { program: self.to_string(), hint }
            }
            _ => self.failed(source),
        }
    }
}

impl std::fmt::Display for ProgramName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.to_string_lossy().fmt(f)
    }
}

/// The file that is executed.
struct Executable {
    path: PathBuf,
    /// Keeps the descriptor open that the path refers to.
    _held: Option<OwnedFd>,
}

impl Executable {
    /// The real path for a program with a root of its own, in which only that path exists. For others the name as it is,
    /// unless they could not reach it.
    fn find(spawn: &Spawn) -> io::Result<Self> {
        let program = Path::new(&spawn.program);
        if spawn.jail.files.is_some() {
            return Ok(Self { path: tool::find_program(program).canonicalize()?, _held: None });
        }
        let held = spawn.jail.identity.as_ref().and_then(|_| open_unreachable(program));
        let path = held.as_ref().map(|fd| format!("/proc/self/fd/{}", fd.as_raw_fd()).into());
        Ok(Self { path: path.unwrap_or_else(|| program.to_owned()), _held: held })
    }
}

/// Opens a program in a directory that not everyone may enter, such as root's home, so that it can be
/// executed through the descriptor.
///
/// None if the child can reach the program by its path, or if it is missing, which the attempt to execute it
/// reports.
fn open_unreachable(program: &Path) -> Option<OwnedFd> {
    // A name without a directory is looked up in PATH, whose directories everyone may enter.
    program.parent().filter(|dir| !dir.as_os_str().is_empty())?;
    let real = program.canonicalize().ok()?;
    let closed = |dir: &Path| dir.metadata().is_ok_and(|meta| meta.mode() & 0o001 == 0);
    if !real.ancestors().skip(1).any(closed) {
        return None;
    }
    let file = File::open(real).ok()?;
    // Above the numbers that the child's own descriptors are moved to before it executes.
    sys::duplicate_from(file.as_fd(), HELD_FROM).ok()
}

/// Above every number that is given to [`Spawn::fd`].
const HELD_FROM: i32 = 64;

impl From<Stdio> for std::process::Stdio {
    fn from(stdio: Stdio) -> Self {
        match stdio {
            Stdio::Null => Self::null(),
            Stdio::Inherit => Self::inherit(),
            Stdio::Pipe => Self::piped(),
            Stdio::Fd(fd) => Self::from(fd),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_child_ends_with_the_thread_that_started_it() {
        for jail in [Jail::default(), Jail::strict(crate::process::RunAs::default())] {
            let spawn = Spawn::new("sleep").args(["100"]).jail(jail);
            let starter = std::thread::spawn(|| spawn.spawn_std().unwrap());
            let (mut child, _) = starter.join().unwrap();
            assert_eq!(ProcessExit::from(child.wait().unwrap()), ProcessExit::Signal(libc::SIGKILL));
        }
    }

    #[test]
    fn a_program_in_a_private_directory_runs_without_privileges() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let program = dir.path().join("echo");
        // Copied by cp, because a child that another test forks meanwhile would hold a copy made here open
        // for writing.
        crate::process::run("cp", ["/bin/echo".as_ref(), program.as_os_str()], &[]).unwrap();
        let identity = crate::process::RunAs { uid: 0x7000_0001, gid: 0x7000_0001, groups: vec![] };
        let spawn = Spawn::new(&program).args(["it", "runs"]).jail(Jail::strict(identity));
        let output = spawn.run().unwrap().success().unwrap();
        assert_eq!(output.stdout, b"it runs\n");
    }

    #[test]
    fn descriptors_arrive_under_their_numbers_and_no_others_do() {
        let files: Vec<OwnedFd> = ["one", "two"]
            .into_iter()
            .map(|text| {
                let (reader, mut writer) = io::pipe().unwrap();
                writer.write_all(text.as_bytes()).unwrap();
                reader.into()
            })
            .collect();
        let mut spawn = Spawn::new("sh").args(["-c", "cat <&7; cat <&3; ls /proc/self/fd"]);
        for (fd, number) in files.into_iter().zip([3, 7]) {
            spawn = spawn.fd(fd, number);
        }
        let output = spawn.run().unwrap().success().unwrap();
        // 4 is the directory that ls itself reads.
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "twoone0\n1\n2\n3\n4\n7\n");
    }
}
