//! Running one program, and checking what must be true of it.

use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::Mutex,
    thread::{Scope, sleep},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::{
    api,
    protobuf::{Message, MessageField, well_known_types::any::Any},
};
use machinen_integration::{bundle::Bundle, containerd::Containerd, served::Served};
use nix::{sys::stat::Mode, unistd::mkfifo};
use ttrpc::Code;

use super::program::{EXECS, Lane, Program, Request, Target};

/// Permitted codes for a request that the shim does not carry out now.
const REFUSALS: [Code; 4] =
    [Code::NOT_FOUND, Code::ALREADY_EXISTS, Code::FAILED_PRECONDITION, Code::UNAVAILABLE];

/// The number of kinds of requests.
const KINDS: usize = 14;

/// How often each kind of request was made, and how often it was carried out.
#[derive(Debug, Default)]
pub(super) struct Totals(BTreeMap<&'static str, (usize, usize)>);

impl Totals {
    pub(super) fn all_seen(&self) -> bool {
        // A fake VM has no CRIU, and none of these processes has a terminal.
        let refused = ["Checkpoint", "ResizePty"];
        self.0.len() == KINDS && self.0.iter().all(|(kind, &(_, done))| done > 0 || refused.contains(kind))
    }

    fn count(&mut self, kind: &'static str, carried_out: bool) {
        let (made, done) = self.0.entry(kind).or_default();
        *made += 1;
        *done += usize::from(carried_out);
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: usize = self.0.values().map(|(made, _)| made).sum();
        write!(f, "{all} requests (made/carried out):")?;
        self.0.iter().try_for_each(|(kind, (made, done))| write!(f, " {kind} {made}/{done}"))
    }
}

/// A container and what its clients have done to it.
struct Case<'a> {
    served: Served<'a>,
    program: &'a Program,
    inputs: Vec<Input>,
    seen: Mutex<Seen>,
}

/// The files of a process's input and output.
#[derive(Debug)]
struct Input {
    fifo: PathBuf,
    output: PathBuf,
    content: Option<Vec<u8>>,
}

#[derive(Debug, Default)]
struct Seen {
    /// Kind of each request, and whether it was carried out.
    answers: Vec<(&'static str, bool)>,
    /// Processes whose output may be short: a client had them killed or removed, or used their id again.
    disturbed: Vec<Target>,
    started: Vec<Target>,
    added: Vec<usize>,
    /// Errors of the clients' threads that write input.
    troubles: Vec<String>,
}

/// # Errors
/// A check fails.
pub(super) fn run(
    containerd: &Containerd,
    rootfs: &Bundle,
    program: &Program,
    totals: &mut Totals,
) -> Result<()> {
    let from = containerd.log().position();
    let served = Served::of(containerd, &rootfs.config(&["cat"], |_| ())?)?;
    let case = Case::new(served, program)?;
    case.request(Request::Create)?;
    if program.started {
        case.request(Request::Start(Target::Init))?;
    }
    std::thread::scope(|scope| -> Result<()> {
        if program.init_input.is_some() {
            scope.spawn(|| case.feed(Target::Init));
        }
        let lanes: Vec<_> = program.lanes.iter().map(|lane| scope.spawn(|| case.lane(scope, lane))).collect();
        let ran = lanes.into_iter().try_for_each(|lane| lane.join().expect("a lane does not panic"));
        let finished = ran.and_then(|()| case.finish());
        case.release_clients()?;
        finished
    })?;
    let seen = case.seen.into_inner().expect("no lane panics");
    ensure!(seen.troubles.is_empty(), "{:?}", seen.troubles);
    for (kind, carried_out) in &seen.answers {
        totals.count(kind, *carried_out);
    }
    case.served.shim.shut_down(&case.served.client)?;
    events_in_order(containerd, from, &seen)
}

impl<'a> Case<'a> {
    fn new(served: Served<'a>, program: &'a Program) -> Result<Self> {
        let input = |name: String, size: Option<usize>| -> Result<Input> {
            let (fifo, output) =
                (served.shim.bundle.join(&name), served.shim.bundle.join(format!("{name}.out")));
            mkfifo(&fifo, Mode::S_IRWXU)?;
            let content = size.map(|size| (0..size).map(|byte| (byte % 251) as u8).collect());
            Ok(Input { fifo, output, content })
        };
        let mut inputs = vec![input("init".to_owned(), program.init_input)?];
        for (number, &size) in program.exec_input.iter().enumerate() {
            inputs.push(input(format!("exec-{number}"), Some(size))?);
        }
        Ok(Self { served, program, inputs, seen: Mutex::default() })
    }

    fn input(&self, target: Target) -> &Input {
        match target {
            Target::Init => &self.inputs[0],
            Target::Exec(number) => &self.inputs[number + 1],
        }
    }

