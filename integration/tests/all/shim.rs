//! The shim's command line and its task API, without containerd's client.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::{api, protobuf::EnumOrUnknown};
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    events::EventServer,
    process::wait_for_end,
    shim::{Client, Shim, V3},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use ttrpc::Code;

use crate::harness::on_newest_containerd;

on_newest_containerd!(
    start_answers_as_each_containerd_expects,
    info_describes_the_runtime,
    a_whole_life_on_either_service,
    invalid_configurations,
    delete_from_half_finished_states,
    answers_while_the_guest_hangs,
    refusals_have_the_right_codes,
    creates_of_one_id_at_once,
    calls_that_the_api_does_not_have,
    a_forgotten_server_ends,
    a_create_whose_client_is_gone,
);

const V2: &str = "containerd.task.v2.Task";
const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";

fn connect(shim: &Shim<'_>) -> api::ConnectRequest {
    api::ConnectRequest { id: shim.id.clone(), ..Default::default() }
}

fn state(shim: &Shim<'_>, client: &Client) -> Result<api::StateResponse> {
    client.ok("State", &api::StateRequest { id: shim.id.clone(), ..Default::default() })
}

pub(crate) fn signal(shim: &Shim<'_>, signal: u32) -> api::KillRequest {
    api::KillRequest { id: shim.id.clone(), signal, ..Default::default() }
}

/// Writes a specification into the bundle whose rootfs is busybox in a directory.
pub(crate) fn fill(shim: &Shim<'_>, rootfs: &Bundle, command: &[&str]) -> Result<()> {
    let config = rootfs.config(command, |_| ())?;
    fs::copy(config, shim.bundle.join("config.json"))?;
    Ok(())
}

fn start_answers_as_each_containerd_expects(containerd: &mut Containerd) -> Result<()> {
    for (version, json) in [(0, false), (2, false), (3, true), (4, true)] {
        let shim = Shim::new(containerd)?;
        let printed = shim.start(version)?;
        ensure!(printed.status == 0 && printed.stderr.is_empty(), "{printed:?}");
        let answer = String::from_utf8(printed.stdout)?;
        let address = if json {
            let answer: serde_json::Value = serde_json::from_str(&answer)?;
            ensure!(answer["version"] == 3 && answer["protocol"] == "ttrpc", "{answer}");
            answer["address"].as_str().context("no address")?.to_owned()
        } else {
            answer.trim().to_owned()
        };
        ensure!(address.starts_with("unix:///"), "{answer}");
        shim.shut_down(&Client::connect(&address, V3)?)?;
    }
    Ok(())
}

/// A newer containerd may ask for more; it takes this answer for "not yet".
fn calls_that_the_api_does_not_have(containerd: &mut Containerd) -> Result<()> {
    let shim = Shim::new(containerd)?;
    let address = shim.serve()?;
    for (service, method) in [(SANDBOX, "UpdateSandbox"), (V3, "UpdatePod")] {
        let client = Client::connect(&address, service)?;
        let (code, message) = client.refused(method, &api::Empty::new())?;
        ensure!(code == Code::UNIMPLEMENTED, "{service}/{method}: {code:?}: {message}");
    }
    shim.shut_down(&Client::connect(&address, V3)?)
}

/// containerd has started it, and never connects.
fn a_forgotten_server_ends(containerd: &mut Containerd) -> Result<()> {
    let shim = Shim::new(containerd)?;
    let address = shim.serve()?;
    let pid = fs::read_to_string(shim.bundle.join("shim.pid"))?.trim().parse()?;
    ensure!(wait_for_end(pid, Duration::from_secs(60))?, "the server runs on");
    let socket = address.trim_start_matches("unix://");
    ensure!(!Path::new(socket).exists(), "{socket} is left");
    Ok(fs::remove_dir_all(&shim.bundle)?)
}

/// containerd gives up a Create by a Delete, which waits for it, and then by a Shutdown.
fn a_create_whose_client_is_gone(containerd: &mut Containerd) -> Result<()> {
    let rootfs = Bundle::busybox(containerd)?;
    let shim = Shim::new(containerd)?;
    fill(&shim, &rootfs, &["sleep", "1000"])?;
    let client = Client::connect(&shim.serve()?, V3)?;
    let creating = {
        let (client, request) = (client.clone(), shim.create_request());
        thread::spawn(move || client.call::<api::CreateTaskResponse>("Create", &request))
    };
    let end = Instant::now() + Duration::from_secs(60);
    // Until the shim has begun: before that there is no container.
    let delete = api::DeleteRequest { id: shim.id.clone(), ..Default::default() };
    let deleted = loop {
        match client.call::<api::DeleteResponse>("Delete", &delete)? {
            Err((Code::NOT_FOUND, _)) if Instant::now() < end => thread::yield_now(),
            other => break other,
        }
    };
    let deleted = deleted.map_err(|(code, message)| anyhow::anyhow!("{code:?}: {message}"))?;
    ensure!(deleted.exit_status == 137, "{deleted}");
    creating.join().expect("no panic")?.map_err(|(_, message)| anyhow::anyhow!(message))?;
    ensure!(client.refused("State", &connect(&shim))?.0 == Code::NOT_FOUND, "the container is left");
    shim.shut_down(&client)
}

