//! Tests of the reduction of a configuration to what the guest receives.

use oci_spec::runtime::{MountBuilder, get_default_mounts, get_default_namespaces};
use serde_json::{Value, json};

use super::*;
use crate::spec::disks::DiskSource;

fn bind(destination: &str, source: &str) -> Mount {
    MountBuilder::default()
        .destination(destination)
        .typ("bind")
        .source(source)
        .options(vec!["rbind".to_owned(), "ro".to_owned()])
        .build()
        .unwrap()
}

#[test]
fn the_default_configuration_is_kept_but_for_the_hosts_part() {
    let reduced = reduce(Spec::default(), "c1").unwrap();
    assert_eq!(reduced.spec.mounts(), &Some(get_default_mounts()));
    let linux = reduced.spec.linux().as_ref().unwrap();
    assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/machinen/c1")));
    let kinds: Vec<_> =
        linux.namespaces().as_ref().unwrap().iter().map(|namespace| namespace.typ()).collect();
    assert!(!kinds.contains(&LinuxNamespaceType::Network));
    assert_eq!(kinds.len(), get_default_namespaces().len() - 1);
}

#[test]
fn clock_offsets_need_a_time_namespace() {
    let with = |kinds: Value| {
        let mut spec = serde_json::to_value(Spec::default()).unwrap();
        spec["linux"]["timeOffsets"] = json!({ "monotonic": { "secs": 100, "nanosecs": 0 } });
        spec["linux"]["namespaces"] = kinds;
        reduce(serde_json::from_value(spec).unwrap(), "c1").map(drop)
    };
    assert_eq!(with(json!([{ "type": "time" }])), Ok(()));
    assert_eq!(with(json!([{ "type": "mount" }])), Err(ReduceError::OffsetsWithoutNamespace));
}

#[test]
fn where_cgroups_are_mounted_there_is_a_cgroup_namespace() {
    let kinds = |given: &[LinuxNamespaceType], mounted: &str| {
        let namespaces =
            given.iter().map(|&kind| LinuxNamespaceBuilder::default().typ(kind).build().unwrap());
        let mut spec = Spec::default();
        spec.linux_mut().as_mut().unwrap().set_namespaces(Some(namespaces.collect()));
        let mount = MountBuilder::default().destination("/sys/fs/cgroup").typ(mounted).build().unwrap();
        spec.set_mounts(Some(vec![mount]));
        let reduced = reduce(spec, "c1").unwrap().spec;
        let namespaces = reduced.linux().as_ref().unwrap().namespaces().clone().unwrap();
        namespaces.iter().map(LinuxNamespace::typ).collect::<Vec<_>>()
    };
    let (mount, cgroup) = (LinuxNamespaceType::Mount, LinuxNamespaceType::Cgroup);
    assert_eq!(kinds(&[mount], "cgroup"), [mount, cgroup]);
    assert_eq!(kinds(&[mount], "cgroup2"), [mount, cgroup]);
    assert_eq!(kinds(&[cgroup, mount], "cgroup"), [cgroup, mount]);
    assert_eq!(kinds(&[mount], "tmpfs"), [mount]);
}

#[test]
fn a_bind_mount_keeps_its_place_among_the_mounts() {
    let mut spec = Spec::default();
    let tmpfs = || MountBuilder::default().destination("/t").typ("tmpfs").build().unwrap();
    spec.set_mounts(Some(vec![
        bind("/etc/hosts", "/etc/hosts"),
        tmpfs(),
        bind("data", "/srv/data"),
        tmpfs(),
    ]));
    let reduced = reduce(spec, "c1").unwrap();
    let [volume] = &reduced.volumes[..] else { panic!("{:?}", reduced.volumes) };
    assert_eq!((volume.mount, volume.source.as_path()), (1, Path::new("/srv/data")));
    assert_eq!(reduced.spec.mounts().as_ref().unwrap()[1].destination(), Path::new("/data"));
    assert_eq!(reduced.injected.len(), 1);
}

#[test]
fn the_two_files_of_host_networking_are_injected() {
    let mut spec = Spec::default();
    spec.set_mounts(Some(vec![
        bind("/etc/hosts", "/etc/hosts"),
        bind("/etc/resolv.conf", "/etc/resolv.conf"),
    ]));
    let reduced = reduce(spec, "c1").unwrap();
    assert_eq!(reduced.injected.len(), 2);
    assert_eq!(reduced.spec.mounts(), &Some(vec![]));
}

#[test]
fn namespaces_by_path_are_the_hosts_network_or_another_containers() {
    let with = |kind, path: &str| {
        let mut spec = Spec::default();
        let namespace = LinuxNamespaceBuilder::default().typ(kind).path(path).build().unwrap();
        spec.linux_mut().as_mut().unwrap().set_namespaces(Some(vec![namespace]));
        reduce(spec, "c1")
    };
    let reduced = with(LinuxNamespaceType::Network, "/run/netns/a").unwrap();
    assert_eq!(reduced.netns.as_deref(), Some(Path::new("/run/netns/a")));
    let reduced = with(LinuxNamespaceType::Pid, "/proc/7/ns/pid").unwrap();
    let [named] = &reduced.named[..] else { panic!("{:?}", reduced.named) };
    assert_eq!((named.kind, named.path.as_path()), (LinuxNamespaceType::Pid, Path::new("/proc/7/ns/pid")));
    let left = reduced.spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
    assert!(left.iter().all(|namespace| namespace.typ() != LinuxNamespaceType::Pid), "{left:?}");
    assert!(matches!(
        with(LinuxNamespaceType::Mount, "/proc/1/ns/mnt"),
        Err(ReduceError::SharedNamespace { .. })
    ));
}

