//! A process that is added to a restored container is in the namespaces of the container's first process.

use anyhow::{Result, ensure};
use machinen_integration::{bundle::Bundle, containerd::Containerd, served::Served};
use serde_json::json;

use super::moved;
use crate::harness::on_newest_containerd;

on_newest_containerd!(one_clock_after_a_restore);

/// The seconds of the monotonic clock, and every kind of namespace that the first process and this one do not
/// share. A process has two time namespaces: its own, and that of its children.
const LOOK: &str = "cut -d. -f1 /proc/uptime; cd /proc/1/ns; for n in *; do \
                    [ \"$(readlink $n)\" = \"$(readlink /proc/self/ns/$n)\" ] || echo $n; done";
/// Continues to run after the process that has started it has ended.
const DAEMON: &str = "setsid sleep 5555 >/dev/null 2>&1 </dev/null & usleep 100000";

fn one_clock_after_a_restore(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sleep", "100000"], |spec| {
        // A process can only read the namespaces of processes that have no more capabilities than itself.
        spec["process"]["capabilities"] = json!({});
        spec["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({"type": "cgroup"}));
    })?;
    let mut running = Served::run(containerd, &config)?;
    let mut clock = look(&running)?;
    ensure!(running.exec_to("daemon", &["sh", "-c", DAEMON], "")? == 0, "no daemon");
    // The second restore is of a restored container, with the processes that were added to it before and
    // after the first restore.
    for round in 1..=2 {
        running = moved(containerd, &running, &config)?;
        let now = look(&running)?;
        ensure!(now >= clock, "restore {round}: the clock went back from {clock} to {now}");
        clock = now;
        // One of the processes is the first one.
        let daemons = format!("[ $(pidof sleep | wc -w) = {} ]", round + 1);
        ensure!(
            running.exec_to("daemons", &["sh", "-c", &daemons], "")? == 0,
            "restore {round}: a daemon is gone"
        );
        ensure!(running.exec_to("daemon", &["sh", "-c", DAEMON], "")? == 0, "no daemon");
    }
    running.end()
}

/// The clock of an added process, which has all namespaces of the first one.
fn look(served: &Served<'_>) -> Result<u64> {
    let (status, text) = served.shell(LOOK)?;
    let (clock, differ) = text.split_once('\n').unwrap_or_default();
    ensure!(status == 0 && differ.is_empty(), "status {status}, not shared:\n{text}");
    Ok(clock.parse()?)
}