fn info_describes_the_runtime(containerd: &mut Containerd) -> Result<()> {
    let shim = Shim::new(containerd)?;
    let (printed, info) = shim.info()?;
    ensure!(printed.status == 0 && printed.stderr.is_empty(), "{printed:?}");
    ensure!(info.name == "io.machinen.v1" && !info.version.version.is_empty(), "{info:?}");
    let features: serde_json::Value = serde_json::from_slice(&info.features.value)?;
    ensure!(features["linux"]["cgroup"]["v2"] == true, "{features}");
    let accelerator = info.annotations.get("io.machinen.accelerator").map(String::as_str);
    ensure!(matches!(accelerator, Some("kvm" | "tcg")), "{info:?}");
    let landlock = info.annotations.get("io.machinen.landlock").map(String::as_str);
    ensure!(matches!(landlock, Some("true" | "false")), "{info:?}");
    ensure!(files(&shim)? == ["rootfs"], "-info left something in the bundle");
    fs::remove_dir_all(&shim.bundle)?;
    Ok(())
}

fn a_whole_life_on_either_service(containerd: &mut Containerd) -> Result<()> {
    let rootfs = Bundle::busybox(containerd)?;
    for service in [V2, V3] {
        let shim = Shim::new(containerd)?;
        fill(&shim, &rootfs, &["sleep", "1000"])?;
        let client = Client::connect(&shim.serve()?, service)?;
        let created: api::CreateTaskResponse = client.ok("Create", &shim.create_request())?;
        ensure!(fs::exists(format!("/proc/{}", created.pid))?, "{} is no process of the host", created.pid);
        let now = state(&shim, &client)?;
        ensure!(now.status == EnumOrUnknown::new(api::Status::CREATED) && now.pid == created.pid, "{now:?}");
        let start = api::StartRequest { id: shim.id.clone(), ..Default::default() };
        let started: api::StartResponse = client.ok("Start", &start)?;
        ensure!(started.pid == created.pid, "{started:?}");
        let now = state(&shim, &client)?;
        ensure!(now.status == EnumOrUnknown::new(api::Status::RUNNING), "{now:?}");
        let pids: api::PidsResponse =
            client.ok("Pids", &api::PidsRequest { id: shim.id.clone(), ..Default::default() })?;
        ensure!(pids.processes.iter().any(|process| process.pid == created.pid), "{pids:?}");
        let connected: api::ConnectResponse = client.ok("Connect", &connect(&shim))?;
        ensure!(connected.task_pid == created.pid, "{connected:?}");

        // A shim that is asked to end while a task exists stays.
        let shutdown = api::ShutdownRequest { id: shim.id.clone(), ..Default::default() };
        client.ok::<api::Empty>("Shutdown", &shutdown)?;
        client.ok::<api::Empty>("Kill", &signal(&shim, 9))?;
        let wait = api::WaitRequest { id: shim.id.clone(), ..Default::default() };
        let exit: api::WaitResponse = client.ok("Wait", &wait)?;
        ensure!(exit.exit_status == 137 && exit.exited_at.seconds > 1_700_000_000, "{exit:?}");
        let now = state(&shim, &client)?;
        ensure!(now.status == EnumOrUnknown::new(api::Status::STOPPED) && now.exit_status == 137, "{now:?}");
        let again: api::WaitResponse = client.ok("Wait", &wait)?;
        ensure!(again == exit, "{again:?} after {exit:?}");
        let deleted: api::DeleteResponse =
            client.ok("Delete", &api::DeleteRequest { id: shim.id.clone(), ..Default::default() })?;
        ensure!(deleted.exit_status == 137 && deleted.pid == created.pid, "{deleted:?}");
        shim.shut_down(&client)?;
    }
    Ok(())
}

