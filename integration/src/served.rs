//! A container without containerd: the tests call the task API of its shim.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{
    api,
    protobuf::{EnumOrUnknown, MessageField, well_known_types::any::Any},
};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::{
    bundle::Bundle,
    containerd::Containerd,
    image::hex,
    shim::{Client, Shim, V3},
};

/// A container, and the shim that serves it.
#[expect(missing_debug_implementations, reason = "ttrpc's client has none")]
pub struct Served<'a> {
    pub shim: Shim<'a>,
    pub client: Client,
    pub pid: u32,
    /// The VM has another container too.
    pub shares_vm: bool,
}

impl<'a> Served<'a> {
    /// A container that only waits.
    ///
    /// # Errors
    /// The container's rootfs cannot be made, or the container does not start.
    pub fn idle(containerd: &'a Containerd) -> Result<Self> {
        let rootfs = Bundle::busybox(containerd)?;
        Self::run(containerd, &rootfs.config(&["sleep", "1000"], |_| ())?)
    }

    /// A running container with that specification.
    ///
    /// # Errors
    /// The container does not start.
    pub fn run(containerd: &'a Containerd, config: &Path) -> Result<Self> {
        let mut served = Self::of(containerd, config)?;
        served.create(|_| ())?;
        served.begin()?;
        Ok(served)
    }

    /// A running container with that specification, restored from a checkpoint.
    ///
    /// # Errors
    /// The container is not restored.
    pub fn restored(containerd: &'a Containerd, config: &Path, checkpoint: &Path) -> Result<Self> {
        let mut served = Self::of(containerd, config)?;
        served.create_from(checkpoint)?;
        served.begin()?;
        Ok(served)
    }

    /// A shim for a container with that specification.
    ///
    /// # Errors
    /// The shim does not start.
    pub fn of(containerd: &'a Containerd, config: &Path) -> Result<Self> {
        let shim = Shim::new(containerd)?;
        fs::copy(config, shim.bundle.join("config.json"))?;
        let client = Client::connect(&shim.serve()?, V3)?;
        Ok(Self { shim, client, pid: 0, shares_vm: false })
    }

    /// A container with that specification in the VM of this one.
    ///
    /// # Errors
    /// The bundle cannot be made.
    pub fn in_same_vm(&self, containerd: &'a Containerd, config: &Path) -> Result<Self> {
        let shim = Shim::new(containerd)?;
        fs::copy(config, shim.bundle.join("config.json"))?;
        Ok(Self { shim, client: self.client.clone(), pid: 0, shares_vm: true })
    }

    /// # Errors
    /// The call is refused.
    pub fn create(&mut self, change: impl FnOnce(&mut api::CreateTaskRequest)) -> Result<()> {
        let mut request = self.shim.create_request();
        change(&mut request);
        let created: api::CreateTaskResponse = self.client.ok("Create", &request)?;
        self.pid = created.pid;
        Ok(())
    }

    /// Creates the container from a checkpoint. A container in the VM of another one names the checkpoint's digest.
    ///
    /// # Errors
    /// The call is refused.
    pub fn create_from(&mut self, checkpoint: &Path) -> Result<()> {
        if self.shares_vm {
            self.trust(checkpoint)?;
        }
        self.create(|request| request.checkpoint = checkpoint.display().to_string())
    }

    /// Lets the container be restored from this checkpoint in the VM of another container.
    ///
    /// # Errors
    /// The checkpoint has no manifest, or the bundle's configuration cannot be changed.
    pub fn trust(&self, checkpoint: &Path) -> Result<()> {
        let manifest = fs::read(checkpoint.join("machinen.json"))?;
        self.pin(&format!("sha256:{}", hex(&Sha256::digest(manifest))))
    }

    /// Has the container restored only from the checkpoint with this digest.
    ///
    /// # Errors
    /// The bundle's configuration cannot be changed.
    pub fn pin(&self, digest: &str) -> Result<()> {
        let path = self.shim.bundle.join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
        config["annotations"]["io.machinen.checkpoint-digest"] = digest.into();
        Ok(fs::write(path, config.to_string())?)
    }

