//! Requests for a running container: pause and resume, metrics, new limits; and a container that is out of
//! memory.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{
    api,
    protobuf::{EnumOrUnknown, MessageField, well_known_types::any::Any},
};
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
    setup::{Setup, Value},
    shim::{Client, Shim, V3},
};
use serde_json::json;
use ttrpc::Code;

use crate::harness::{IMAGE, on_every_containerd, on_newest_containerd};

on_every_containerd!(
    pause_and_resume,
    counts_match_the_work,
    out_of_memory_is_reported,
    paused_over_a_restart
);
on_newest_containerd!(limits_change_live, impossible_limits, one_container_out_of_memory, refusals);

/// Longest wait for something that has no event.
const PATIENCE: Duration = Duration::from_secs(30);

/// The output of `ctr tasks metrics`, in the format of this host.
fn metrics(containerd: &Containerd, id: &str) -> Result<serde_json::Value> {
    let text = containerd.ctr_ok(&["tasks", "metrics", "--format", "json", id])?;
    serde_json::from_str(&text).with_context(|| format!("odd metrics: {text}"))
}

/// Microseconds of CPU time, in either format.
fn cpu_time(containerd: &Containerd, id: &str) -> Result<u64> {
    let metrics = metrics(containerd, id)?;
    let cgroup2 = metrics.pointer("/cpu/usage_usec").and_then(serde_json::Value::as_u64);
    let cgroup1 = metrics.pointer("/cpu/usage/total").and_then(serde_json::Value::as_u64);
    cgroup2.or(cgroup1.map(|time| time / 1000)).with_context(|| format!("no CPU time in {metrics}"))
}

/// Metrics are reported before, during and after a pause, so they need only the guest's agent.
fn pause_and_resume(containerd: &mut Containerd) -> Result<()> {
    let run = containerd.run(IMAGE, &["sh", "-c", "while :; do :; done"]).detached().flag("--null-io");
    let id = run.container().to_owned();
    run.ok()?;
    let working = |containerd: &Containerd| -> Result<bool> {
        Ok(cpu_time(containerd, &id)? < cpu_time(containerd, &id)?)
    };
    ensure!(working(containerd)?, "a busy container uses no CPU time");
    let from = containerd.log().position();
    containerd.ctr_ok(&["tasks", "pause", &id])?;
    ensure!(containerd.task(&id).status()? == "PAUSED", "the task is {}", containerd.task(&id).status()?);
    ensure!(!working(containerd)?, "a paused container uses CPU time");
    ensure!(containerd.ctr_output(&["tasks", "pause", &id])?.status != 0, "the container was paused twice");
    ensure!(
        containerd.ctr_output(&["tasks", "delete", &id])?.status != 0,
        "the container was deleted while paused"
    );
    ensure!(containerd.ctr_ok(&["tasks", "ps", &id])?.lines().count() == 2, "no list of processes");

    containerd.ctr_ok(&["tasks", "resume", &id])?;
    ensure!(containerd.task(&id).status()? == "RUNNING", "the task is {}", containerd.task(&id).status()?);
    ensure!(working(containerd)?, "a resumed container uses no CPU time");
    ensure!(containerd.ctr_output(&["tasks", "resume", &id])?.status != 0, "the container was resumed twice");

    containerd.ctr_ok(&["tasks", "pause", &id])?;
    containerd.task(&id).kill()?;
    containerd.task(&id).delete(137)?;
    containerd.log().wait_for_event(from, "/tasks/delete")?;
    let events = containerd.log().events(from);
    ensure!(
        events == ["/tasks/paused", "/tasks/resumed", "/tasks/paused", "/tasks/exit", "/tasks/delete"],
        "{events:?}"
    );
    Ok(())
}