fn invalid_configurations(containerd: &mut Containerd) -> Result<()> {
    let rootfs = Bundle::busybox(containerd)?;
    for (text, words) in [
        (None, "config.json"),
        (Some(""), "is empty"),
        (Some("{ \"ociVersion\": "), "is not valid"),
        (Some("[]"), "ociVersion"),
        (Some("{ \"ociVersion\": \"1.0.2\" }"), "no process"),
    ] {
        let shim = Shim::new(containerd)?;
        let client = Client::connect(&shim.serve()?, V3)?;
        if let Some(text) = text {
            fs::write(shim.bundle.join("config.json"), text)?;
        }
        let (_, message) = client.refused("Create", &shim.create_request())?;
        ensure!(message.contains(words) && message.contains("config.json"), "{text:?}: {message}");
        // The same shim accepts a correct configuration.
        fill(&shim, &rootfs, &["true"])?;
        client.ok::<api::CreateTaskResponse>("Create", &shim.create_request())?;
        let delete = api::DeleteRequest { id: shim.id.clone(), ..Default::default() };
        client.ok::<api::DeleteResponse>("Delete", &delete)?;
        shim.shut_down(&client)?;
    }
    Ok(())
}

fn delete_from_half_finished_states(containerd: &mut Containerd) -> Result<()> {
    let rootfs = Bundle::busybox(containerd)?;
    for steps in 0..4 {
        let shim = Shim::new(containerd)?;
        fill(&shim, &rootfs, &["sleep", "1000"])?;
        let given = files(&shim)?;
        if steps > 0 {
            let client = Client::connect(&shim.serve()?, V3)?;
            if steps > 1 {
                client.ok::<api::CreateTaskResponse>("Create", &shim.create_request())?;
            }
            if steps > 2 {
                let start = api::StartRequest { id: shim.id.clone(), ..Default::default() };
                client.ok::<api::StartResponse>("Start", &start)?;
            }
        }
        let begun = Instant::now();
        // Twice, since containerd may.
        for _ in 0..2 {
            let (printed, response) = shim.delete()?;
            ensure!(printed.status == 0, "after {steps} steps: {printed:?}");
            ensure!(response.exit_status == 137, "after {steps} steps: {response:?}");
        }
        ensure!(begun.elapsed() < Duration::from_secs(5), "delete took {:?}", begun.elapsed());
        let left = files(&shim)?;
        // The writable layer is removed with the snapshot, which here is the bundle; until then a new start
        // finds it. The log belongs to the caller.
        let others = ["machinen-writable.ext4", "log"];
        let left: Vec<_> = left.into_iter().filter(|name| others.iter().all(|other| name != other)).collect();
        ensure!(left == given, "after {steps} steps delete left {left:?} of {given:?}");
        fs::remove_dir_all(&shim.bundle)?;
    }
    Ok(())
}

