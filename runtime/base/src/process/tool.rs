//! Short-lived tools such as mke2fs, run to their end on a blocking thread.

use std::{
    ffi::OsStr,
    io::{self, Read},
    path::{Path, PathBuf},
};

use super::{ProcessError, ProcessExit, Spawn, Stdio, ToolOutput};

/// Bytes of stdout and of stderr that are kept; further output is read and dropped.
const KEPT: usize = 64 << 10;

/// Runs `program` to its end and fails unless it exits with 0.
///
/// Blocks: call it on a blocking thread. `LC_ALL=C` is set, stdin is /dev/null, and the tool dies with the
/// calling thread. `env` is added to machinen's own environment.
///
/// # Errors
/// The program cannot be started (if it is not found, the error says what to install), or it did not exit
/// with status 0: then [`ProcessError::Failed`] holds what it printed on stderr.
pub fn run<A: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = A>,
    env: &[(&str, &str)],
) -> Result<ToolOutput, ProcessError> {
    let mut spawn = Spawn::new(program).args(args).env("LC_ALL", "C");
    for (key, value) in env {
        spawn = spawn.env(key, value);
    }
    spawn.run()?.success()
}

impl Spawn {
    /// Runs the program to its end, however it ends, and keeps the first part of what it printed. Blocks.
    ///
    /// # Errors
    /// The program cannot be started or waited for.
    pub fn run(self) -> Result<ToolOutput, ProcessError> {
        let (mut child, program) = self.stdout(Stdio::Pipe).stderr(Stdio::Pipe).spawn_std()?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (stdout, stderr) = std::thread::scope(|scope| {
            let other = scope.spawn(|| keep(stderr));
            (keep(stdout), other.join().expect("the reader does not panic"))
        });
        let failed = |action: &'static str, pid| {
            let program = program.clone();
            move |source| ProcessError::Child { action, program, pid, source }
        };
        let status = child.wait().map_err(failed("wait for", child.id()))?;
        Ok(ToolOutput {
            exit: ProcessExit::from(status),
            stdout: stdout.map_err(failed("read the output of", child.id()))?,
            stderr: stderr.map_err(failed("read the errors of", child.id()))?,
            program,
        })
    }
}

impl ToolOutput {
    /// # Errors
    /// [`ProcessError::Failed`] unless the program exited with 0.
    pub fn success(self) -> Result<Self, ProcessError> {
        if self.exit.success() {
            return Ok(self);
        }
        let stderr = String::from_utf8_lossy(&self.stderr).into_owned();
        Err(ProcessError::Failed { program: self.program, exit: self.exit, stderr })
    }
}

/// Reads to the end so that the tool never blocks, and returns the first [`KEPT`] bytes.
fn keep(source: Option<impl Read>) -> io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    if let Some(mut source) = source {
        source.by_ref().take(KEPT as u64).read_to_end(&mut kept)?;
        io::copy(&mut source, &mut io::sink())?;
    }
    Ok(kept)
}

/// The path of a program that is given as a path or as a name in PATH; `name` itself if it is not found.
pub fn find_program(name: &Path) -> PathBuf {
    if name.components().count() > 1 {
        return name.to_owned();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .unwrap_or_else(|| name.to_owned())
}

/// What to do about a program that is missing.
pub(super) fn hint(program: &Path) -> String {
    let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy();
    let package = match &*name {
        "mke2fs" | "e2fsck" | "debugfs" | "resize2fs" | "tune2fs" => "e2fsprogs",
        "qemu-system-x86_64" => "qemu-system-x86",
        "criu" => "criu",
        "passt" | "pasta" => "passt",
        "vhost-device-vsock" => return "install it with `make setup`, or choose another channel".into(),
        _ => return "install it or correct its path".into(),
    };
    format!("install the Debian package {package}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_bounded_and_both_pipes_are_read() {
        let script = "head -c 300000 /dev/zero >&2; head -c 300000 /dev/zero; exit 3";
        let output = Spawn::new("sh").args(["-c", script]).run().unwrap();
        assert_eq!(output.exit, ProcessExit::Code(3));
        assert_eq!((output.stdout.len(), output.stderr.len()), (KEPT, KEPT));
    }

    #[test]
    fn a_missing_tool_says_what_to_install() {
        let error = run("/nowhere/mke2fs", ["-V"], &[]).unwrap_err();
        assert_eq!(error.to_string(), "/nowhere/mke2fs not found; install the Debian package e2fsprogs");
    }

    #[test]
    fn environment_and_failure_reach_the_caller() {
        let output = run("sh", ["-c", "echo $A$LC_ALL"], &[("A", "b")]).unwrap();
        assert_eq!(output.stdout, b"bC\n");
        let error = run("sh", ["-c", "echo no >&2; kill -9 $$"], &[]).unwrap_err();
        assert_eq!(error.to_string(), "sh was killed by SIGKILL: no");
    }
}