fn paused_over_a_restart(containerd: &mut Containerd) -> Result<()> {
    let run = containerd.run(IMAGE, &["sh", "-c", "while :; do :; done"]).detached().flag("--null-io");
    let id = run.container().to_owned();
    run.ok()?;
    containerd.ctr_ok(&["tasks", "pause", &id])?;
    containerd.restart()?;
    ensure!(containerd.task(&id).status()? == "PAUSED", "the task is {}", containerd.task(&id).status()?);
    let waiter = containerd.ctr(["tasks", "attach", &id])?.spawn()?;
    let before = cpu_time(containerd, &id)?;
    containerd.ctr_ok(&["tasks", "resume", &id])?;
    ensure!(before < cpu_time(containerd, &id)?, "a resumed container uses no CPU time");
    let from = containerd.log().position();
    containerd.ctr_ok(&["tasks", "kill", "--signal", "SIGKILL", &id])?;
    // The attached client deletes the task when it has ended.
    let waited = waiter.wait()?;
    ensure!(waited.status == 137, "the waiting client got {waited}");
    containerd.log().wait_for_event(from, "/tasks/delete")?;
    let events = containerd.log().events(from);
    // Events that containerd did not receive during its restart come late, and in order.
    let all = ["/tasks/paused", "/tasks/resumed", "/tasks/exit", "/tasks/delete"];
    ensure!(events.len() >= 2 && all[all.len().saturating_sub(events.len())..] == events[..], "{events:?}");
    containerd.ctr_ok(&["containers", "delete", &id])?;
    Ok(())
}

/// Both metrics formats, since a host uses only one of them.
fn counts_match_the_work(containerd: &mut Containerd) -> Result<()> {
    let work = "dd if=/dev/zero of=/dev/shm/a bs=1M count=24; dd if=/dev/zero of=/b bs=1M count=8 conv=fsync;\
                i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done; sleep 1000 & sleep 1000 &\
                cat /proc/$$/stat; echo ready; wait";
    for format in ["cgroup1", "cgroup2"] {
        containerd.configure(&Setup::new().set("task", "metrics", Value::text(format)))?;
        let run = containerd.run(IMAGE, &["sh", "-c", work]).flags(&["--memory-limit", "134217728"]);
        let running = run.spawn(Duration::from_secs(90))?;
        running.wait_for_stdout("ready")?;
        let metrics = metrics(containerd, run.container())?;
        let number = |pointer: &str| {
            let value = metrics.pointer(pointer).and_then(serde_json::Value::as_u64);
            value.with_context(|| format!("no {pointer} in {metrics:#}"))
        };
        let (limit, memory, shared, pids) = match format {
            "cgroup1" => {
                ("/memory/usage/limit", "/memory/usage/usage", "/memory/total_cache", "/pids/current")
            }
            _ => ("/memory/usage_limit", "/memory/usage", "/memory/shmem", "/pids/current"),
        };
        ensure!(number(limit)? == 134_217_728, "limit {}", number(limit)?);
        ensure!((24 << 20..80 << 20).contains(&number(memory)?), "{} bytes of memory", number(memory)?);
        ensure!(number(shared)? >= 24 << 20, "{} bytes in the tmpfs", number(shared)?);
        ensure!(number(pids)? == 3, "{} processes", number(pids)?);
        let written = written_bytes(&metrics);
        ensure!((8 << 20..24 << 20).contains(&written), "{written} bytes written:\n{metrics:#}");
        let used = cpu_time(containerd, run.container())?;
        containerd.ctr_ok(&["tasks", "kill", "--signal", "SIGKILL", run.container()])?;
        let output = running.wait()?;
        let own = own_cpu_time(&output.text())?;
        // The shell's own share; the programs that it ran come in addition.
        ensure!((own..own + 5_000_000).contains(&used), "{used} µs, of which the shell reports {own}");
    }
    Ok(())
}

/// Bytes written to all block devices, in either format; a number that is 0 is not in the JSON.
fn written_bytes(metrics: &serde_json::Value) -> u64 {
    let number = |value: &serde_json::Value| value.as_u64().unwrap_or(0);
    let list = |pointer: &str| {
        metrics.pointer(pointer).and_then(|list| list.as_array()).cloned().unwrap_or_default()
    };
    let cgroup2 = list("/io/usage").iter().map(|device| number(&device["wbytes"])).sum::<u64>();
    let writes = list("/blkio/io_service_bytes_recursive");
    cgroup2
        + writes
            .iter()
            .filter(|entry| entry["op"] == "Write")
            .map(|entry| number(&entry["value"]))
            .sum::<u64>()
}

