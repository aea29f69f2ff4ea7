//! Clones are identical until their host gives each an identity; afterwards nothing shows that they were.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{bundle::Bundle, containerd::Containerd, process::DEADLINE};
use serde_json::json;

use super::{has_id, origin, with_template};
use crate::harness::on_newest_containerd;

on_newest_containerd!(fifty_clones_have_nothing_in_common);

const CLONES: usize = 50;
const AT_ONCE: usize = 4;

/// The largest permitted error of a clone's clock.
const CLOCK: Duration = Duration::from_millis(10);

/// How often the clock is read; the fastest answer is the most exact.
const QUESTIONS: usize = 5;

/// Values that must be different in every clone, by their names in the container's script.
const DIFFERENT: [&str; 9] =
    ["boot", "uuid", "urandom", "random", "key", "stack", "hostname", "machine", "temporary"];

/// Apart from its mounts, the container has no namespaces of its own, so it sees the VM's names and devices.
const SCRIPT: &str = "\
r=/proc/sys/kernel/random
read boot < $r/boot_id; read uuid < $r/uuid; read name < /proc/sys/kernel/hostname
read machine < /proc/1/root/etc/machine-id
echo boot $boot; echo uuid $uuid; echo hostname $name; echo machine $machine
echo urandom $(head -c 32 /dev/urandom | hexdump -ve '1/1 \"%02x\"')
echo random $(head -c 32 /dev/random | hexdump -ve '1/1 \"%02x\"')
echo key $(head -c 64 /dev/urandom | sha256sum)
echo stack $(grep '.stack.' /proc/self/maps)$(grep '.vdso.' /proc/self/maps)
echo temporary $(mktemp -u)$(mktemp -u)
echo links $(ls /sys/class/net)
echo ready
while read word; do echo clock $word $EPOCHREALTIME; done";

/// One clone's own values, and the host's.
#[derive(Debug)]
struct Seen {
    id: String,
    printed: BTreeMap<String, String>,
    /// How far the clone's clock is ahead, and the error of that, microseconds.
    clock: (i64, i64),
}

fn fifty_clones_have_nothing_in_common(containerd: &mut Containerd) -> Result<()> {
    let (templates, _) = with_template(containerd)?;
    have_nothing_in_common(containerd, CLONES, "clone")?;
    templates.remove_all()
}

/// Runs this number of containers and compares the values of their guests; each VM must be of the given
/// origin.
pub(super) fn have_nothing_in_common(containerd: &Containerd, clones: usize, wanted: &str) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sh", "-c", SCRIPT], |spec| {
        let private = ["pid", "uts"];
        let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("an array");
        namespaces.retain(|namespace| !private.iter().any(|kind| namespace["type"] == *kind));
        for set in ["bounding", "effective", "permitted"] {
            let set = spec["process"]["capabilities"][set].as_array_mut().expect("an array");
            set.push(json!("CAP_SYS_PTRACE"));
        }
    })?;
    let from = containerd.log().position();
    let seen = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE.min(clones))
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    while next.fetch_add(1, Ordering::Relaxed) < clones {
                        let clone = one(containerd, &config)?;
                        seen.lock().expect("the lock is not poisoned").push(clone);
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("no panic"))
    })?;
    let seen = seen.into_inner()?;
    ensure!(seen.len() == clones, "{} clones", seen.len());
    let lines = containerd.log().since(from);
    for clone in &seen {
        let id = &clone.id;
        let origin = origin(containerd, from, id)?;
        ensure!(origin == wanted, "the VM of {id} is no {wanted} but a {origin}");
        ensure!(clone.printed["hostname"] == *id, "{id} calls itself {}", clone.printed["hostname"]);
        ensure!(clone.printed["links"] == "lo", "{id} has {}", clone.printed["links"]);
        ensure!(clone.printed["machine"].len() == 32, "{:?} is no machine id", clone.printed["machine"]);
        // The shim's log has the same machine id.
        let ready = lines.iter().find(|line| line.contains("guest is ready") && hostname_is(line, id));
        let ready = ready.with_context(|| format!("no line of the guest of {id}"))?;
        ensure!(ready.contains(&clone.printed["machine"]), "the machine id of {clone:?} is not in {ready}");
        let (ahead, wrong) = clone.clock;
        let bound = i64::try_from(CLOCK.as_micros())? + wrong;
        ensure!(ahead.abs() <= bound, "the clock of {id} is {ahead} us ahead, give or take {wrong} us");
    }
    for what in DIFFERENT {
        let values: BTreeSet<_> = seen.iter().map(|clone| &clone.printed[what]).collect();
        ensure!(values.len() == clones, "{} of {clones} are different in {what}: {values:?}", values.len());
        ensure!(values.iter().all(|value| value.len() > 1), "empty {what}");
    }
    // With --nocapture: the precision of the test of the clocks on this machine.
    let mut clocks: Vec<_> = seen.iter().map(|clone| clone.clock).collect();
    clocks.sort_by_key(|(ahead, wrong)| (ahead.abs(), *wrong));
    println!("clocks, ahead and give or take, us: {clocks:?}");
    Ok(())
}

fn hostname_is(line: &str, id: &str) -> bool {
    line.split_once("hostname=").is_some_and(|(_, tail)| has_id(&format!("id={tail}"), id))
}

fn one(containerd: &Containerd, config: &Path) -> Result<Seen> {
    let run = containerd.run_spec(config).with_stdin();
    let mut running = run.spawn(DEADLINE)?;
    let mut stdin = running.stdin().context("no stdin")?;
    running.wait_for_stdout("ready\n")?;
    let mut asked = Vec::new();
    for question in 0..QUESTIONS {
        let before = micros()?;
        writeln!(stdin, "{question}")?;
        running.wait_for_stdout(&format!("clock {question} "))?;
        asked.push((before, micros()?));
    }
    drop(stdin);
    let output = running.wait()?.ok()?;
    let text = output.text();
    let mut printed = BTreeMap::new();
    let mut clock: Option<(i64, i64)> = None;
    for line in text.lines() {
        let (name, value) = line.split_once(' ').unwrap_or((line, ""));
        if name != "clock" {
            printed.insert(name.to_owned(), value.to_owned());
            continue;
        }
        let (question, time) = value.split_once(' ').with_context(|| format!("odd clock: {output}"))?;
        let (before, after) = asked[question.parse::<usize>()?];
        let time: i64 = time.replace('.', "").parse()?;
        let found = (time - i64::midpoint(before, after), (after - before) / 2);
        clock = clock.filter(|best| best.1 <= found.1).or(Some(found));
    }
    let clock = clock.with_context(|| format!("no clock: {output}"))?;
    Ok(Seen { id: run.container().to_owned(), printed, clock })
}

/// The host's clock, microseconds since the Unix epoch.
fn micros() -> Result<i64> {
    Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros())?)
}