/// Reduces a configuration with this `linux` section for a VM with two CPUs.
fn linux(linux: Value) -> Result<Value, ReduceError> {
    let spec = json!({"ociVersion": "1.2.0", "linux": linux});
    let reduced = reduce(serde_json::from_value(spec).unwrap(), "c1")?;
    Ok(serde_json::to_value(reduced.for_vm(2)).unwrap()["linux"].clone())
}

#[test]
fn cpus_and_nodes_are_the_guests() {
    let reduced = linux(json!({
        "resources": {"cpu": {"cpus": "4-7", "mems": "1"}, "unified": {"cpuset.cpus": "5"}},
        "memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0-1"},
    }))
    .unwrap();
    assert_eq!(reduced["resources"]["cpu"], json!({"cpus": "0-1", "mems": "0"}));
    assert_eq!(reduced["resources"]["unified"], json!({"cpuset.cpus": "1"}));
    assert_eq!(reduced["memoryPolicy"]["nodes"], "0");
    for nonsense in [
        json!({"cpu": {"cpus": "5-2"}}),
        json!({"cpu": {"mems": "x"}}),
        json!({"unified": {"cpuset.cpus": ","}}),
    ] {
        let error = linux(json!({"resources": nonsense})).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    }
}

#[test]
fn a_configuration_without_linux_has_only_mounts_of_its_own() {
    let spec = serde_json::from_value(json!({"ociVersion": "1.2.0"})).unwrap();
    let reduced = serde_json::to_value(reduce(spec, "c1").unwrap().spec).unwrap();
    assert_eq!(reduced["linux"], json!({"cgroupsPath": "/machinen/c1", "namespaces": [{"type": "mount"}]}));
}

#[test]
fn members_that_concern_the_host_are_refused_by_name() {
    for (section, words) in [
        (json!({"intelRdt": {}}), "linux.intelRdt"),
        (json!({"netDevices": {"eth0": {"name": "eth1"}}}), "linux.netDevices"),
    ] {
        let error = linux(section).unwrap_err();
        assert!(error.kind() == ErrorKind::Unimplemented && error.to_string().contains(words), "{error}");
    }
    let mut spec = Spec::default();
    let affinity = serde_json::from_value(json!({"initial": "0-3"})).unwrap();
    spec.process_mut().as_mut().unwrap().set_exec_cpu_affinity(Some(affinity));
    assert!(reduce(spec, "c1").unwrap_err().to_string().contains("execCPUAffinity"));
}

#[test]
fn two_namespaces_of_a_kind_are_refused() {
    let twice = json!([{"type": "pid"}, {"type": "network"}, {"type": "pid"}]);
    let error = linux(json!({"namespaces": twice})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_eq!(error.to_string(), "linux.namespaces has two pid namespaces");
}

#[test]
fn a_relative_destination_is_below_the_root() {
    let mount = |destination: &str| {
        let mut spec = Spec::default();
        let mount = json!({"destination": destination, "type": "tmpfs"});
        spec.set_mounts(Some(vec![serde_json::from_value(mount).unwrap()]));
        reduce(spec, "c1")
    };
    let mounts = mount("scratch/a").unwrap().spec.mounts().clone().unwrap();
    assert_eq!(mounts[0].destination(), Path::new("/scratch/a"));
    assert_eq!(mount("").unwrap_err(), ReduceError::NoDestination);
}

#[test]
fn block_devices_of_the_host_are_disks() {
    let disks = |rules: Value, mounts: Value| {
        let devices = json!([
            {"path": "/dev/a", "type": "b", "major": 8, "minor": 0},
            {"path": "/dev/c", "type": "c", "major": 1, "minor": 3},
        ]);
        let linux = json!({"devices": devices, "resources": {"devices": rules}});
        let spec = json!({"ociVersion": "1.2.0", "mounts": mounts, "linux": linux});
        reduce(serde_json::from_value(spec).unwrap(), "c1").unwrap().disks
    };
    let rule = |minor: u32, access: &str| json!({"allow": true, "type": "b", "major": 8, "minor": minor, "access": access});
    let none = json!([]);
    for (rules, read_only) in [
        (json!([]), true),
        (json!([rule(0, "rw")]), false),
        (json!([rule(0, "r"), rule(1, "rwm")]), true),
        (json!([rule(0, "rwm"), {"allow": false, "access": "w"}]), true),
    ] {
        let found = disks(rules.clone(), none.clone());
        let source = DiskSource::Device { path: "/dev/a".into(), major: 8, minor: 0 };
        assert_eq!(found, [DiskRequest { source, read_only }], "{rules}");
    }
    // A privileged container has a node for each device of the host, and none of them is given to it.
    assert_eq!(disks(json!([{"allow": true, "access": "rwm"}]), none), []);
    let mount = |kind: &str, options: Value| {
        json!([
            {"destination": "/t", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/d", "type": kind, "source": "/dev/sdb", "options": options},
        ])
    };
    for (kind, options, read_only) in
        [("ext4", json!(["noatime"]), false), ("ext4", json!(["rw", "ro"]), true), ("erofs", json!([]), true)]
    {
        let found = disks(json!([]), mount(kind, options));
        let source = DiskSource::Mount { mount: 1, source: "/dev/sdb".into(), destination: "/d".into() };
        assert_eq!(found[0], DiskRequest { source, read_only });
    }
}