    #[expect(clippy::disallowed_methods, reason = "when a request is made is a part of the random program")]
    fn lane<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, lane: &Lane) -> Result<()> {
        for &(pause, request) in lane {
            sleep(Duration::from_micros(pause));
            let carried_out = self.request(request)?;
            if let Request::Exec(number) = request
                && carried_out
            {
                scope.spawn(move || self.feed(Target::Exec(number)));
            }
        }
        Ok(())
    }

    fn feed(&self, target: Target) {
        if let Err(error) = self.client(target) {
            self.seen
                .lock()
                .expect("no lane panics")
                .troubles
                .push(format!("input of {target:?}: {error:#}"));
        }
    }

    /// A client's handling of input: opens the fifo, which waits for the reader, writes, and closes stdin.
    fn client(&self, target: Target) -> Result<()> {
        let input = self.input(target);
        let content = input.content.as_deref().unwrap_or_default();
        if !content.is_empty() {
            match File::options().write(true).open(&input.fifo) {
                // The process may have been killed.
                Ok(mut fifo) => _ = fifo.write_all(content),
                // The program has ended.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        let (id, exec_id) = (self.served.shim.id.clone(), name(target));
        let close = api::CloseIORequest { id, exec_id, stdin: true, ..Default::default() };
        self.answered::<api::Empty>("CloseIO", &close).map(drop)
    }

    /// Ends the writers whose process was never started, or takes no more input.
    fn release_clients(&self) -> Result<()> {
        for Input { fifo, .. } in &self.inputs {
            let reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(fifo)?;
            fs::remove_file(fifo)?;
            drop(reader);
        }
        Ok(())
    }

    /// Makes a request; false when it is refused with a permitted code.
    fn request(&self, request: Request) -> Result<bool> {
        // Recorded before the request: the thread that waits for the process must not take it for
        // undisturbed.
        match request {
            Request::Signal(target, _) | Request::Delete(target) => self.disturb(target),
            Request::Create => self.disturb(Target::Init),
            _ => {}
        }
        let carried_out = self.send(request).with_context(|| format!("{request:?}"))?;
        let mut seen = self.seen.lock().expect("no lane panics");
        match request {
            Request::Exec(number) if carried_out => {
                if seen.added.contains(&number) {
                    seen.disturbed.push(Target::Exec(number));
                }
                seen.added.push(number);
            }
            Request::Start(target) if carried_out => seen.started.push(target),
            _ => {}
        }
        Ok(carried_out)
    }

    fn disturb(&self, target: Target) {
        self.seen.lock().expect("no lane panics").disturbed.push(target);
    }

    fn send(&self, request: Request) -> Result<bool> {
        let served = &self.served;
        let id = served.shim.id.clone();
        match request {
            Request::Create => {
                let mut create = served.shim.create_request();
                create.stdin = text(&self.inputs[0].fifo);
                create.stdout = format!("file://{}", text(&self.inputs[0].output));
                self.answered::<api::CreateTaskResponse>("Create", &create)
            }
            Request::Start(target) => {
                self.answered::<api::StartResponse>("Start", &served.start(&name(target)))
            }
            Request::Exec(number) => {
                let input = self.input(Target::Exec(number));
                let exec = api::ExecProcessRequest {
                    stdin: text(&input.fifo),
                    stdout: format!("file://{}", text(&input.output)),
                    ..served.exec(&name(Target::Exec(number)), &["cat"])
                };
                self.answered::<api::Empty>("Exec", &exec)
            }
            Request::Resize(target) => {
                let resize = api::ResizePtyRequest {
                    id,
                    exec_id: name(target),
                    width: 80,
                    height: 25,
                    ..Default::default()
                };
                // Without a terminal the request is refused whenever the process exists; the test only
                // requires an answer.
                self.answered::<api::Empty>("ResizePty", &resize).map(|_| true)
            }
            Request::Signal(target, signal) => {
                self.answered::<api::Empty>("Kill", &served.kill(&name(target), signal))
            }
            Request::Pause => {
                self.answered::<api::Empty>("Pause", &api::PauseRequest { id, ..Default::default() })
            }
            Request::Resume => {
                self.answered::<api::Empty>("Resume", &api::ResumeRequest { id, ..Default::default() })
            }
            Request::Update => {
                let resources = Any {
                    type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
                    // The cgroups that a fake VM's agent gets on the host may have no controllers.
                    value: b"{}".to_vec(),
                    ..Default::default()
                };
                let resources = MessageField::some(resources);
                self.answered::<api::Empty>(
                    "Update",
                    &api::UpdateTaskRequest { id, resources, ..Default::default() },
                )
            }
            Request::Checkpoint => {
                let path = text(&served.shim.bundle.join("checkpoint"));
                let checkpoint = api::CheckpointTaskRequest { id, path, ..Default::default() };
                let answer = served.client.call::<api::Empty>("Checkpoint", &checkpoint)?;
                // Refused since a fake VM has no CRIU; the test requires that the other requests are
                // unaffected.
                self.count("Checkpoint", answer.is_ok());
                Ok(answer.is_ok())
            }
            Request::State(target) => {
                let state = api::StateRequest { id, exec_id: name(target), ..Default::default() };
                self.answered::<api::StateResponse>("State", &state)
            }
            Request::Pids => {
                self.answered::<api::PidsResponse>("Pids", &api::PidsRequest { id, ..Default::default() })
            }
            Request::Stats => {
                self.answered::<api::StatsResponse>("Stats", &api::StatsRequest { id, ..Default::default() })
            }
            Request::Delete(target) => {
                self.answered::<api::DeleteResponse>("Delete", &served.delete(&name(target)))
            }
        }
    }

    fn answered<Answer: Message>(&self, method: &'static str, request: &impl Message) -> Result<bool> {
        let answer = self.served.client.call::<Answer>(method, request)?;
        self.count(method, answer.is_ok());
        match answer {
            Ok(_) => Ok(true),
            Err((code, _)) if REFUSALS.contains(&code) => Ok(false),
            Err((code, message)) => bail!("{method} was answered with {code:?}: {message}"),
        }
    }

    fn count(&self, method: &'static str, carried_out: bool) {
        self.seen.lock().expect("no lane panics").answers.push((method, carried_out));
    }

    /// Ends all that the clients have left, as a user would, and checks the output.
    fn finish(&self) -> Result<()> {
        self.request(Request::Resume)?;
        for target in (0..EXECS).map(Target::Exec) {
            self.complete(target)?;
        }
        if self.program.init_input.is_some() {
            self.complete(Target::Init)?;
        }
        self.request(Request::Signal(Target::Init, 9))?;
        if self.request(Request::State(Target::Init))? && !self.request(Request::Delete(Target::Init))? {
            self.served.wait("")?;
            ensure!(self.request(Request::Delete(Target::Init))?, "a stopped container is not deleted");
        }
        Ok(())
    }

    /// A started process ends when its input does, and has written all of it.
    fn complete(&self, target: Target) -> Result<()> {
        let (started, disturbed) = {
            let seen = self.seen.lock().expect("no lane panics");
            // The end of an init ends the other processes.
            let init = seen.disturbed.iter().filter(|&&target| target == Target::Init).count();
            let ended = init > 1 || (target != Target::Init && self.program.init_input.is_some());
            (
                seen.started.contains(&target),
                ended || (target != Target::Init && seen.disturbed.contains(&target)),
            )
        };
        if !started || disturbed {
            return Ok(());
        }
        let exit = self.served.wait(&name(target))?;
        ensure!(exit.exit_status == 0, "{target:?} has ended with {exit:?}");
        let input = self.input(target);
        let output = fs::read(&input.output)?;
        let content = input.content.as_deref().unwrap_or_default();
        ensure!(output == content, "{target:?} got {} bytes of {}", output.len(), content.len());
        Ok(())
    }
}

/// A container's own events: it is created, started at most once, and deleted.
fn events_in_order(containerd: &Containerd, from: usize, seen: &Seen) -> Result<()> {
    let carried_out =
        |kind: &str| seen.answers.iter().filter(|&&(method, done)| method == kind && done).count();
    for _ in 0..carried_out("Create") {
        containerd.log().wait_for_event(from, "/tasks/delete")?;
    }
    let events = containerd.log().events(from);
    let own: Vec<_> = events
        .iter()
        .filter(|topic| ["/tasks/create", "/tasks/start", "/tasks/delete"].contains(&topic.as_str()))
        .map(String::as_str)
        .collect();
    let starts = seen.started.iter().filter(|&&target| target == Target::Init).count();
    let count = |topic| own.iter().filter(|&&event| event == topic).count();
    ensure!(
        count("/tasks/create") == carried_out("Create") && count("/tasks/start") == starts,
        "{own:?} after {} creates and {starts} starts",
        carried_out("Create"),
    );
    let mut last = "/tasks/delete";
    for event in own {
        let follows = match event {
            "/tasks/create" => last == "/tasks/delete",
            "/tasks/start" => last == "/tasks/create",
            _ => last != "/tasks/delete",
        };
        ensure!(follows, "{event} follows {last}");
        last = event;
    }
    Ok(())
}

/// The name of a process in the task API.
fn name(target: Target) -> String {
    match target {
        Target::Init => String::new(),
        Target::Exec(number) => format!("e{number}"),
    }
}

fn text(path: &std::path::Path) -> String {
    path.display().to_string()
}
