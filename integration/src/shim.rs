//! The shim without containerd's client: its command line, and direct calls of its task API.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::{api, protobuf::Message, types::introspection::RuntimeInfo};
use ttrpc::{Code, Error};

use crate::{containerd::Containerd, paths, process::wait_for_end};

/// The task API's name, as containerd 2 and newer call it.
pub const V3: &str = "containerd.task.v3.Task";

/// Longest that a call may take, nanoseconds.
const TIMEOUT: i64 = 120_000_000_000;

/// A bundle as containerd would make it, and the shim that serves it.
#[derive(Debug)]
pub struct Shim<'a> {
    containerd: &'a Containerd,
    pub id: String,
    pub bundle: PathBuf,
}

/// The output of a run of the shim's binary.
#[derive(Debug)]
pub struct Printed {
    pub status: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

/// A connection to a serving shim.
#[derive(Clone)]
#[expect(missing_debug_implementations, reason = "ttrpc's client has none")]
pub struct Client {
    client: ttrpc::Client,
    service: &'static str,
}

impl<'a> Shim<'a> {
    /// Makes the bundle's directory, without a `config.json`.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn new(containerd: &'a Containerd) -> Result<Self> {
        let id = containerd.new_id();
        let bundle = containerd.bundle(&id);
        fs::create_dir_all(bundle.join("rootfs"))
            .with_context(|| format!("cannot make {}", bundle.display()))?;
        Ok(Self { containerd, id, bundle })
    }

    /// Like [`Shim::serve`], with shell commands that run first.
    ///
    /// # Errors
    /// As for [`Shim::serve`].
    pub fn serve_in(&self, environment: &str) -> Result<String> {
        self.announced(self.start_in(environment)?)
    }

    /// `start`, as a containerd of that protocol version runs it; 0: the version is not passed.
    ///
    /// # Errors
    /// The binary cannot be run.
    pub fn start(&self, max_version: u32) -> Result<Printed> {
        let version =
            if max_version > 0 { format!("export MAX_SHIM_VERSION={max_version}") } else { String::new() };
        self.start_in(&version)
    }

    /// `start` with these bytes on standard input.
    ///
    /// # Errors
    /// The binary cannot be run.
    pub fn start_with(&self, input: &[u8]) -> Result<Printed> {
        self.make_log()?;
        self.run_with("", "start", input)
    }

    fn start_in(&self, environment: &str) -> Result<Printed> {
        self.make_log()?;
        self.run(environment, "start")
    }

    fn make_log(&self) -> Result<()> {
        // Takes the place of the fifo that containerd makes before the call, and reads.
        fs::File::options().create(true).append(true).open(self.bundle.join("log"))?;
        Ok(())
    }

    /// Starts the shim, and returns the address of its socket.
    ///
    /// # Errors
    /// The shim does not start, or prints something that would confuse containerd.
    pub fn serve(&self) -> Result<String> {
        self.announced(self.start(0)?)
    }

    fn announced(&self, printed: Printed) -> Result<String> {
        ensure!(printed.status == 0 && printed.stderr.is_empty(), "{}: {printed:?}", self.id);
        Ok(String::from_utf8(printed.stdout)?.trim().to_owned())
    }

    /// Ends a shim without containers, waits until it has ended, and removes the bundle.
    ///
    /// # Errors
    /// The shim does not end.
    pub fn shut_down(&self, client: &Client) -> Result<()> {
        let id = || self.id.clone();
        let connected: api::ConnectResponse =
            client.ok("Connect", &api::ConnectRequest { id: id(), ..Default::default() })?;
        client.ok::<api::Empty>("Shutdown", &api::ShutdownRequest { id: id(), ..Default::default() })?;
        ensure!(
            wait_for_end(connected.shim_pid, Duration::from_secs(3))?,
            "the shim still runs after Shutdown"
        );
        Ok(fs::remove_dir_all(&self.bundle)?)
    }

