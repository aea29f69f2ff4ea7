//! The host's side of the channel, and an agent to talk to.

mod exec;
mod rootfs;
mod spec;
pub(crate) mod vm;

use std::{
    io,
    os::{fd::AsRawFd, unix::net::UnixStream as StdUnixStream},
    path::Path,
    process::ExitStatus,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use machinen_protocol::{
    api::{self, AgentClient},
    preamble::{ANSWER_LEN, Answer, PREAMBLE_LEN, Preamble, StreamKind},
};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::{mpsc, oneshot},
};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};
use ttrpc::r#async::transport::Socket;
use yamux::{Config, Connection, Mode};

use self::vm::Vm;
pub(crate) use self::{rootfs::Disks, spec::Spec};

pub(crate) type RawStream = Compat<yamux::Stream>;

/// Deadline of each step of these tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A running agent.
pub(crate) struct Guest {
    pub(crate) agent: AgentClient,
    pub(crate) disks: Disks,
    dial: mpsc::Sender<oneshot::Sender<yamux::Stream>>,
    process: Option<tokio::process::Child>,
    vm: Option<Vm>,
    next_token: u64,
}

impl Guest {
    /// Starts the agent as a process, or in a VM if MACHINEN_TEST_VM is set. All tests hold for both.
    pub(crate) async fn start() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests make containers: run them as root");
        let disks = Disks::new();
        if std::env::var_os("MACHINEN_TEST_VM").is_some() {
            return Vm::boot(disks).await;
        }
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        // The agent ends when the stream does, and then cleans up, which a killed agent could not.
        #[expect(clippy::disallowed_methods, reason = "the process under test")]
        let process = tokio::process::Command::new(env!("CARGO_BIN_EXE_machinen-agent"))
            .args(["--serial-fd", &theirs.as_raw_fd().to_string(), "--disk-dir"])
            .arg(disks.path())
            .spawn()
            .unwrap();
        drop(theirs);
        ours.set_nonblocking(true).unwrap();
        let mut guest = Self::over(UnixStream::from_std(ours).unwrap(), disks).await;
        guest.process = Some(process);
        guest
    }

    /// Serves the other side of a byte stream.
    pub(crate) async fn over(stream: UnixStream, disks: Disks) -> Self {
        let (dial, requests) = mpsc::channel(1);
        let (inbound, mut accepted) = mpsc::channel(1);
        let connection = Connection::new(stream.compat(), Config::default(), Mode::Client);
        tokio::spawn(drive(connection, requests, inbound));
        let control = within(accepted.recv()).await.expect("the agent opens a stream");
        let mut control = control.compat();
        let mut bytes = [0; PREAMBLE_LEN];
        within(control.read_exact(&mut bytes)).await.unwrap();
        assert_eq!(Preamble::decode(&bytes), Ok(Preamble { kind: StreamKind::Control, token: 0 }));
        control.write_all(&Answer::Accepted.encode()).await.unwrap();
        let agent = AgentClient::new(ttrpc::r#async::Client::new(Socket::new(control)));
        Self { agent, disks, dial, process: None, vm: None, next_token: 1 }
    }

    /// Opens a raw stream.
    pub(crate) async fn stream(&mut self) -> (u64, RawStream) {
        let token = self.next_token;
        self.next_token += 1;
        let (stream, answer) = self.greet(Preamble { kind: StreamKind::Raw, token }.encode()).await;
        assert_eq!(answer.unwrap(), Answer::Accepted);
        (token, stream)
    }

    /// Opens a stream with arbitrary first bytes.
    pub(crate) async fn greet(&self, bytes: [u8; PREAMBLE_LEN]) -> (RawStream, io::Result<Answer>) {
        let (reply, dialled) = oneshot::channel();
        self.dial.send(reply).await.unwrap();
        let mut stream = dialled.await.unwrap().compat();
        stream.write_all(&bytes).await.unwrap();
        let mut answer = [0; ANSWER_LEN];
        let read = within(stream.read_exact(&mut answer)).await;
        (stream, read.map(|_| Answer::decode(&answer).unwrap()))
    }

    pub(crate) async fn configure(&self) -> ttrpc::Result<api::ConfigureResponse> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let request = api::ConfigureRequest {
            realtime_ns: i64::try_from(now.as_nanos()).unwrap(),
            entropy: vec![7; 64],
            hostname: "guest".into(),
            machine_id: "0123456789abcdef".repeat(2),
            ..Default::default()
        };
        self.agent.configure(context(), &request).await
    }

    /// Creates a container without streams.
    pub(crate) async fn create(&self, id: &str, spec: &Spec) -> ttrpc::Result<api::CreateContainerResponse> {
        self.create_with(id, spec, api::Stdio::default()).await
    }

    pub(crate) async fn create_with(
        &self,
        id: &str,
        spec: &Spec,
        stdio: api::Stdio,
    ) -> ttrpc::Result<api::CreateContainerResponse> {
        let rootfs = self.disks.rootfs(id);
        if let Some(vm) = &self.vm {
            vm.attach(&self.disks, &rootfs);
        }
        self.create_on(id, spec, stdio, rootfs).await
    }

    /// Creates a container without attaching its disks.
    pub(crate) async fn create_without_disks(
        &self,
        id: &str,
        spec: &Spec,
    ) -> ttrpc::Result<api::CreateContainerResponse> {
        let disk = |lun| Some(api::Disk { target: 7, lun, ..Default::default() }).into();
        let rootfs = api::Rootfs { base: disk(77), writable: disk(78), ..Default::default() };
        self.create_on(id, spec, api::Stdio::default(), rootfs).await
    }

    async fn create_on(
        &self,
        id: &str,
        spec: &Spec,
        stdio: api::Stdio,
        rootfs: api::Rootfs,
    ) -> ttrpc::Result<api::CreateContainerResponse> {
        let request = api::CreateContainerRequest {
            container_id: id.into(),
            oci_config: spec.bytes(id),
            rootfs: Some(rootfs).into(),
            stdio: Some(stdio).into(),
            files: spec.files.clone(),
            ..Default::default()
        };
        self.agent.create_container(context(), &request).await
    }

    pub(crate) async fn start_container(&self, id: &str) -> ttrpc::Result<api::Empty> {
        self.agent.start_container(context(), &container(id)).await
    }

    pub(crate) async fn wait(&self, id: &str) -> api::WaitProcessResponse {
        self.wait_exec(id, "").await
    }

    /// The init is "".
    pub(crate) async fn wait_exec(&self, id: &str, exec: &str) -> api::WaitProcessResponse {
        let request = process(id, exec);
        self.agent.wait_process(context(), &request).await.unwrap()
    }

    pub(crate) async fn signal(&self, id: &str, signal: i32, all: bool) -> ttrpc::Result<api::Empty> {
        self.signal_exec(id, "", signal, all).await
    }

    pub(crate) async fn signal_exec(
        &self,
        id: &str,
        exec: &str,
        signal: i32,
        all: bool,
    ) -> ttrpc::Result<api::Empty> {
        let request = api::SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            signal: signal.unsigned_abs(),
            all,
            ..Default::default()
        };
        self.agent.signal_process(context(), &request).await
    }

    pub(crate) async fn delete(&self, id: &str) -> ttrpc::Result<api::Empty> {
        self.agent.delete_container(context(), &container(id)).await
    }

    /// Runs a container to its end; returns its output and its status.
    pub(crate) async fn run(&mut self, spec: &Spec) -> Output {
        self.run_with_input(spec, b"").await
    }

    pub(crate) async fn run_with_input(&mut self, spec: &Spec, input: &[u8]) -> Output {
        let id = "c";
        let (stdin, mut to_stdin) = self.stream().await;
        let (stdout, mut from_stdout) = self.stream().await;
        let (stderr, mut from_stderr) = self.stream().await;
        let stdio = api::Stdio { stdin, stdout, stderr, ..Default::default() };
        self.create_with(id, spec, stdio).await.unwrap();
        self.start_container(id).await.unwrap();
        let streams = (&mut to_stdin, &mut from_stdout, &mut from_stderr);
        let output = self.converse(id, "", input, streams).await;
        self.delete(id).await.unwrap();
        output
    }

    /// Sends a process its input, and reads its output until it has ended.
    async fn converse(
        &self,
        id: &str,
        exec: &str,
        input: &[u8],
        (to_stdin, from_stdout, from_stderr): (&mut RawStream, &mut RawStream, &mut RawStream),
    ) -> Output {
        let feed = async {
            // A process that does not read its stdin may end before it is written.
            if to_stdin.write_all(input).await.is_ok() {
                let _ = self.end_exec_stdin(id, exec, input.len() as u64).await;
            }
        };
        let (mut out, mut err) = (Vec::new(), Vec::new());
        // Reading must continue while this waits, since the agent holds at most one buffer.
        let read_out = read_until_ended(from_stdout, &mut out);
        let read_err = read_until_ended(from_stderr, &mut err);
        let ((), ended) = tokio::select! {
            done = async { tokio::join!(feed, self.wait_exec(id, exec)) } => done,
            _ = read_out => unreachable!("reads until dropped"),
            _ = read_err => unreachable!("reads until dropped"),
        };
        read_to(from_stdout, &mut out, ended.stdout_bytes).await;
        read_to(from_stderr, &mut err, ended.stderr_bytes).await;
        Output {
            code: ended.exit_status,
            stdout: String::from_utf8_lossy(&out).into_owned(),
            stderr: String::from_utf8_lossy(&err).into_owned(),
        }
    }

    pub(crate) async fn end_stdin(&self, id: &str, total: u64) -> ttrpc::Result<api::Empty> {
        self.end_exec_stdin(id, "", total).await
    }

    async fn end_exec_stdin(&self, id: &str, exec: &str, total: u64) -> ttrpc::Result<api::Empty> {
        let request = api::EndStdinRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            total_bytes: total,
            ..Default::default()
        };
        self.agent.end_stdin(context(), &request).await
    }

    /// Shuts the agent down; returns how its process, or its VM's, has ended.
    pub(crate) async fn shutdown(mut self) -> ExitStatus {
        within(self.agent.shutdown(context(), &api::Empty::new())).await.unwrap();
        match (self.process.take(), self.vm.take()) {
            (Some(mut process), _) => within(process.wait()).await.unwrap(),
            (None, Some(vm)) => vm.ended().await,
            (None, None) => unreachable!("it runs somewhere"),
        }
    }

    pub(crate) fn vm(&self) -> &Vm {
        self.vm.as_ref().expect("it runs in a VM")
    }

    /// Whether the agent's kernel has a controller; a VM's has all of them.
    pub(crate) fn has_controller(&self, name: &str) -> bool {
        if self.vm.is_some() {
            return true;
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let root =
            mounts.lines().find(|line| line.contains(" - cgroup2 ")).and_then(|line| line.split(' ').nth(4));
        let all = std::fs::read_to_string(Path::new(root.unwrap()).join("cgroup.controllers")).unwrap();
        all.split_whitespace().any(|controller| controller == name)
    }

    /// The number of containers of which the agent keeps anything; unknown for a VM.
    pub(crate) fn containers_left(&self) -> usize {
        if self.vm.is_some() {
            return 0;
        }
        std::fs::read_dir(self.state_dir()).unwrap().count()
    }

    fn state_dir(&self) -> std::path::PathBuf {
        let pid = self.process.as_ref().and_then(tokio::process::Child::id).expect("it is a process");
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let inner = children.split_whitespace().next().expect("the agent's inner process");
        Path::new("/proc").join(inner).join("root/run/machinen")
    }
}