fn files(shim: &Shim<'_>) -> Result<Vec<std::ffi::OsString>> {
    let mut names =
        fs::read_dir(&shim.bundle)?.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

fn answers_while_the_guest_hangs(containerd: &mut Containerd) -> Result<()> {
    let rootfs = Bundle::busybox(containerd)?;
    let shim = Shim::new(containerd)?;
    fill(&shim, &rootfs, &["sleep", "1000"])?;
    let client = Client::connect(&shim.serve()?, V3)?;
    client.ok::<api::CreateTaskResponse>("Create", &shim.create_request())?;
    let start = api::StartRequest { id: shim.id.clone(), ..Default::default() };
    client.ok::<api::StartResponse>("Start", &start)?;
    let inventory = containerd.inventory()?;
    let qemu =
        inventory.processes.iter().find(|process| process.command.contains("microvm")).context("no QEMU")?;
    let qemu = Pid::from_raw(i32::try_from(qemu.pid)?);
    kill(qemu, Signal::SIGSTOP)?;
    let begun = Instant::now();
    client.ok::<api::ConnectResponse>("Connect", &connect(&shim))?;
    let pids: api::PidsResponse =
        client.ok("Pids", &api::PidsRequest { id: shim.id.clone(), ..Default::default() })?;
    ensure!(!pids.processes.is_empty(), "no pids");
    ensure!(
        begun.elapsed() < Duration::from_secs(5),
        "a hung guest held the answers up for {:?}",
        begun.elapsed()
    );
    let (printed, _) = shim.delete()?;
    ensure!(printed.status == 0, "{printed:?}");
    fs::remove_dir_all(&shim.bundle)?;
    Ok(())
}

fn refusals_have_the_right_codes(containerd: &mut Containerd) -> Result<()> {
    let rootfs = Bundle::busybox(containerd)?;
    let shim = Shim::new(containerd)?;
    fill(&shim, &rootfs, &["sleep", "1000"])?;
    let client = Client::connect(&shim.serve()?, V3)?;
    let missing = || "missing".to_owned();
    for (method, (code, message)) in [
        ("State", client.refused("State", &api::StateRequest { id: missing(), ..Default::default() })?),
        ("Start", client.refused("Start", &api::StartRequest { id: missing(), ..Default::default() })?),
        (
            "Kill",
            client.refused("Kill", &api::KillRequest { id: missing(), signal: 9, ..Default::default() })?,
        ),
        ("Wait", client.refused("Wait", &api::WaitRequest { id: missing(), ..Default::default() })?),
        ("Delete", client.refused("Delete", &api::DeleteRequest { id: missing(), ..Default::default() })?),
    ] {
        ensure!(
            code == Code::NOT_FOUND && message.contains("missing"),
            "{method} answers {code:?}: {message}"
        );
    }
    client.ok::<api::CreateTaskResponse>("Create", &shim.create_request())?;
    let (code, message) = client.refused("Create", &shim.create_request())?;
    ensure!(code == Code::ALREADY_EXISTS, "a second Create answers {code:?}: {message}");
    let start = api::StartRequest { id: shim.id.clone(), ..Default::default() };
    client.ok::<api::StartResponse>("Start", &start)?;
    let (code, message) = client.refused("Start", &start)?;
    ensure!(code == Code::FAILED_PRECONDITION, "a second Start answers {code:?}: {message}");
    let delete = api::DeleteRequest { id: shim.id.clone(), ..Default::default() };
    let (code, message) = client.refused("Delete", &delete)?;
    ensure!(code == Code::FAILED_PRECONDITION, "Delete of a running task answers {code:?}: {message}");
    client.ok::<api::Empty>("Kill", &signal(&shim, 9))?;
    let wait = api::WaitRequest { id: shim.id.clone(), ..Default::default() };
    let exit: api::WaitResponse = client.ok("Wait", &wait)?;
    ensure!(exit.exit_status == 137, "{exit:?}");
    // The codes that docker and the CRI take for "already gone".
    let (code, message) = client.refused("Kill", &signal(&shim, 9))?;
    ensure!(code == Code::NOT_FOUND, "Kill after the end answers {code:?}: {message}");
    client.ok::<api::DeleteResponse>("Delete", &delete)?;
    shim.shut_down(&client)
}

/// Of two requests at once to create one container, one is served, and the event has what it asked for.
fn creates_of_one_id_at_once(containerd: &mut Containerd) -> Result<()> {
    let rootfs = Bundle::busybox(containerd)?;
    let config = rootfs.config(&["sleep", "1000"], |_| ())?;
    let events = EventServer::start(containerd.root())?;
    for round in 0..2 {
        let shim = Shim::new(containerd)?;
        let other = shim.bundle.join("other");
        fs::create_dir(&other)?;
        fs::copy(&config, shim.bundle.join("config.json"))?;
        fs::copy(&config, other.join("config.json"))?;
        let client = Client::connect(&shim.serve_in(&events.environment())?, V3)?;
        let requests = [(shim.bundle.clone(), "one"), (other, "two")].map(|(bundle, log)| {
            let stdout = format!("file://{}/{log}", shim.bundle.display());
            api::CreateTaskRequest { bundle: bundle.display().to_string(), stdout, ..shim.create_request() }
        });
        let answers = thread::scope(|scope| {
            let calls = requests.each_ref().map(|request| {
                let client = client.clone();
                scope.spawn(move || client.call::<api::CreateTaskResponse>("Create", request))
            });
            calls.map(|call| call.join().expect("no call panics"))
        });
        let [first, second] = answers;
        let (served, pid) = match (first?, second?) {
            (Ok(served), Err((Code::ALREADY_EXISTS, _))) => (&requests[0], served.pid),
            (Err((Code::ALREADY_EXISTS, _)), Ok(served)) => (&requests[1], served.pid),
            answers => bail!("in round {round} the answers are {answers:?}"),
        };
        let event = events.created()?;
        ensure!(event.container_id == shim.id && event.pid == pid, "{event:?}");
        ensure!(event.bundle == served.bundle && event.io.stdout == served.stdout, "{event:?}, {served:?}");
        let state: api::StateResponse =
            client.ok("State", &api::StateRequest { id: shim.id.clone(), ..Default::default() })?;
        ensure!(state.bundle == served.bundle && state.stdout == served.stdout, "{state:?}, {served:?}");
        let delete = api::DeleteRequest { id: shim.id.clone(), ..Default::default() };
        client.ok::<api::DeleteResponse>("Delete", &delete)?;
        shim.shut_down(&client)?;
    }
    Ok(())
}
