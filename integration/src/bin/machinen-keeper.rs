//! Runs a program and, when its own stdin ends, removes everything that the program has left.
//!
//! `machinen-keeper ROOT NAMESPACE PROGRAM [ARGUMENT...]`
//!
//! The harness holds the other end of stdin, which is closed when a test ends, however it ends. Then the
//! keeper kills all its descendants (the keeper is their subreaper, so daemons are descendants too), unmounts
//! what is mounted below ROOT, and removes the control groups called NAMESPACE and ROOT itself.
//!
//! The line `stop` on stdin kills the program and leaves its descendants alone; `restart` starts the program
//! again after that; `run FILE` runs a shell script next to it. Each start is answered by a line with the new
//! process's pid on stdout, `stop` by a line with 0.

use std::{
    env, io,
    io::{BufRead, Write},
    os::fd::AsFd,
    path::Path,
    process::{Command, ExitCode, Stdio},
    sync::mpsc::{Receiver, Sender, channel},
};

use anyhow::{Context, Result, ensure};
use machinen_integration::inventory;
use nix::{
    errno::Errno,
    sys::{
        prctl::set_child_subreaper,
        signal::{Signal, kill},
        wait::wait,
    },
    unistd::{Pid, setsid},
};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("machinen-keeper: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    ensure!(args.len() >= 3, "usage: machinen-keeper ROOT NAMESPACE PROGRAM [ARGUMENT...]");
    let (root, namespace, command) = (Path::new(&args[0]), &args[1], &args[2..]);
    set_child_subreaper(true).context("cannot become a subreaper")?;
    // A signal for the harness's process group, such as Ctrl-C, is meant for the harness: when the harness
    // ends, so does the pipe.
    setsid().context("cannot make a session")?;

    let reaper = Reaper::start();
    let mut program = Some(reaper.spawn(command)?);
    for line in io::stdin().lock().lines() {
        let line = line.context("cannot read stdin")?;
        if line == "restart" {
            program.take().map_or(Ok(()), |pid| reaper.end(pid))?;
            program = Some(reaper.spawn(command)?);
        } else if line == "stop" {
            program.take().map_or(Ok(()), |pid| reaper.end(pid))?;
            println!("0");
        } else if let Some(script) = line.strip_prefix("run ") {
            reaper.spawn(&["/bin/sh".to_owned(), script.to_owned()])?;
        }
    }
    // The program is killed first, so that it does not react to the deaths of the others.
    program.into_iter().for_each(terminate);
    loop {
        // Each death may bring new orphans.
        let left = descendants()?;
        if left.is_empty() {
            return inventory::wipe(root, namespace);
        }
        left.into_iter().for_each(terminate);
        reaper.next()?;
    }
}

/// A thread that reaps every child of this process, orphans included, and reports that something has ended.
struct Reaper {
    deaths: Receiver<()>,
    spawned: Sender<()>,
}

impl Reaper {
    fn start() -> Self {
        let (sender, deaths) = channel();
        let (spawned, children) = channel();
        std::thread::spawn(move || {
            // Without a child there is nothing to wait for until one is spawned.
            while children.recv().is_ok() {
                while !matches!(wait(), Err(Errno::ECHILD)) {
                    if sender.send(()).is_err() {
                        return;
                    }
                }
            }
        });
        Self { deaths, spawned }
    }

    fn spawn(&self, command: &[String]) -> Result<Pid> {
        let pid = spawn(command)?;
        self.spawned.send(()).context("the reaper has ended")?;
        Ok(pid)
    }

    /// Kills a process and waits until it has been reaped.
    fn end(&self, pid: Pid) -> Result<()> {
        terminate(pid);
        while descendants()?.contains(&pid) {
            self.next()?;
        }
        Ok(())
    }

    fn next(&self) -> Result<()> {
        self.deaths.recv().context("the reaper has ended")
    }
}

fn spawn(command: &[String]) -> Result<Pid> {
    let stderr = io::stderr().as_fd().try_clone_to_owned().context("cannot duplicate stderr")?;
    #[expect(clippy::disallowed_methods, reason = "the keeper is a supervisor of its own")]
    let child = Command::new(&command[0])
        .args(&command[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::from(stderr))
        .spawn()
        .with_context(|| format!("cannot run {}", command[0]))?;
    println!("{}", child.id());
    io::stdout().flush().context("cannot report the pid")?;
    Ok(Pid::from_raw(i32::try_from(child.id()).context("pid out of range")?))
}

fn terminate(pid: Pid) {
    // The process may have ended in the meantime, which is what was wanted.
    let _gone = kill(pid, Signal::SIGKILL);
    if let Err(error) = inventory::thaw(pid.as_raw().cast_unsigned()) {
        eprintln!("machinen-keeper: {error:#}");
    }
}

fn descendants() -> Result<Vec<Pid>> {
    let own = std::process::id();
    let processes = inventory::descendants(own).context("cannot list processes")?;
    Ok(processes.iter().filter_map(|process| i32::try_from(process.pid).ok()).map(Pid::from_raw).collect())
}