    /// The shim's log.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.bundle.join("log"))?)
    }

    /// `delete`, as containerd runs it when the shim is dead.
    ///
    /// # Errors
    /// The binary cannot be run.
    pub fn delete(&self) -> Result<(Printed, api::DeleteResponse)> {
        let printed = self.run("", &format!("-bundle {} delete", self.bundle.display()))?;
        let response = api::DeleteResponse::parse_from_bytes(&printed.stdout);
        let response = response.with_context(|| format!("delete printed no DeleteResponse: {printed:?}"))?;
        Ok((printed, response))
    }

    /// `-info`, as containerd 2.2 and newer call it once.
    ///
    /// # Errors
    /// The binary cannot be run, or its output is not the message that containerd expects.
    pub fn info(&self) -> Result<(Printed, RuntimeInfo)> {
        self.info_with(&[])
    }

    /// The same with these bytes on standard input.
    ///
    /// # Errors
    /// As for [`Shim::info`].
    pub fn info_with(&self, input: &[u8]) -> Result<(Printed, RuntimeInfo)> {
        let printed = self.run_with("", "-info", input)?;
        let info = RuntimeInfo::parse_from_bytes(&printed.stdout);
        let info = info.with_context(|| format!("-info printed no RuntimeInfo: {printed:?}"))?;
        Ok((printed, info))
    }

    fn run(&self, environment: &str, action: &str) -> Result<Printed> {
        self.run_with(environment, action, &[])
    }

    fn run_with(&self, environment: &str, action: &str, input: &[u8]) -> Result<Printed> {
        let root = self.containerd.root();
        let (bundle, socket) = (self.bundle.display(), self.containerd.socket());
        let output = |name: &str| root.join(format!("shim-{}.{name}", self.id));
        let (stdin, stdout, stderr, status) = (output("in"), output("out"), output("err"), output("status"));
        fs::write(&stdin, input)?;
        self.containerd.run_script(&format!(
            "cd {bundle}\nexport TTRPC_ADDRESS={socket}.ttrpc GRPC_ADDRESS={socket} NAMESPACE={namespace}\n\
             {environment}\n{binary} -namespace {namespace} -id {id} -address {socket} \
             -publish-binary /bin/true -debug {action} <{stdin} >{stdout} 2>{stderr}\necho $? >{status}\n",
            socket = socket.display(),
            namespace = self.containerd.namespace(),
            binary = paths::release_dir()?.join("containerd-shim-machinen-v1").display(),
            id = self.id,
            stdin = stdin.display(),
            stdout = stdout.display(),
            stderr = stderr.display(),
            status = status.display(),
        ))?;
        let status = fs::read_to_string(&status).context("the shim's binary was not run")?;
        Ok(Printed {
            status: status.trim().parse()?,
            stdout: fs::read(&stdout)?,
            stderr: fs::read_to_string(&stderr)?,
        })
    }

    /// A request that names this container and its bundle.
    pub fn create_request(&self) -> api::CreateTaskRequest {
        api::CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle.display().to_string(),
            ..Default::default()
        }
    }
}

impl Client {
    /// Connects to the address that `start` printed; `service` is the task API's name.
    ///
    /// # Errors
    /// No shim listens there.
    pub fn connect(address: &str, service: &'static str) -> Result<Self> {
        let client = ttrpc::Client::connect(address);
        let client = client.with_context(|| format!("cannot connect to the shim at {address}"))?;
        Ok(Self { client, service })
    }

    /// Calls a method; the shim's refusal is a result.
    ///
    /// # Errors
    /// The connection broke, or the answer cannot be decoded.
    pub fn call<Answer: Message>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<Result<Answer, (Code, String)>> {
        let request = ttrpc::Request {
            service: self.service.to_owned(),
            method: method.to_owned(),
            payload: request.write_to_bytes()?,
            timeout_nano: TIMEOUT,
            ..Default::default()
        };
        match self.client.request(request) {
            Ok(response) => {
                let answer = Answer::parse_from_bytes(&response.payload);
                Ok(Ok(answer.with_context(|| format!("odd answer to {method}"))?))
            }
            Err(Error::RpcStatus(status)) => Ok(Err((status.code(), status.message))),
            Err(error) => bail!("{method} was not answered: {error}"),
        }
    }

    /// Calls a method that must succeed.
    ///
    /// # Errors
    /// The method was refused.
    pub fn ok<Answer: Message>(&self, method: &str, request: &impl Message) -> Result<Answer> {
        match self.call(method, request)? {
            Ok(answer) => Ok(answer),
            Err((code, message)) => bail!("{method} was refused: {code:?}: {message}"),
        }
    }

    /// Calls a method that must be refused, and returns the code and the message.
    ///
    /// # Errors
    /// The method was not refused.
    pub fn refused(&self, method: &str, request: &impl Message) -> Result<(Code, String)> {
        match self.call::<api::Empty>(method, request) {
            Ok(Err(refusal)) => Ok(refusal),
            _ => bail!("{method} was not refused"),
        }
    }
}
