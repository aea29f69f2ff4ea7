//! Programs on a terminal of the harness, which writes input and reads the output.

use std::{fs::File, io::Write, os::fd::AsFd, process::Child, time::Duration};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustix::{
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use crate::process::{Invocation, Stream, wait_for_end};

/// Longest wait for a program's output, and for its end.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Terminal {
    child: Child,
    master: File,
    output: Stream,
}

/// How long the rest of the output may take after the program has ended.
const REST: Duration = Duration::from_secs(2);

impl Terminal {
    /// Starts a program on a terminal of a size.
    ///
    /// # Errors
    /// There is no terminal, or the program cannot be executed.
    pub fn run(program: &Invocation, columns: u16, rows: u16) -> Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let slave =
            ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        set_size(&master, columns, rows)?;
        let child = program.spawn_on(&slave)?;
        let master = File::from(master);
        let output = Stream::read(master.try_clone()?);
        Ok(Self { child, master, output })
    }

    /// # Errors
    /// The terminal is closed.
    pub fn type_in(&mut self, text: &str) -> Result<()> {
        self.master.write_all(text.as_bytes()).context("cannot type")
    }

    /// Waits for a text, and returns all output so far.
    ///
    /// # Errors
    /// The text does not come in time.
    pub fn expect(&self, text: &str) -> Result<String> {
        let seen = self.output.contains(text, PATIENCE);
        let all = String::from_utf8_lossy(&self.output.so_far()).into_owned();
        ensure!(seen, "{text:?} was not printed, but {all:?}");
        Ok(all)
    }

    /// Changes the size, and notifies the program.
    ///
    /// # Errors
    /// The terminal is closed or the program has ended.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        set_size(self.master.as_fd(), columns, rows)?;
        self.signal(Signal::SIGWINCH)
    }

    /// # Errors
    /// The program has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.child.id().try_into()?), signal).context("cannot signal the program")
    }

    /// Waits for the program's end, and returns its status and all its output.
    ///
    /// # Errors
    /// The program does not end in time.
    pub fn wait(mut self) -> Result<(i32, String)> {
        ensure!(wait_for_end(self.child.id(), PATIENCE)?, "a program on a terminal does not end");
        let status = self.child.wait()?.code().unwrap_or(-1);
        // The last bytes may not be read yet. Another process may keep the terminal open, so this is bounded.
        self.output.ends(REST);
        Ok((status, String::from_utf8_lossy(&self.output.so_far()).into_owned()))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // After `wait` both calls find a reaped child and do nothing.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn set_size(terminal: impl AsFd, columns: u16, rows: u16) -> Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).context("cannot set the size of a terminal")
}
