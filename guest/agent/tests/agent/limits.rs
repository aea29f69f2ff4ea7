//! Limits of the container's cgroup: all of them in a VM, on a host those for which it has controllers.

use machinen_protocol::api;
use serde_json::{Value, json};

use crate::support::{Guest, Spec, context, status};

fn limited(script: &str, resources: Value) -> Spec {
    Spec::sh(script).with(|s| {
        s["linux"]["resources"] = resources;
        s["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "cgroup"}));
        s["mounts"].as_array_mut().unwrap().push(json!({
            "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]
        }));
    })
}

#[tokio::test]
async fn each_limit_is_set_or_refused() {
    let mut guest = Guest::start().await;
    for (file, resources, value) in [
        ("memory.max", json!({"memory": {"limit": 67_108_864}}), "67108864"),
        ("memory.low", json!({"memory": {"reservation": 1_048_576}}), "1048576"),
        ("memory.swap.max", json!({"memory": {"limit": 67_108_864, "swap": 100_663_296}}), "33554432"),
        ("pids.max", json!({"pids": {"limit": 123}}), "123"),
        ("cpu.max", json!({"cpu": {"quota": 50_000, "period": 100_000}}), "50000 100000"),
        ("cpu.weight", json!({"cpu": {"shares": 1024}}), "100"),
        ("cpuset.cpus", json!({"cpu": {"cpus": "0"}}), "0"),
        ("io.weight", json!({"blockIO": {"weight": 100}}), "default 910"),
        ("memory.high", json!({"unified": {"memory.high": "33554432"}}), "33554432"),
    ] {
        let spec = limited(&format!("cat /sys/fs/cgroup/{file}"), resources);
        if guest.has_controller(file.split('.').next().unwrap()) {
            let output = guest.run(&spec).await;
            assert_eq!(output.stdout.trim_end(), value, "{file}: {output:?}");
        } else {
            let (_, text) = status(guest.create("c", &spec).await);
            assert!(text.contains(file.split('.').next().unwrap()), "{file}: {text}");
        }
    }
}

#[tokio::test]
async fn running_out_of_memory_is_reported() {
    let guest = Guest::start().await;
    if !guest.has_controller("memory") {
        eprintln!("this host's cgroup v2 has no memory controller: seen in a VM only (MACHINEN_TEST_VM=1)");
        return;
    }
    let greedy =
        limited("dd if=/dev/zero of=/dev/null bs=200M count=1", json!({"memory": {"limit": 33_554_432}}));
    guest.create("c", &greedy).await.unwrap();
    guest.start_container("c").await.unwrap();
    let ended = guest.wait("c").await;
    assert!(ended.oom_kills > 0 && ended.exit_status == 137, "{ended:?}");
    guest.delete("c").await.unwrap();
    guest.create("c", &Spec::new(&["false"])).await.unwrap();
    guest.start_container("c").await.unwrap();
    assert_eq!(guest.wait("c").await.oom_kills, 0);
}

#[tokio::test]
async fn each_killed_process_is_reported_while_the_container_runs() {
    let guest = Guest::start().await;
    if !guest.has_controller("memory") {
        eprintln!("this host's cgroup v2 has no memory controller: seen in a VM only (MACHINEN_TEST_VM=1)");
        return;
    }
    let script = "dd if=/dev/zero of=/dev/null bs=200M count=1; dd if=/dev/zero of=/dev/null bs=200M count=1; sleep 1000";
    guest.create("c", &limited(script, json!({"memory": {"limit": 33_554_432}}))).await.unwrap();
    guest.start_container("c").await.unwrap();
    for seen in [0, 1] {
        let request = api::WaitOutOfMemoryRequest { container_id: "c".into(), seen, ..Default::default() };
        let answer = guest.agent.wait_out_of_memory(context(), &request).await.unwrap();
        assert!(answer.killed > seen && !answer.ended, "{answer:?}");
    }
    guest.signal("c", libc::SIGKILL, false).await.unwrap();
    assert!(guest.wait("c").await.oom_kills >= 2);
}