/// Microseconds that a shell reports for itself, from its /proc/<pid>/stat (proc(5), fields 14 and 15).
fn own_cpu_time(output: &str) -> Result<u64> {
    let line =
        output.lines().find(|line| line.contains("(sh)")).with_context(|| format!("no stat in {output}"))?;
    let ticks = line.split(' ').skip(13).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    Ok(ticks * 10_000)
}

fn out_of_memory_is_reported(containerd: &mut Containerd) -> Result<()> {
    let limit = ["--memory-limit", "67108864"];
    let from = containerd.log().position();
    // Of two processes the larger is killed, and the container continues to run.
    let run = containerd.run(IMAGE, &["sh", "-c", "tail /dev/zero; echo ended with $?; sleep 1000"]);
    let run = run.flags(&limit);
    let running = run.spawn(Duration::from_secs(90))?;
    running.wait_for_stdout("ended with 137")?;
    containerd.log().wait_for_event(from, "/tasks/oom")?;
    ensure!(containerd.task(run.container()).status()? == "RUNNING", "the container should continue to run");
    containerd.ctr_ok(&["tasks", "kill", "--signal", "SIGKILL", run.container()])?;
    ensure!(running.wait()?.status == 137, "killed");

    let from = containerd.log().position();
    let output = containerd.run(IMAGE, &["tail", "/dev/zero"]).flags(&limit).output()?;
    ensure!(output.status == 137, "{output}");
    containerd.log().wait_for_event(from, "/tasks/delete")?;
    let events = containerd.log().events(from);
    let wanted = ["/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/exit", "/tasks/delete"];
    ensure!(events == wanted, "{events:?}");
    Ok(())
}

/// A shim that serves one pod, called without containerd.
struct Direct<'a> {
    shim: Shim<'a>,
    client: Client,
    rootfs: Bundle,
}

impl<'a> Direct<'a> {
    fn new(containerd: &'a Containerd) -> Result<Self> {
        let (rootfs, shim) = (Bundle::busybox(containerd)?, Shim::new(containerd)?);
        let printed = shim.start(0)?;
        let client = Client::connect(String::from_utf8(printed.stdout)?.trim(), V3)?;
        Ok(Self { shim, client, rootfs })
    }

    /// Creates a container of the pod, with limits, and starts it.
    fn run(&self, id: &str, script: &str, resources: &serde_json::Value) -> Result<()> {
        let bundle = self.shim.bundle.join(format!("of-{id}"));
        fs::create_dir_all(&bundle)?;
        let config = self.rootfs.config(&["sh", "-c", script], |spec| {
            spec["linux"]["resources"] = resources.clone();
            let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("a list");
            namespaces.push(json!({ "type": "cgroup" }));
            let mounts = spec["mounts"].as_array_mut().expect("a list");
            mounts.push(mount("/sys/fs/cgroup", "cgroup", "cgroup", &["ro"]));
        })?;
        fs::copy(config, bundle.join("config.json"))?;
        let create = api::CreateTaskRequest {
            id: id.to_owned(),
            bundle: bundle.display().to_string(),
            ..Default::default()
        };
        self.client.ok::<api::CreateTaskResponse>("Create", &create)?;
        let start = api::StartRequest { id: id.to_owned(), ..Default::default() };
        self.client.ok::<api::StartResponse>("Start", &start)?;
        Ok(())
    }

