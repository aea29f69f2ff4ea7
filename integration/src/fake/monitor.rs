//! The part of QEMU's monitor protocol (QMP) that machinen uses.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Write,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result};
use nix::fcntl::{AT_FDCWD, AtFlags};
use serde_json::{Value, json};

use super::{Behaviour, Shared, vm::Guest};
use crate::sys;

#[derive(Debug)]
pub(super) struct Monitor {
    socket: UnixStream,
    writer: Mutex<UnixStream>,
    behaviour: Behaviour,
    /// The directory in which the agent looks for disks.
    disks: PathBuf,
    state: Mutex<State>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct State {
    /// Descriptors by the set that contains them.
    fdsets: BTreeMap<u64, OwnedFd>,
    /// Sets by the name of the block device that was made of them.
    blocks: BTreeMap<String, u64>,
    /// Files in the agent's directory by the device that they represent.
    devices: BTreeMap<String, PathBuf>,
}

/// The reason why a command was not carried out.
type Refusal = (&'static str, String);

impl Monitor {
    pub(super) fn new(
        socket: UnixStream,
        behaviour: Behaviour,
        disks: PathBuf,
        shared: Arc<Shared>,
    ) -> Result<Self> {
        let writer = Mutex::new(socket.try_clone()?);
        Ok(Self { socket, writer, behaviour, disks, state: Mutex::default(), shared })
    }

    /// Serves until the VM has to end; returns the exit code and last words.
    pub(super) fn serve(&self, guest: &Guest) -> Result<(u8, &'static str)> {
        std::thread::scope(|scope| {
            if let Guest::Agent(child) = guest {
                scope.spawn(|| self.follow(child));
            }
            let result = self.answer_commands(guest);
            // Without its monitor, a guest has lost its machine.
            guest.kill()?;
            result
        })
    }

    /// Closes the monitor for both sides.
    pub(super) fn hang_up(&self) {
        // The monitor may be closed already.
        let _closed = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// The end of the agent powers the machine off.
    fn follow(&self, agent: &Mutex<std::process::Child>) {
        let pid = agent.lock().expect("the lock is not poisoned").id();
        let ended = crate::process::wait_for_end(pid, std::time::Duration::from_secs(1 << 20));
        if ended.is_ok() {
            self.event("SHUTDOWN", &json!({ "guest": true, "reason": "guest-shutdown" }));
            let _closed = self.socket.shutdown(std::net::Shutdown::Read);
        }
    }

    fn answer_commands(&self, guest: &Guest) -> Result<(u8, &'static str)> {
        let major = if let Behaviour::GreetsAs(major) = self.behaviour { major } else { 7 };
        let version = json!({ "qemu": { "major": major, "minor": 2, "micro": 0 }, "package": "fake" });
        self.send(&json!({ "QMP": { "version": version, "capabilities": [] } }));
        let mut buffer = vec![0; 64 << 10];
        let mut line = Vec::new();
        let mut fds = Vec::new();
        let mut hangs = false;
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        loop {
            let (count, more) = match sys::receive_with_fds(&self.socket, &mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok((0, "")),
                Err(error) => return Err(error).context("cannot read from the monitor"),
            };
            if count == 0 {
                return Ok((0, ""));
            }
            fds.extend(more);
            line.extend_from_slice(&buffer[..count]);
            while let Some(end) = line.iter().position(|&byte| byte == b'\n') {
                let command: Value = serde_json::from_slice(&line[..end]).context("odd command")?;
                line.drain(..=end);
                let name = command["execute"].as_str().context("no command")?;
                let count = counts.entry(name.to_owned()).or_default();
                *count += 1;
                match self.behaviour {
                    _ if hangs => continue,
                    Behaviour::HangsOn(last) if last == name => {
                        hangs = true;
                        self.shared.hangs();
                        continue;
                    }
                    Behaviour::StopsAgentOn(last) if last == name => {
                        guest.stop()?;
                        self.shared.hangs();
                    }
                    Behaviour::DiesOn(fatal) if fatal == name => {
                        return Ok((1, "fake-qemu: that was too much\n"));
                    }
                    Behaviour::RefusesOnce(refused, nth) if refused == name && *count == nth => {
                        self.reply(&command, Err(("GenericError", "not today".to_owned())));
                        continue;
                    }
                    Behaviour::Refuses(refused) if refused == name => {
                        self.reply(&command, Err(("GenericError", "not today".to_owned())));
                        continue;
                    }
                    _ => {}
                }
                self.reply(&command, self.execute(name, &command["arguments"], &mut fds));
                if name == "quit" {
                    self.event("SHUTDOWN", &json!({ "guest": false, "reason": "host-qmp-quit" }));
                    return Ok((0, ""));
                }
            }
        }
    }

    fn execute(&self, name: &str, arguments: &Value, fds: &mut Vec<OwnedFd>) -> Result<Value, Refusal> {
        let text = |key: &str| arguments[key].as_str().unwrap_or_default().to_owned();
        let mut state = self.state.lock().expect("the lock is not poisoned");
        match name {
            "qmp_capabilities" | "quit" => Ok(json!({})),
            "add-fd" => {
                let fd = fds.pop().ok_or_else(|| refused("no descriptor was sent along"))?;
                let set = arguments["fdset-id"].as_u64().ok_or_else(|| refused("no fdset-id"))?;
                let number = fd.as_raw_fd();
                state.fdsets.insert(set, fd);
                Ok(json!({ "fdset-id": set, "fd": number }))
            }
            "remove-fd" => {
                state.fdsets.remove(&arguments["fdset-id"].as_u64().unwrap_or_default());
                Ok(json!({}))
            }
            "blockdev-add" => {
                let file = arguments["file"]["filename"].as_str().unwrap_or_default();
                let set = file.strip_prefix("/dev/fdset/").and_then(|set| set.parse().ok());
                let set = set.filter(|set| state.fdsets.contains_key(set));
                state.blocks.insert(text("node-name"), set.ok_or_else(|| refused("no such fd set"))?);
                Ok(json!({}))
            }
            "blockdev-del" => {
                state.blocks.remove(&text("node-name"));
                Ok(json!({}))
            }
            "device_add" => {
                let set = state.blocks.get(&text("drive")).ok_or_else(|| refused("no such drive"))?;
                let fd = state.fdsets.get(set).ok_or_else(|| refused("no such fd set"))?;
                let disk = self.disks.join(format!("{}-{}", arguments["scsi-id"], arguments["lun"]));
                let source = format!("/proc/self/fd/{}", fd.as_raw_fd());
                nix::unistd::linkat(AT_FDCWD, source.as_str(), AT_FDCWD, &disk, AtFlags::AT_SYMLINK_FOLLOW)
                    .map_err(|error| refused(&format!("cannot attach the disk: {error}")))?;
                state.devices.insert(text("id"), disk);
                Ok(json!({}))
            }
            "device_del" => {
                let disk = state.devices.remove(&text("id")).ok_or_else(|| refused("no such device"))?;
                fs::remove_file(disk).map_err(|error| refused(&error.to_string()))?;
                drop(state);
                self.event("DEVICE_DELETED", &json!({ "device": text("id") }));
                Ok(json!({}))
            }
            _ => Err(("CommandNotFound", format!("The command {name} has not been found"))),
        }
    }

    fn reply(&self, command: &Value, result: Result<Value, Refusal>) {
        let mut message = match result {
            Ok(value) => json!({ "return": value }),
            Err((class, description)) => json!({ "error": { "class": class, "desc": description } }),
        };
        message["id"] = command["id"].clone();
        self.send(&message);
    }

    fn event(&self, name: &str, data: &Value) {
        let timestamp = json!({ "seconds": 0, "microseconds": 0 });
        self.send(&json!({ "event": name, "data": data, "timestamp": timestamp }));
    }

    fn send(&self, message: &Value) {
        let mut writer = self.writer.lock().expect("the lock is not poisoned");
        // A client that has disconnected needs no answer.
        let _gone = writer.write_all(format!("{message}\r\n").as_bytes());
    }
}

fn refused(description: &str) -> Refusal {
    ("GenericError", description.to_owned())
}
