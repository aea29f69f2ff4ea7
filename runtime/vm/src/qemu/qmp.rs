//! A small client of QEMU's monitor protocol (QMP): commands, events, and descriptors that are passed to
//! QEMU.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use machinen_base::{sys, text::printable};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader},
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::{broadcast, mpsc, oneshot},
};

/// The oldest QEMU whose microvm machine has all that machinen uses.
pub(crate) const OLDEST: QemuVersion = QemuVersion { major: 7, minor: 2, micro: 0 };

/// Longest line that is accepted, bytes; the greeting and all answers used here are far below.
const MAX_LINE: u64 = 1 << 20;
/// QEMU's main loop answers in milliseconds; one that does not answer within this time is taken to hang.
const DEADLINE: Duration = Duration::from_secs(20);

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU has ended, or is about to.
    #[error("QEMU closed its monitor")]
    Closed,
    /// The socket of the monitor failed.
    #[error("cannot talk to QEMU's monitor")]
    Io(#[source] io::Error),
    /// What QEMU sent is not a QMP message; this is an excerpt or a description of it.
    #[error("QEMU's monitor sent what is not QMP: {0}")]
    Malformed(String),
    /// This version of QEMU lacks something that machinen uses.
    #[error("QEMU {0} is too old, {OLDEST} or newer is needed; install the Debian package qemu-system-x86")]
    TooOld(QemuVersion),
    /// QEMU answered with an error.
    #[error("QEMU refused {command}: {description} ({class})")]
    Refused {
        /// The name of the QMP command.
        command: &'static str,
        /// The class of the error, such as `GenericError`.
        class: String,
        /// The text of QEMU for people.
        description: String,
    },
    /// QEMU took too long.
    #[error("QEMU did not answer {command} within {DEADLINE:?}")]
    Deadline {
        /// The name of the QMP command.
        command: &'static str,
    },
}

/// QEMU's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct QemuVersion {
    /// The first number of the version.
    pub major: u32,
    /// The second number of the version.
    pub minor: u32,
    /// The third number of the version.
    pub micro: u32,
}

impl std::fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// The events of QEMU that are used here (QEMU's QMP reference, "Events").
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum QmpEvent {
    /// The machine is off.
    Shutdown {
        /// A `ShutdownCause` of QEMU, such as `guest-shutdown` or `guest-reset`.
        reason: String,
    },
    /// The guest's kernel has panicked.
    GuestPanicked,
    /// The device with this id is gone.
    DeviceDeleted(String),
    /// QEMU has finished writing or reading a VM's state, successfully or not.
    MigrationEnded {
        /// The state was written or read completely.
        completed: bool,
    },
}

/// A handle on the monitor; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Qmp {
    commands: mpsc::Sender<QmpCommand>,
    version: QemuVersion,
}

#[derive(Debug)]
struct QmpCommand {
    name: &'static str,
    arguments: Value,
    fd: Option<OwnedFd>,
    answer: oneshot::Sender<Result<Value, QmpError>>,
}

#[derive(Deserialize)]
struct QmpMessage {
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
    #[serde(rename = "return")]
    result: Option<Value>,
    error: Option<QmpRefusal>,
    id: Option<u64>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Deserialize)]
struct Greeting {
    version: GreetingVersion,
}

#[derive(Deserialize)]
struct GreetingVersion {
    qemu: QemuVersion,
}

#[derive(Deserialize)]
struct QmpRefusal {
    class: String,
    desc: String,
}

impl Qmp {
    /// Connects to QEMU and enables commands. Events arrive until QEMU closes its monitor. Must be called
    /// inside a tokio runtime.
    ///
    /// # Errors
    /// QEMU is too old, ends, or does not send its greeting in time.
    pub(crate) async fn connect(
        socket: std::os::unix::net::UnixStream,
    ) -> Result<(Self, broadcast::Receiver<QmpEvent>), QmpError> {
        socket.set_nonblocking(true).map_err(QmpError::Io)?;
        let (reader, writer) = UnixStream::from_std(socket).map_err(QmpError::Io)?.into_split();
        let mut lines = Lines { reader: BufReader::new(reader), line: Vec::new() };
        let greeting = tokio::time::timeout(DEADLINE, lines.next())
            .await
            .map_err(|_| QmpError::Deadline { command: "the greeting" })??;
        let version = match greeting.greeting {
            Some(greeting) => greeting.version.qemu,
            None => return Err(QmpError::Malformed("a first message that is not a greeting".into())),
        };
        if version < OLDEST {
            return Err(QmpError::TooOld(version));
        }
        let (commands, queue) = mpsc::channel(16);
        let (events, event_queue) = broadcast::channel(64);
        tokio::spawn(serve(lines, writer, queue, events));
        let qmp = Self { commands, version };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok((qmp, event_queue))
    }

    /// Continues with a monitor that is connected already, of a QEMU with this version.
    ///
    /// # Errors
    /// The socket cannot be watched.
    pub(crate) fn resume(
        socket: std::os::unix::net::UnixStream,
        version: QemuVersion,
    ) -> Result<(Self, broadcast::Receiver<QmpEvent>), QmpError> {
        socket.set_nonblocking(true).map_err(QmpError::Io)?;
        let (reader, writer) = UnixStream::from_std(socket).map_err(QmpError::Io)?.into_split();
        let lines = Lines { reader: BufReader::new(reader), line: Vec::new() };
        let (commands, queue) = mpsc::channel(16);
        let (events, event_queue) = broadcast::channel(64);
        tokio::spawn(serve(lines, writer, queue, events));
        Ok((Self { commands, version }, event_queue))
    }

    /// The version that QEMU reported when the monitor was opened.
    pub(crate) fn version(&self) -> QemuVersion {
        self.version
    }

