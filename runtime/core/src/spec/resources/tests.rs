//! Tests of the translation of limits to files of a cgroup.

use super::*;

const NOW: CurrentLimits<'_> = CurrentLimits {
    cpu_max: "max 100000\n",
    memory_max: "max\n",
    memory_current: "8388608\n",
    memory_stat: "anon 524288\nfile 5242880\nshmem 262144\nslab_reclaimable 4096\n",
    others_memory: 0,
    vm_memory_mib: 512,
    vcpus: 2,
};

fn update(json: &str) -> Result<Vec<(String, String)>, ResourcesError> {
    let writes = writes(&parse(json.as_bytes()).unwrap(), NOW)?;
    Ok(writes.into_iter().map(|file| (file.name, file.content)).collect())
}

#[test]
fn each_limit_has_its_file() {
    for (json, name, content) in [
        (r#"{"memory":{"limit":67108864}}"#, "memory.max", "67108864"),
        (r#"{"memory":{"limit":-1}}"#, "memory.max", "max"),
        (r#"{"memory":{"reservation":4096}}"#, "memory.low", "4096"),
        (r#"{"memory":{"swap":-1}}"#, "memory.swap.max", "max"),
        (r#"{"cpu":{"shares":1024}}"#, "cpu.weight", "100"),
        (r#"{"cpu":{"shares":2}}"#, "cpu.weight", "1"),
        (r#"{"cpu":{"shares":262144}}"#, "cpu.weight", "10000"),
        (r#"{"cpu":{"quota":50000}}"#, "cpu.max", "50000 100000"),
        (r#"{"cpu":{"period":50000}}"#, "cpu.max", "max 50000"),
        (r#"{"cpu":{"quota":-1,"period":7000}}"#, "cpu.max", "max 7000"),
        (r#"{"cpu":{"cpus":"0-1"}}"#, "cpuset.cpus", "0-1"),
        (r#"{"cpu":{"cpus":"7"}}"#, "cpuset.cpus", "1"),
        (r#"{"cpu":{"cpus":"4-7"}}"#, "cpuset.cpus", "0-1"),
        (r#"{"cpu":{"mems":"0-1"}}"#, "cpuset.mems", "0"),
        (r#"{"cpu":{"idle":1}}"#, "cpu.idle", "1"),
        (r#"{"cpu":{"burst":1000}}"#, "cpu.max.burst", "1000"),
        (r#"{"unified":{"cpuset.cpus":"6"}}"#, "cpuset.cpus", "0"),
        (r#"{"unified":{"cpuset.mems":"1"}}"#, "cpuset.mems", "0"),
        (r#"{"unified":{"cpuset.cpus":""}}"#, "cpuset.cpus", "\n"),
        (r#"{"pids":{"limit":7}}"#, "pids.max", "7"),
        (r#"{"pids":{"limit":-1}}"#, "pids.max", "max"),
        (r#"{"blockIO":{"weight":100}}"#, "io.weight", "default 910"),
        (r#"{"unified":{"memory.high":"1048576"}}"#, "memory.high", "1048576"),
        (r#"{"unified":{"cgroup.max.depth":"3"}}"#, "cgroup.max.depth", "3"),
    ] {
        assert_eq!(update(json).unwrap(), [(name.to_owned(), content.to_owned())], "{json}");
    }
    let both = update(r#"{"memory":{"limit":1048576,"swap":3145728}}"#).unwrap();
    assert_eq!(both[0], ("memory.swap.max".to_owned(), "2097152".to_owned()));
    let pages = update(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]}"#).unwrap();
    let names: Vec<_> = pages.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"]);
}

#[test]
fn unset_limits_are_unchanged() {
    for json in [
        "{}",
        "null",
        r#"{"memory":null,"cpu":{"cpus":null,"shares":null},"unified":null}"#,
        r#"{"memory":{"limit":0,"swap":0},"cpu":{"shares":0,"quota":0,"period":0,"cpus":""},"pids":{"limit":0}}"#,
        r#"{"devices":[{"allow":false,"access":"rwm"}],"blockIO":{"weight":0},"network":{"classID":0}}"#,
        r#"{"hugepageLimits":[{"pageSize":"2MB","limit":0}]}"#,
        r#"{"cpu":{"cpus":"","mems":" "}}"#,
    ] {
        assert_eq!(update(json).unwrap(), [], "{json}");
    }
}

#[test]
fn invalid_limits_are_named() {
    for (json, words) in [
        (r#"{"memory":{"swappiness":60}}"#, "memory.swappiness"),
        (r#"{"memory":{"swap":4096}}"#, "together with memory.limit"),
        (r#"{"memory":{"limit":8192,"swap":4096}}"#, "at least memory.limit"),
        (r#"{"memory":{"limit":1073741824}}"#, "1024 MiB, but the VM has 512 MiB"),
        (r#"{"cpu":{"realtimeRuntime":95000}}"#, "real-time"),
        (r#"{"blockIO":{"weight":5}}"#, "10 to 1000"),
        (r#"{"blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1}]}}"#, "io.max"),
        (r#"{"hugepageLimits":[{"pageSize":"two","limit":4194304}]}"#, "two; it takes a size such as 2MB"),
        (r#"{"cpu":{"cpus":"5-2"}}"#, "cpu.cpus has the value \"5-2\""),
        (r#"{"cpu":{"mems":"a"}}"#, "cpu.mems has the value \"a\""),
        (r#"{"cpu":{"idle":2}}"#, "0 or 1"),
        (r#"{"unified":{"cpuset.cpus":"1-"}}"#, "unified has the value \"1-\""),
        (
            r#"{"memory":{"limit":4096,"checkBeforeUpdate":true}}"#,
            "4096 bytes, but the container uses 8388608",
        ),
        (r#"{"unified":{"cgroup.freeze":"1"}}"#, "cgroup.freeze"),
        (r#"{"unified":{"../memory.max":"1"}}"#, "../memory.max"),
    ] {
        let error = update(json).unwrap_err().to_string();
        assert!(error.contains(words), "{json}: {error}");
    }
}

#[test]
fn files_are_written_in_the_order_that_the_kernel_needs() {
    let names = |json: &str| -> Vec<String> {
        update(json).unwrap().into_iter().map(|(name, content)| format!("{name}={content}")).collect()
    };
    assert_eq!(
        names(r#"{"cpu":{"quota":5000,"burst":2000}}"#),
        ["cpu.max.burst=0", "cpu.max=5000 100000", "cpu.max.burst=2000"]
    );
    assert_eq!(names(r#"{"cpu":{"burst":0}}"#), ["cpu.max.burst=0"]);
    assert_eq!(names(r#"{"cpu":{"idle":0,"shares":1024}}"#), ["cpu.idle=0", "cpu.weight=100"]);
    assert_eq!(names(r#"{"cpu":{"idle":1,"shares":1024}}"#), ["cpu.weight=100", "cpu.idle=1"]);
}

#[test]
fn values_that_mean_no_limit_are_removed_at_creation() {
    let created = |json: &str| {
        let mut resources = serde_json::from_str(json).unwrap();
        for_creation(&mut resources).map(|()| serde_json::to_value(resources).unwrap())
    };
    for (json, plain) in [
        (r#"{"memory":{"limit":0,"swap":0,"kernel":9},"pids":{"limit":0}}"#, r#"{"memory":{}}"#),
        (
            r#"{"cpu":{"shares":0,"quota":-1,"period":0,"idle":0,"burst":0,"realtimePeriod":0}}"#,
            r#"{"cpu":{"quota":-1}}"#,
        ),
        (r#"{"hugepageLimits":[{"pageSize":"1GB","limit":0}]}"#, r#"{"hugepageLimits":[]}"#),
        (r#"{"memory":{"limit":4096,"checkBeforeUpdate":true}}"#, r#"{"memory":{"limit":4096}}"#),
    ] {
        let plain: serde_json::Value = serde_json::from_str(plain).unwrap();
        assert_eq!(created(json).unwrap(), plain, "{json}");
    }
    for (json, words) in [
        (r#"{"cpu":{"cpus":"a"}}"#, "cpu.cpus"),
        (r#"{"memory":{"swappiness":60}}"#, "memory.swappiness"),
        (r#"{"memory":{"swap":4096}}"#, "together with memory.limit"),
        (r#"{"rdma":{"mlx5_1":{"hcaHandles":3}}}"#, "RDMA"),
        (r#"{"network":{"classID":5}}"#, "classes"),
        (r#"{"blockIO":{"weightDevice":[{"major":8,"minor":0,"weight":10}]}}"#, "host's devices"),
    ] {
        let error = created(json).unwrap_err().to_string();
        assert!(error.contains(words), "{json}: {error}");
    }
}

#[test]
fn a_limit_beyond_the_vm_may_stay() {
    let resources = serde_json::from_str(r#"{"memory":{"limit":1073741824}}"#).unwrap();
    let now = CurrentLimits { memory_max: "1073741824\n", ..NOW };
    assert_eq!(writes(&resources, now).unwrap().len(), 1);
}

#[test]
fn limits_grow_up_to_what_the_vm_has() {
    let mib = |mib: u64| mib << 20;
    let memory = |old: &str, others: u64, limit: u64| {
        let resources = format!(r#"{{"memory":{{"limit":{limit}}}}}"#);
        let now = CurrentLimits { memory_max: old, others_memory: others, ..NOW };
        writes(&parse(resources.as_bytes()).unwrap(), now).map(drop)
    };
    let old = mib(100).to_string();
    memory(&old, mib(300), mib(212)).unwrap();
    let refused = memory(&old, mib(300), mib(213)).unwrap_err();
    assert_eq!(refused, ResourcesError::BeyondVm { mib: 213, others_mib: 300, vm_mib: 512 });
    assert!(
        refused.to_string().contains("213 MiB, with 300 MiB of the pod's other containers, but the VM has")
    );
    // What does not grow is not refused, although the sum was too large before.
    memory(&old, mib(900), mib(50)).unwrap();
    memory(&old, mib(900), mib(100)).unwrap();

    let quota = |old: &str, new: &str| {
        writes(&parse(new.as_bytes()).unwrap(), CurrentLimits { cpu_max: old, ..NOW }).map(drop)
    };
    quota("50000 100000\n", r#"{"cpu":{"quota":200000}}"#).unwrap();
    let refused = quota("50000 100000\n", r#"{"cpu":{"quota":200001}}"#).unwrap_err();
    assert_eq!(refused, ResourcesError::BeyondVcpus { quota: 200_001, period: 100_000, vcpus: 2 });
    assert!(quota("50000 100000\n", r#"{"cpu":{"period":20000}}"#).is_err(), "a shorter period is more");
    for (old, new) in [
        ("50000 100000\n", r#"{"cpu":{"quota":-1}}"#),
        ("max 100000\n", r#"{"cpu":{"quota":900000}}"#),
        ("900000 100000\n", r#"{"cpu":{"quota":900000,"period":100000}}"#),
        ("900000 100000\n", r#"{"cpu":{"quota":450000,"period":50000}}"#),
        ("900000 100000\n", r#"{"cpu":{"quota":300000}}"#),
    ] {
        quota(old, new).unwrap_or_else(|error| panic!("{old} to {new}: {error}"));
    }
}

#[test]
fn limits_below_what_cannot_be_reclaimed_are_refused() {
    let limit = |bytes: u64| {
        writes(&parse(format!(r#"{{"memory":{{"limit":{bytes}}}}}"#).as_bytes()).unwrap(), NOW).map(drop)
    };
    let used = 786_432;
    limit(used).unwrap();
    assert_eq!(limit(used - 1).unwrap_err(), ResourcesError::Unreclaimable { limit: used - 1, used });
}
