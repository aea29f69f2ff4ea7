//! The runtime's command line by hand: the same commands with runc show that the tests ask for nothing special.

mod bundles;
mod checkpoint;
mod exec;
mod flags;
mod hooks;
mod limits;
mod logging;
mod model;
mod pool;
mod shown;
mod streams;

use anyhow::{Result, ensure};
use machinen_integration::{oci::Oci, runtime::Runtime};

/// Makes a test with each runtime of each function `fn(&Oci) -> Result<()>`.
macro_rules! with_oci {
    ($($test:ident),* $(,)?) => {
        mod runc { $(#[test] fn $test() { $crate::oci::run(machinen_integration::runtime::Runtime::Runc, super::$test); })* }
        mod machinen { $(#[test] fn $test() { $crate::oci::run(machinen_integration::runtime::Runtime::Machinen, super::$test); })* }
    };
}
use with_oci;

with_oci!(
    a_life,
    run_to_the_end,
    run_detached,
    unknown_ids,
    existing_and_odd_ids,
    deleted_by_force,
    refused_in_a_state,
);

/// A container of machinen's needs a moment, in which the verb can be killed.
#[test]
fn killed_while_it_creates() {
    run(Runtime::Machinen, |oci| {
        oci.bundle("killed", &SLEEP, |_| {})?;
        let vms = oci.host().root().join("state/@pods");
        let script = format!(
            "\"$@\" < /dev/null > /dev/null 2>&1 & until ls {}/*/vm > /dev/null 2>&1; do sleep 0.02; done; \
             kill -9 $!; wait $!; true",
            vms.display()
        );
        let create = ["create", "--bundle", &oci.bundle_dir("killed"), "killed"];
        oci.scripted(&script, &create)?.run()?.ok()?;
        // The VM has ended by then.
        let stopped = "until \"$@\" | grep -q '\"stopped\"'; do sleep 0.1; done";
        oci.scripted(stopped, &["state", "killed"])?.run()?.ok()?;
        oci.ok(&["delete", "killed"])?;
        is_gone(oci, "killed")
    });
}

/// Runs until it is told to end, in any state.
const SLEEP: [&str; 2] = ["sleep", "1000"];

fn run(runtime: Runtime, test: fn(&Oci) -> Result<()>) {
    let oci = Oci::start(runtime).unwrap_or_else(|error| panic!("{error:#}"));
    attempt(&oci, test).unwrap_or_else(|error| panic!("with {runtime:?}: {error:#}"));
}

fn attempt(oci: &Oci, test: fn(&Oci) -> Result<()>) -> Result<()> {
    let before = oci.inventory()?;
    test(oci)?;
    oci.settle(&before)
}

/// Nothing is reported about a container whose `state` is asked for.
fn is_gone(oci: &Oci, id: &str) -> Result<()> {
    oci.fails(&["state", id], 1, "does not exist")
}

fn a_life(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle(
        "life",
        &["sh", "-c", "echo begun; trap 'exit 5' TERM; while :; do sleep 0.1; done"],
        |_| {},
    )?;
    let container = oci.create("life")?;
    let state = oci.state("life")?;
    ensure!(state["id"] == "life" && state["status"] == "created", "{state}");
    ensure!(state["bundle"] == bundle.dir().display().to_string(), "{state}");
    ensure!(state["ociVersion"].as_str().is_some_and(|version| version.starts_with("1.")), "{state}");
    let pid = oci.pid("life")?;
    // Nothing of the user's has run yet.
    ensure!(container.written()[0].is_empty(), "{:?}", container.written());
    oci.ok(&["start", "life"])?;
    container.wait_for_stdout("begun\n")?;
    oci.has_status("life", "running")?;
    ensure!(oci.pid("life")? == pid, "another pid");
    oci.ok(&["kill", "life", "TERM"])?;
    oci.wait(pid)?;
    let state = oci.state("life")?;
    ensure!(state["status"] == "stopped" && state["pid"] == 0, "{state}");
    oci.ok(&["delete", "life"])?;
    is_gone(oci, "life")?;
    let output = container.wait()?;
    ensure!(output.text() == "begun\n" && output.error_text().is_empty(), "{output}");
    Ok(())
}

fn run_to_the_end(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("r", &["true"], |_| {})?;
    let dir = oci.bundle_dir("r");
    for (script, status) in [("echo out; echo err >&2; exit 7", 7), ("exit 0", 0), ("kill -9 $$", 137)] {
        // A shell that is the first process of its namespace cannot kill itself.
        oci.configure(&bundle, "r", &["sh", "-c", &format!("sh -c '{script}'; exit $?")], |_| {})?;
        let output = oci.output(&["run", "--bundle", &dir, "r"])?;
        ensure!(output.status == status, "{script}: {output}");
        if status == 7 {
            ensure!(output.text() == "out\n" && output.error_text() == "err\n", "{output}");
        }
        is_gone(oci, "r")?;
    }
    Ok(())
}

fn run_detached(oci: &Oci) -> Result<()> {
    oci.bundle("d", &SLEEP, |_| {})?;
    let (dir, pid_file) = (oci.bundle_dir("d"), oci.file("pid"));
    let pid_argument = pid_file.display().to_string();
    let args = ["run", "--detach", "--bundle", &dir, "--pid-file", &pid_argument, "d"];
    let mut running = oci.command(&args)?.spawn()?;
    ensure!(running.wait_for_exit()? == 0, "{:?}", running.written());
    oci.has_status("d", "running")?;
    let pid: u32 = std::fs::read_to_string(pid_file)?.parse()?;
    ensure!(pid == oci.pid("d")?);
    oci.ok(&["delete", "--force", "d"])?;
    oci.wait(pid)
}

fn unknown_ids(oci: &Oci) -> Result<()> {
    for args in [
        &["state", "none"][..],
        &["start", "none"],
        &["kill", "none", "KILL"],
        &["delete", "none"],
        &["pause", "none"],
        &["resume", "none"],
        &["ps", "none"],
        &["update", "--memory", "100000000", "none"],
        &["events", "--stats", "none"],
        &["checkpoint", "none"],
    ] {
        oci.fails(args, 1, "does not exist")?;
    }
    oci.fails(&["exec", "none", "true"], 255, "does not exist")?;
    // The one that must work whatever has happened.
    oci.ok(&["delete", "--force", "none"]).map(drop)
}

fn existing_and_odd_ids(oci: &Oci) -> Result<()> {
    oci.bundle("one", &SLEEP, |_| {})?;
    let _container = oci.create("one")?;
    let dir = oci.bundle_dir("one");
    oci.fails(&["create", "--bundle", &dir, "one"], 1, "already exists")?;
    oci.fails(&["run", "--bundle", &dir, "one"], 1, "already exists")?;
    oci.has_status("one", "created")?;
    for id in ["a/b", "..", "", "a b"] {
        oci.fails(&["create", "--bundle", &dir, id], 1, "")?;
    }
    oci.fails(&["create", "--bundle", "/no/such/bundle", "two"], 1, "/no/such/bundle")?;
    oci.fails(&["create", "--bundle", "/tmp", "two"], 1, "config.json")?;
    oci.ok(&["delete", "--force", "one"])?;
    is_gone(oci, "two")
}

/// Created, running, paused and stopped.
fn deleted_by_force(oci: &Oci) -> Result<()> {
    oci.bundle("c", &SLEEP, |_| {})?;
    for state in ["created", "running", "paused", "stopped"] {
        let _container = oci.create("c")?;
        let pid = oci.pid("c")?;
        if state != "created" {
            oci.ok(&["start", "c"])?;
        }
        match state {
            "paused" => drop(oci.ok(&["pause", "c"])?),
            "stopped" => {
                oci.ok(&["kill", "c", "KILL"])?;
                oci.wait(pid)?;
            }
            _ => {}
        }
        oci.has_status("c", state)?;
        if ["running", "paused"].contains(&state) {
            oci.fails(&["delete", "c"], 1, "not stopped")?;
        }
        oci.ok(&["delete", "--force", "c"])?;
        oci.wait(pid)?;
        is_gone(oci, "c")?;
    }
    Ok(())
}

fn refused_in_a_state(oci: &Oci) -> Result<()> {
    oci.bundle("s", &SLEEP, |_| {})?;
    let _container = oci.launch("s")?;
    oci.fails(&["start", "s"], 1, "cannot start an already running container")?;
    oci.fails(&["resume", "s"], 1, "not paused")?;
    oci.fails(&["kill", "s", "NOSUCHSIGNAL"], 1, "NOSUCHSIGNAL")?;
    let pid = oci.pid("s")?;
    oci.ok(&["kill", "s", "9"])?;
    oci.wait(pid)?;
    oci.fails(&["start", "s"], 1, "cannot start a container that has stopped")?;
    oci.fails(&["kill", "s", "TERM"], 1, "container not running")?;
    oci.fails(&["exec", "s", "true"], 255, "cannot exec in a stopped container")?;
    oci.fails(&["pause", "s"], 1, "not running")?;
    // runc's `kill --all` has always accepted it.
    oci.ok(&["kill", "--all", "s", "KILL"])?;
    oci.ok(&["delete", "s"]).map(drop)
}