    /// Executes a command and returns the value that QEMU answers.
    ///
    /// # Errors
    /// QEMU refuses the command, ends, or does not answer in time.
    pub(crate) async fn execute(&self, command: &'static str, arguments: Value) -> Result<Value, QmpError> {
        self.send(command, arguments, None).await
    }

    /// As [`Qmp::execute`], for the commands that take a descriptor (`add-fd`, `getfd`).
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub(crate) async fn execute_with_fd(
        &self,
        command: &'static str,
        arguments: Value,
        fd: OwnedFd,
    ) -> Result<Value, QmpError> {
        self.send(command, arguments, Some(fd)).await
    }

    async fn send(
        &self,
        name: &'static str,
        arguments: Value,
        fd: Option<OwnedFd>,
    ) -> Result<Value, QmpError> {
        let (answer, answered) = oneshot::channel();
        let exchange = async {
            self.commands
                .send(QmpCommand { name, arguments, fd, answer })
                .await
                .map_err(|_| QmpError::Closed)?;
            answered.await.map_err(|_| QmpError::Closed)?
        };
        match tokio::time::timeout(DEADLINE, exchange).await {
            Ok(result) => result,
            Err(_) => Err(QmpError::Deadline { command: name }),
        }
    }
}

/// Commands that have been sent and not answered, by id.
type PendingCommands = HashMap<u64, (&'static str, oneshot::Sender<Result<Value, QmpError>>)>;

/// Owns the socket until QEMU closes it or every handle is gone; commands without an answer then fail as
/// closed.
async fn serve<R: AsyncRead + Unpin>(
    mut lines: Lines<R>,
    writer: OwnedWriteHalf,
    mut commands: mpsc::Receiver<QmpCommand>,
    events: broadcast::Sender<QmpEvent>,
) {
    let mut waiting = PendingCommands::new();
    for id in 0_u64.. {
        // Each turn of the outer loop sends one command; messages are delivered in between.
        let command = loop {
            tokio::select! {
                command = commands.recv() => break command,
                message = lines.next() => match message {
                    Ok(message) => deliver(message, &mut waiting, &events),
                    Err(error) => {
                        tracing::debug!("QEMU's monitor ended: {error}");
                        return;
                    }
                },
            }
        };
        let Some(QmpCommand { name, arguments, fd, answer }) = command else { return };
        let mut text = json!({ "execute": name, "arguments": arguments, "id": id }).to_string();
        text.push('\n');
        match write_all(&writer, text.as_bytes(), fd).await {
            Ok(()) => {
                waiting.insert(id, (name, answer));
            }
            Err(error) => {
                // The caller may have stopped waiting for the answer.
                answer.send(Err(QmpError::Io(error))).ok();
            }
        }
    }
}

fn deliver(message: QmpMessage, waiting: &mut PendingCommands, events: &broadcast::Sender<QmpEvent>) {
    if let Some(name) = message.event {
        if let Some(event) = event(&name, &message.data) {
            // An event without a receiver is not an error.
            events.send(event).ok();
        }
        return;
    }
    let Some((command, answer)) = message.id.and_then(|id| waiting.remove(&id)) else { return };
    let result = match (message.result, message.error) {
        (_, Some(QmpRefusal { class, desc })) => {
            Err(QmpError::Refused { command, class: printable(&class), description: printable(&desc) })
        }
        (Some(value), None) => Ok(value),
        (None, None) => Err(QmpError::Malformed(format!("an empty answer to {command}"))),
    };
    answer.send(result).ok();
}

fn event(name: &str, data: &Value) -> Option<QmpEvent> {
    let text = |key: &str| data[key].as_str().unwrap_or_default().to_owned();
    Some(match name {
        "SHUTDOWN" => QmpEvent::Shutdown { reason: text("reason") },
        "GUEST_PANICKED" | "GUEST_CRASHLOADED" => QmpEvent::GuestPanicked,
        "MIGRATION" => match data["status"].as_str() {
            Some("completed") => QmpEvent::MigrationEnded { completed: true },
            Some("failed" | "cancelled") => QmpEvent::MigrationEnded { completed: false },
            _ => return None,
        },
        // Devices without an id are parts of one that has an id.
        "DEVICE_DELETED" if data["device"].is_string() => QmpEvent::DeviceDeleted(text("device")),
        _ => return None,
    })
}

/// The descriptor travels with the first bytes.
async fn write_all(writer: &OwnedWriteHalf, bytes: &[u8], mut fd: Option<OwnedFd>) -> io::Result<()> {
    let socket: &UnixStream = writer.as_ref();
    let mut rest = bytes;
    while !rest.is_empty() {
        socket.writable().await?;
        let sent = socket.try_io(tokio::io::Interest::WRITABLE, || {
            sys::socket::send_with_fd(socket.as_fd(), rest, fd.as_ref())
        });
        match sent {
            Ok(count) => {
                rest = &rest[count..];
                fd = None;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

struct Lines<R> {
    reader: BufReader<R>,
    /// The part of a line that was read so far, which a cancelled [`Lines::next`] leaves here.
    line: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    async fn next(&mut self) -> Result<QmpMessage, QmpError> {
        let left = MAX_LINE - self.line.len() as u64;
        (&mut self.reader).take(left).read_until(b'\n', &mut self.line).await.map_err(QmpError::Io)?;
        if self.line.last() != Some(&b'\n') {
            if (self.line.len() as u64) < MAX_LINE {
                return Err(QmpError::Closed);
            }
            return Err(QmpError::Malformed(format!("a line longer than {MAX_LINE} bytes")));
        }
        let line = std::mem::take(&mut self.line);
        serde_json::from_slice(&line).map_err(|error| QmpError::Malformed(error.to_string()))
    }
}

#[cfg(test)]
pub(crate) mod tests;
