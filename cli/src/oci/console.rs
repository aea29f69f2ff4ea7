//! Terminals on the host: a pseudo-terminal for a process, whose one side the caller gets, or the verb's own terminal
//! relays.

use std::{
    fs::File,
    io::{self, IsTerminal as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    thread,
};

use machinen::{fs::FileError, sys::socket::send_with_fd};
use rustix::{
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{OptionalActions, Termios, Winsize, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize},
};
use tokio::signal::unix::{SignalKind, signal};

use super::error::OciError;

/// A pseudo-terminal of the host. The guest's terminal edits lines and makes signals, so this one only carries bytes.
#[derive(Debug)]
pub(crate) struct Console {
    pub(crate) master: OwnedFd,
    pub(crate) slave: OwnedFd,
}

impl Console {
    /// # Errors
    /// The host has no free pseudo-terminal.
    pub(crate) fn open() -> Result<Self, OciError> {
        let open = || -> rustix::io::Result<Self> {
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let master = openpt(flags)?;
            grantpt(&master)?;
            unlockpt(&master)?;
            let slave = ioctl_tiocgptpeer(&master, flags)?;
            let mut modes = tcgetattr(&slave)?;
            modes.make_raw();
            tcsetattr(&slave, OptionalActions::Now, &modes)?;
            Ok(Self { master, slave })
        };
        open().map_err(io::Error::from).map_err(OciError::io("open a pseudo-terminal"))
    }

    /// Sends the caller's side to a console socket (runc, docs/terminals.md, "Detached").
    ///
    /// # Errors
    /// The socket cannot be connected.
    pub(crate) fn send_to(self, socket: &Path) -> Result<OwnedFd, OciError> {
        let send = || {
            let stream = UnixStream::connect(socket)?;
            send_with_fd(stream.as_fd(), b"/dev/ptmx", Some(&self.master)).map(drop)
        };
        send().map_err(FileError::at("send the terminal to the console socket", socket))?;
        Ok(self.slave)
    }

    /// Joins the caller's side with the terminal or the streams of this process.
    ///
    /// # Errors
    /// The terminal cannot be put into raw mode.
    pub(crate) fn relay(self) -> Result<(Relay, OwnedFd), OciError> {
        let failed = || OciError::io("use the terminal");
        let raw = io::stdin().is_terminal().then(RawTerminal::enter).transpose().map_err(failed())?;
        let master = File::from(self.master);
        let (mut input, mut output) =
            (master.try_clone().map_err(failed())?, master.try_clone().map_err(failed())?);
        // Blocks in read(2) until this process ends.
        thread::spawn(move || io::copy(&mut io::stdin().lock(), &mut input));
        let printed = thread::spawn(move || print(&mut output, &mut Printed::stdout()));
        Ok((Relay { master, printed, _raw: raw }, self.slave))
    }
}

/// Prints what the process writes, until its terminal is closed, which read(2) reports as EIO.
fn print(from: &mut impl io::Read, to: &mut Printed<impl io::Write>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write(&buffer[..count]).is_err() {
            return;
        }
    }
    // A failed write means that the reader has closed its end.
    let _ = to.end();
}

/// The output of a terminal on the way to this process's stdout.
///
/// A terminal writes a carriage return before each newline (ONLCR). For a file or a pipe it is removed again, so that what
/// comes out is what the process has written, as with runc.
struct Printed<W> {
    to: W,
    is_terminal: bool,
    /// A carriage return that the next byte decides about.
    held: bool,
}

impl Printed<io::StdoutLock<'static>> {
    fn stdout() -> Self {
        let to = io::stdout();
        let is_terminal = to.is_terminal();
        Self { to: to.lock(), is_terminal, held: false }
    }
}

impl<W: io::Write> Printed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.is_terminal {
            self.to.write_all(bytes)?;
            return self.to.flush();
        }
        let mut out = Vec::with_capacity(bytes.len() + 1);
        for byte in bytes {
            if self.held && *byte != b'\n' {
                out.push(b'\r');
            }
            self.held = *byte == b'\r';
            if !self.held {
                out.push(*byte);
            }
        }
        self.to.write_all(&out)?;
        self.to.flush()
    }

    fn end(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.held) {
            self.to.write_all(b"\r")?;
        }
        self.to.flush()
    }
}

/// The terminal of a verb that stays in the foreground.
#[derive(Debug)]
pub(crate) struct Relay {
    master: File,
    printed: thread::JoinHandle<()>,
    _raw: Option<RawTerminal>,
}

impl Relay {
    /// Gives the process's terminal the size of this one, now and whenever that changes. Never resolves.
    pub(crate) async fn follow_size(&self) {
        let Ok(mut changes) = signal(SignalKind::window_change()) else {
            return std::future::pending().await;
        };
        loop {
            if let Ok(size) = tcgetwinsize(io::stdin()) {
                // A terminal that is closed needs no size.
                let _ = tcsetwinsize(&self.master, size);
            }
            changes.recv().await;
        }
    }

    /// Prints the rest of the output, and gives the terminal its modes back.
    pub(crate) fn finish(self) {
        let Self { master, printed, _raw } = self;
        drop(master);
        // The reader ends when the last process that has the terminal open has ended.
        let _ = printed.join();
    }
}

/// The terminal of this process, on which every key reaches the container until this is dropped. Has the modes from
/// before.
#[derive(Debug)]
pub(crate) struct RawTerminal(Termios);

impl RawTerminal {
    pub(crate) fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that is closed needs no modes.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Sets the first size of a terminal.
pub(crate) fn set_size(console: &Console, width: u64, height: u64) {
    let size = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
    let size = Winsize { ws_col: size(width), ws_row: size(height), ws_xpixel: 0, ws_ypixel: 0 };
    // A terminal that takes no size has one of its own.
    let _ = tcsetwinsize(&console.master, size);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(is_terminal: bool, chunks: &[&str]) -> String {
        let mut printed = Printed { to: Vec::new(), is_terminal, held: false };
        chunks.iter().for_each(|chunk| printed.write(chunk.as_bytes()).unwrap());
        printed.end().unwrap();
        String::from_utf8(printed.to).unwrap()
    }

    #[test]
    fn a_file_gets_the_lines_that_the_process_has_written() {
        for (chunks, expected) in [
            (&["a\r\nb\r\n"][..], "a\nb\n"),
            (&["a\r", "\nb"], "a\nb"),
            // The process has written a carriage return itself.
            (&["a\r\r\n", "x\ry\r"], "a\r\nx\ry\r"),
            (&["", "\r", "", "\n"], "\n"),
        ] {
            assert_eq!(printed(false, chunks), expected, "{chunks:?}");
            assert_eq!(printed(true, chunks), chunks.concat());
        }
    }
}