    fn update(&self, id: &str, resources: &serde_json::Value) -> api::UpdateTaskRequest {
        let any = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: resources.to_string().into_bytes(),
            ..Default::default()
        };
        let _ = self;
        api::UpdateTaskRequest { id: id.to_owned(), resources: MessageField::some(any), ..Default::default() }
    }

    fn stats(&self, id: &str) -> Result<containerd_shim_protos::cgroups_v2::metrics::Metrics> {
        use containerd_shim_protos::protobuf::Message;
        let request = api::StatsRequest { id: id.to_owned(), ..Default::default() };
        let stats: api::StatsResponse = self.client.ok("Stats", &request)?;
        ensure!(stats.stats.type_url == "io.containerd.cgroups.v2.Metrics", "{}", stats.stats.type_url);
        Ok(Message::parse_from_bytes(&stats.stats.value)?)
    }

    fn status(&self, id: &str) -> Result<EnumOrUnknown<api::Status>> {
        let request = api::StateRequest { id: id.to_owned(), ..Default::default() };
        Ok(self.client.ok::<api::StateResponse>("State", &request)?.status)
    }

    fn kill(&self, id: &str) -> Result<()> {
        let kill = api::KillRequest { id: id.to_owned(), signal: 9, ..Default::default() };
        self.client.ok::<api::Empty>("Kill", &kill)?;
        ensure!(self.wait(id)? == 137, "killed");
        Ok(())
    }

    fn wait(&self, id: &str) -> Result<u32> {
        let wait = api::WaitRequest { id: id.to_owned(), ..Default::default() };
        Ok(self.client.ok::<api::WaitResponse>("Wait", &wait)?.exit_status)
    }

    fn delete(&self, id: &str) -> Result<()> {
        let delete = api::DeleteRequest { id: id.to_owned(), ..Default::default() };
        self.client.ok::<api::DeleteResponse>("Delete", &delete)?;
        Ok(())
    }

    fn end(self) -> Result<()> {
        let shutdown = api::ShutdownRequest { id: self.shim.id.clone(), ..Default::default() };
        self.client.ok::<api::Empty>("Shutdown", &shutdown)?;
        fs::remove_dir_all(&self.shim.bundle)?;
        Ok(())
    }
}

fn with_cgroup2_metrics(containerd: &Containerd) -> Result<()> {
    containerd.configure(&Setup::new().set("task", "metrics", Value::text("cgroup2")))
}

fn limits_change_live(containerd: &mut Containerd) -> Result<()> {
    with_cgroup2_metrics(containerd)?;
    let direct = Direct::new(containerd)?;
    direct.run("busy", "while :; do :; done", &json!({ "memory": { "limit": 67_108_864 } }))?;
    ensure!(direct.stats("busy")?.memory.usage_limit == 67_108_864, "the first limit");
    let update = |resources| direct.client.ok::<api::Empty>("Update", &direct.update("busy", &resources));
    // The update of a CRI client: all of the container's limits, including the unset ones.
    update(json!({
        "devices": [{ "allow": false, "access": "rwm" }],
        "memory": { "limit": 50_331_648, "swap": 50_331_648, "reservation": 0 },
        "cpu": { "shares": 512, "quota": 10_000, "period": 100_000, "cpus": "", "mems": "" },
        "pids": { "limit": 7 },
        "blockIO": { "weight": 500 },
        "unified": { "memory.high": "41943040" },
    }))?;
    let stats = direct.stats("busy")?;
    ensure!(stats.memory.usage_limit == 50_331_648 && stats.memory.swap_limit == 0, "{stats}");
    ensure!(stats.pids.limit == 7, "{stats}");
    // A tenth of a CPU: it is throttled ten times a second.
    let end = Instant::now() + PATIENCE;
    while direct.stats("busy")?.cpu.nr_throttled < 3 {
        ensure!(Instant::now() < end, "the container is not throttled: {}", direct.stats("busy")?);
    }
    update(json!({ "cpu": { "quota": -1 }, "pids": { "limit": -1 }, "memory": { "limit": -1 } }))?;
    let stats = direct.stats("busy")?;
    ensure!(stats.memory.usage_limit == u64::MAX && stats.pids.limit == u64::MAX, "{stats}");
    direct.kill("busy")?;
    direct.delete("busy")?;
    direct.end()
}

