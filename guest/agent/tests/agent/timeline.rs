//! Measures how long each step in the life of a VM takes, by the clock and in processor time.
//!
//! To be run by name, since it needs QEMU, a kernel and an image:
//! `cargo test -p machinen-guest --test agent -- --ignored --nocapture timeline`

use std::time::Instant;

use machinen_protocol::api;

use crate::support::{Disks, Spec, vm::Vm};

#[tokio::test]
#[ignore = "boots a VM"]
async fn timeline() {
    let mut marks = Vec::new();
    let mut last = (Instant::now(), 0.0);
    let mut guest = Vm::boot(Disks::new()).await;
    let pid = guest.vm().pid();
    let mut mark = |name: &'static str| {
        let now = (Instant::now(), cpu_ms(pid));
        marks.push((name, (now.0 - last.0).as_secs_f64() * 1000.0, now.1 - last.1));
        last = now;
    };
    mark("qemu to control stream");
    guest.configure().await.unwrap();
    mark("configure");
    let spec = Spec::new(&["true"]);
    let mut phases = Vec::new();
    for id in ["a", "b"] {
        let (stdout, _out) = guest.stream().await;
        let (stderr, _err) = guest.stream().await;
        mark("streams");
        guest.vm().attach(&guest.disks, &guest.disks.rootfs(id));
        mark("mke2fs and hot-add");
        let stdio = api::Stdio { stdout, stderr, ..Default::default() };
        phases.push(guest.create_with(id, &spec, stdio).await.unwrap().phases);
        mark("create");
        guest.start_container(id).await.unwrap();
        mark("start");
        assert_eq!(guest.wait(id).await.exit_status, 0);
        mark("wait");
        guest.delete(id).await.unwrap();
        mark("delete");
    }
    println!("{}", guest.vm().console());
    guest.shutdown().await;
    mark("shutdown");
    println!("      wall        cpu");
    for (name, wall, cpu) in marks {
        println!("{wall:>10.1} {:>10.1} ms  {name}", cpu.max(0.0));
    }
    for created in phases {
        let each = created.iter().map(|phase| format!("{} {:.1}", phase.name, phase.micros as f64 / 1000.0));
        println!("phases: {}", each.collect::<Vec<_>>().join(", "));
    }
}

/// Processor time of all threads of a process: on a busy machine it means more than the wall clock.
fn cpu_ms(pid: u32) -> f64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let ns = tasks.filter_map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    ns.sum::<u64>() as f64 / 1e6
}