    /// # Errors
    /// The call is refused.
    pub fn begin(&self) -> Result<()> {
        self.client.ok::<api::StartResponse>("Start", &self.start("")).map(drop)
    }

    /// Runs a command in the container, whose output goes to `stdout`, and returns its status.
    ///
    /// # Errors
    /// A call is refused.
    pub fn exec_to(&self, exec_id: &str, args: &[&str], stdout: &str) -> Result<u32> {
        let request = api::ExecProcessRequest { stdout: stdout.to_owned(), ..self.exec(exec_id, args) };
        self.client.ok::<api::Empty>("Exec", &request)?;
        self.client.ok::<api::StartResponse>("Start", &self.start(exec_id))?;
        let status = self.wait(exec_id)?.exit_status;
        self.client.ok::<api::DeleteResponse>("Delete", &self.delete(exec_id))?;
        Ok(status)
    }

    /// Runs a shell script in the container, and returns its status and output.
    ///
    /// # Errors
    /// A call is refused, or the output cannot be read.
    pub fn shell(&self, script: &str) -> Result<(u32, String)> {
        let path = self.shim.bundle.join("output");
        let status = self.exec_to("shell", &["sh", "-c", script], &format!("file://{}", path.display()))?;
        let output = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        fs::remove_file(path)?;
        Ok((status, output))
    }

    pub fn exec(&self, exec_id: &str, args: &[&str]) -> api::ExecProcessRequest {
        let process = json!({
            "user": {"uid": 0, "gid": 0}, "args": args, "env": ["PATH=/bin"], "cwd": "/",
            "capabilities": {"bounding": ["CAP_KILL"]},
        });
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: process.to_string().into_bytes(),
            ..Default::default()
        };
        let (id, exec_id) = (self.shim.id.clone(), exec_id.to_owned());
        api::ExecProcessRequest { id, exec_id, spec: MessageField::some(spec), ..Default::default() }
    }

    pub fn start(&self, exec_id: &str) -> api::StartRequest {
        api::StartRequest { id: self.shim.id.clone(), exec_id: exec_id.to_owned(), ..Default::default() }
    }

    pub fn delete(&self, exec_id: &str) -> api::DeleteRequest {
        api::DeleteRequest { id: self.shim.id.clone(), exec_id: exec_id.to_owned(), ..Default::default() }
    }

    pub fn kill(&self, exec_id: &str, number: u32) -> api::KillRequest {
        let (id, exec_id) = (self.shim.id.clone(), exec_id.to_owned());
        api::KillRequest { id, exec_id, signal: number, ..Default::default() }
    }

    /// # Errors
    /// The call is refused.
    pub fn state(&self, exec_id: &str) -> Result<api::StateResponse> {
        let (id, exec_id) = (self.shim.id.clone(), exec_id.to_owned());
        self.client.ok("State", &api::StateRequest { id, exec_id, ..Default::default() })
    }

    /// # Errors
    /// The call is refused.
    pub fn wait(&self, exec_id: &str) -> Result<api::WaitResponse> {
        let (id, exec_id) = (self.shim.id.clone(), exec_id.to_owned());
        self.client.ok("Wait", &api::WaitRequest { id, exec_id, ..Default::default() })
    }

    /// Checks the status and pid of a process.
    ///
    /// # Errors
    /// The status or the pid differs, or the call is refused.
    pub fn is(&self, exec_id: &str, status: api::Status, pid: u32) -> Result<()> {
        let state = self.state(exec_id)?;
        ensure!(state.status == EnumOrUnknown::new(status) && state.pid == pid, "{state:?}");
        ensure!(state.exec_id == exec_id && state.id == self.shim.id, "{state:?}");
        Ok(())
    }

    /// # Errors
    /// A call is refused, or the shim does not end.
    pub fn end(&self) -> Result<()> {
        self.client.ok::<api::Empty>("Kill", &self.kill("", 9))?;
        self.wait("")?;
        self.end_stopped()
    }

    /// Removes a container that has ended, or was never started, and its shim.
    ///
    /// # Errors
    /// A call is refused, or the shim does not end.
    pub fn end_stopped(&self) -> Result<()> {
        self.client.ok::<api::DeleteResponse>("Delete", &self.delete(""))?;
        self.shim.shut_down(&self.client)
    }
}