fn impossible_limits(containerd: &mut Containerd) -> Result<()> {
    with_cgroup2_metrics(containerd)?;
    let direct = Direct::new(containerd)?;
    direct.run("c", "sleep 1000", &json!({ "memory": { "limit": 67_108_864 }, "pids": { "limit": 50 } }))?;
    for (resources, code, words) in [
        (json!({ "cpu": { "cpus": "7-" } }), Code::INVALID_ARGUMENT, "cpu.cpus"),
        (
            json!({ "pids": { "limit": 9 }, "unified": { "memory.high": "lots" } }),
            Code::INVALID_ARGUMENT,
            "lots",
        ),
        (json!({ "memory": { "limit": 1_u64 << 50 } }), Code::FAILED_PRECONDITION, "the VM has"),
        (json!({ "memory": { "swappiness": 10 } }), Code::UNIMPLEMENTED, "swappiness"),
        (json!({ "unified": { "dmem.max": "1" } }), Code::UNIMPLEMENTED, "dmem.max"),
        (json!({ "memory": "much" }), Code::INVALID_ARGUMENT, "LinuxResources"),
    ] {
        let (found, message) = direct.client.refused("Update", &direct.update("c", &resources))?;
        ensure!(found == code && message.contains(words), "{resources}: {found:?}: {message}");
    }
    let mut other = direct.update("c", &json!({}));
    other.resources.mut_or_insert_default().type_url = "windows".to_owned();
    let (code, message) = direct.client.refused("Update", &other)?;
    ensure!(code == Code::INVALID_ARGUMENT && message.contains("windows"), "{code:?}: {message}");
    // The limits before the refused one have their old values again.
    let stats = direct.stats("c")?;
    ensure!(stats.pids.limit == 50 && stats.memory.usage_limit == 67_108_864, "{stats}");
    direct.kill("c")?;
    let (code, _) =
        direct.client.refused("Update", &direct.update("c", &json!({ "pids": { "limit": 9 } })))?;
    ensure!(code == Code::FAILED_PRECONDITION, "an ended container takes limits: {code:?}");
    direct.delete("c")?;
    direct.end()
}

fn one_container_out_of_memory(containerd: &mut Containerd) -> Result<()> {
    with_cgroup2_metrics(containerd)?;
    let direct = Direct::new(containerd)?;
    direct.run("neighbour", "sleep 1000", &json!({}))?;
    direct.run("greedy", "exec tail /dev/zero", &json!({ "memory": { "limit": 50_331_648 } }))?;
    ensure!(direct.wait("greedy")? == 137, "the greedy container should be killed");
    ensure!(direct.status("neighbour")? == EnumOrUnknown::new(api::Status::RUNNING), "the neighbour was hit");
    let stats = direct.stats("neighbour")?;
    ensure!(stats.memory_events.oom_kill == 0 && stats.pids.current == 1, "{stats}");
    direct.delete("greedy")?;
    direct.kill("neighbour")?;
    direct.delete("neighbour")?;
    direct.end()
}

fn refusals(containerd: &mut Containerd) -> Result<()> {
    let direct = Direct::new(containerd)?;
    let id = || "c".to_owned();
    let pause = api::PauseRequest { id: id(), ..Default::default() };
    let resume = api::ResumeRequest { id: id(), ..Default::default() };
    let stats = api::StatsRequest { id: id(), ..Default::default() };
    for (method, (code, message)) in [
        ("Pause", direct.client.refused("Pause", &pause)?),
        ("Resume", direct.client.refused("Resume", &resume)?),
        ("Stats", direct.client.refused("Stats", &stats)?),
        ("Update", direct.client.refused("Update", &direct.update("c", &json!({})))?),
        ("Pids", direct.client.refused("Pids", &api::PidsRequest { id: id(), ..Default::default() })?),
    ] {
        ensure!(code == Code::NOT_FOUND && message.contains('c'), "{method}: {code:?}: {message}");
    }
    direct.run("c", "sleep 1000", &json!({}))?;
    let (code, message) = direct.client.refused("Resume", &resume)?;
    ensure!(code == Code::FAILED_PRECONDITION && message.contains("is not paused"), "{code:?}: {message}");
    direct.client.ok::<api::Empty>("Pause", &pause)?;
    let (code, message) = direct.client.refused("Pause", &pause)?;
    ensure!(code == Code::FAILED_PRECONDITION && message.contains("is paused"), "{code:?}: {message}");
    direct.kill("c")?;
    let (code, message) = direct.client.refused("Pause", &pause)?;
    ensure!(code == Code::FAILED_PRECONDITION && message.contains("already stopped"), "{code:?}: {message}");
    direct.delete("c")?;
    direct.end()
}