#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) code: u32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

async fn read_until_ended(stream: &mut RawStream, into: &mut Vec<u8>) {
    while let Ok(length @ 1..) = stream.read_buf(into).await {
        let _ = length;
    }
    std::future::pending::<()>().await;
}

async fn read_to(stream: &mut RawStream, into: &mut Vec<u8>, total: u64) {
    let left = usize::try_from(total).unwrap() - into.len();
    let mut rest = vec![0; left];
    within(stream.read_exact(&mut rest)).await.unwrap();
    into.extend(rest);
}

/// Waits for the outcome, but not forever.
pub(crate) async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("an answer in time")
}

pub(crate) fn context() -> ttrpc::context::Context {
    ttrpc::context::with_timeout(PATIENCE.as_nanos().try_into().unwrap())
}

pub(crate) fn container(id: &str) -> api::ContainerRequest {
    api::ContainerRequest { container_id: id.into(), ..Default::default() }
}

pub(crate) fn process(id: &str, exec: &str) -> api::ProcessRequest {
    api::ProcessRequest { container_id: id.into(), exec_id: exec.into(), ..Default::default() }
}

/// The status of a call that must fail.
pub(crate) fn status<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result.expect_err("the call fails") {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other}"),
    }
}

async fn drive(
    mut connection: Connection<Compat<UnixStream>>,
    mut requests: mpsc::Receiver<oneshot::Sender<yamux::Stream>>,
    inbound: mpsc::Sender<yamux::Stream>,
) {
    use std::task::Poll;
    enum Event {
        Dial(oneshot::Sender<yamux::Stream>),
        Inbound(yamux::Stream),
        End,
    }
    loop {
        let event = std::future::poll_fn(|cx| {
            if let Poll::Ready(Some(reply)) = requests.poll_recv(cx) {
                return Poll::Ready(Event::Dial(reply));
            }
            connection.poll_next_inbound(cx).map(|next| match next {
                Some(Ok(stream)) => Event::Inbound(stream),
                _ => Event::End,
            })
        });
        match event.await {
            Event::Dial(reply) => {
                let opened = std::future::poll_fn(|cx| connection.poll_new_outbound(cx)).await;
                let Ok(stream) = opened else { return };
                let _ = reply.send(stream);
            }
            Event::Inbound(stream) => {
                let _ = inbound.send(stream).await;
            }
            Event::End => return,
        }
    }
}
