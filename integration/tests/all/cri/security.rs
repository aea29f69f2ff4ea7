//! What a securityContext asks for.

use std::{fs, os::unix::fs::MetadataExt as _};

use anyhow::{Result, bail, ensure};
use machinen_integration::cri::{Handler, Node, Pod, api};
use serde_json::json;

use super::{both_runtimes, pod_tests};

both_runtimes! {
    every: [],
    oldest_and_newest: [],
    newest: [
        users_and_groups, only_the_given_groups, read_only_root, capabilities_and_seccomp, sysctls, devices_of_cdi,
    ],
}

// containerd 1.6 knows no such pods, and 1.7 none with volumes. The shims for runc that the tests have cannot mount the
// root file system of such a pod.
pod_tests! {
    users_machinen_1_7(V1_7, Machinen): [users_of_a_namespace];
    users_machinen_2_1(V2_1, Machinen): [users_of_a_namespace, volumes_in_a_user_namespace];
    users_sandbox_2_1(V2_1, MachinenSandbox): [users_of_a_namespace, volumes_in_a_user_namespace];
}

fn security(config: &mut api::ContainerConfig) -> &mut api::LinuxContainerSecurityContext {
    let linux = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    linux.expect("the container has a security context")
}

const IDLE: [&str; 2] = ["sleep", "100000"];

fn users_and_groups(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let user = pod.start("user", &IDLE, |config| {
        let security = security(config);
        security.run_as_user = Some(api::Int64Value { value: 1000 });
        security.run_as_group = Some(api::Int64Value { value: 2000 });
        security.supplemental_groups = vec![3000];
    })?;
    let id = user.shell("id -u; id -g; id -G")?;
    // The image's groups of the user come along.
    ensure!(id.starts_with("1000\n2000\n2000 ") && id.contains("3000"), "{id}");
    let owned = user.shell("touch /tmp/file; stat -c '%u %g' /tmp/file; cat /etc/secret 2>&1 || true")?;
    ensure!(owned.starts_with("1000 2000\n") && owned.contains("Permission denied"), "{owned}");
    let root = pod.idle("root")?;
    ensure!(root.shell("id -u")? == "0\n", "{}", root.shell("id")?);
    pod.remove()
}

/// `supplementalGroupsPolicy: Strict`: the image's groups of the user do not come along.
fn only_the_given_groups(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let strict = pod.start("strict", &IDLE, |config| {
        let security = security(config);
        security.run_as_user = Some(api::Int64Value { value: 1000 });
        security.run_as_group = Some(api::Int64Value { value: 2000 });
        security.supplemental_groups = vec![3000];
        security.supplemental_groups_policy = api::SupplementalGroupsPolicy::Strict.into();
    })?;
    let groups = strict.shell("id -G")?;
    ensure!(groups == "2000 3000\n", "{groups}");
    let user = strict.status()?.user.and_then(|user| user.linux).unwrap_or_default();
    ensure!((user.uid, user.gid) == (1000, 2000) && user.supplemental_groups == [2000, 3000], "{user:?}");
    pod.remove()
}

/// What the specification of a device changes, it changes in the VM; a device of the host's kernel cannot be there.
fn devices_of_cdi(node: &mut Node) -> Result<()> {
    let dir = node.containerd().root().join("cdi");
    fs::write(dir.join("library"), "of the card\n")?;
    let library = json!({
        "hostPath": dir.join("library"), "containerPath": "/usr/lib/card", "options": ["ro", "rbind", "rprivate"],
    });
    // Numbers of a graphics card.
    let node_of_card = json!({ "path": "/dev/card", "type": "c", "major": 226, "minor": 7 });
    let specification = json!({
        "cdiVersion": "0.6.0",
        "kind": "machinen.test/card",
        "devices": [
            { "name": "library", "containerEdits": { "env": ["CARD=here"], "mounts": [library] } },
            { "name": "node", "containerEdits": { "deviceNodes": [node_of_card] } },
        ],
    });
    fs::write(dir.join("card.json"), specification.to_string())?;
    let with = |name: &str| {
        let device = api::CdiDevice { name: format!("machinen.test/card={name}") };
        move |config: &mut api::ContainerConfig| config.cdi_devices = vec![device]
    };
    let pod = node.pod(|_| ())?;
    let library = pod.start("library", &IDLE, with("library"))?;
    let seen = library.shell("cat /usr/lib/card; tr '\\0' '\\n' < /proc/1/environ | grep CARD")?;
    ensure!(seen == "of the card\nCARD=here\n", "{seen}");
    let container = pod.create("node", &IDLE, with("node"))?;
    match (node.handler(), container.start()) {
        (Handler::Runc, started) => started?,
        (_, Ok(())) => bail!("a container has a card that its VM does not have"),
        (_, Err(refusal)) => {
            ensure!(
                refusal.message.contains("/dev/card is a character device of the host (226:7)"),
                "{refusal}"
            );
        }
    }
    container.remove().or_else(|_| container.stop(0).and_then(|()| container.remove()))?;
    ensure!(library.runs()?, "{:?}", library.status());
    pod.remove()
}

fn read_only_root(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let container = pod.start("main", &IDLE, |config| security(config).readonly_rootfs = true)?;
    let refused = container.shell("! touch /file 2>&1")?;
    ensure!(refused.contains("Read-only file system"), "{refused}");
    container.shell("touch /dev/shm/file")?;
    pod.remove()
}

fn capabilities_and_seccomp(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let read = "grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t\\n'";
    let plain = pod.idle("plain")?.shell(read)?;
    ensure!(plain == "CapEff:00000000a80425fbNoNewPrivs:0Seccomp:2", "{plain}");
    let changed = pod.start("changed", &IDLE, |config| {
        let security = security(config);
        security.no_new_privs = true;
        security.seccomp = Some(api::SecurityProfile {
            profile_type: api::security_profile::ProfileType::Unconfined.into(),
            ..Default::default()
        });
        security.capabilities = Some(api::Capability {
            add_capabilities: vec!["NET_ADMIN".to_owned()],
            drop_capabilities: vec!["ALL".to_owned()],
            ..Default::default()
        });
    })?;
    let changed = changed.shell(read)?;
    ensure!(changed == "CapEff:0000000000001000NoNewPrivs:1Seccomp:0", "{changed}");
    pod.remove()
}

fn sysctls(node: &mut Node) -> Result<()> {
    let pod = node.pod(|config| {
        let linux = config.linux.as_mut().expect("the pod has Linux's part");
        for (name, value) in [("net.ipv4.ip_unprivileged_port_start", "80"), ("kernel.shm_rmid_forced", "1")]
        {
            linux.sysctls.insert(name.to_owned(), value.to_owned());
        }
    })?;
    for name in ["first", "second"] {
        let container = pod.idle(name)?;
        let read = container
            .shell("cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced")?;
        ensure!(read == "80\n1\n", "{name}: {read}");
    }
    pod.remove()
}

/// The first user of a pod's user namespace, as the kubelet gives each pod one of its own.
const HOST: u32 = 4 << 16;

fn ids() -> Vec<api::IdMapping> {
    vec![api::IdMapping { host_id: HOST, container_id: 0, length: 1 << 16 }]
}

/// A pod with `hostUsers: false`.
fn pod_with_users(node: &mut Node) -> Result<Pod> {
    let users = api::UserNamespace { mode: api::NamespaceMode::Pod.into(), uids: ids(), gids: ids() };
    node.pod(|config| {
        let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        let options = security.and_then(|security| security.namespace_options.as_mut());
        options.expect("the pod has options").userns_options = Some(users);
    })
}

fn users_of_a_namespace(node: &mut Node) -> Result<()> {
    let pod = pod_with_users(node)?;
    for name in ["first", "second"] {
        let container = pod.idle(name)?;
        let script = "cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; id -u; cat /etc/secret; \
                      touch /made; chown 1000:2000 /made; stat -c '%u %g' / /bin/busybox /made";
        let seen = container.shell(script)?;
        let map = format!(" 0 {HOST} 65536\n");
        let wanted = format!("{map}{map}0\nfor root only\n0 0\n0 0\n1000 2000\n");
        ensure!(seen == wanted, "{name}: {seen}");
        // Its root is not that of its VM.
        let refused = container.shell("! mknod /dev/disk b 8 0 2>&1")?;
        ensure!(refused.contains("Operation not permitted"), "{refused}");
    }
    pod.remove()
}

fn volumes_in_a_user_namespace(node: &mut Node) -> Result<()> {
    let pod = pod_with_users(node)?;
    let volume = pod.dir()?;
    let container = pod.start("main", &IDLE, |config| {
        config.mounts.push(api::Mount {
            container_path: "/volume".to_owned(),
            host_path: volume.display().to_string(),
            uid_mappings: ids(),
            gid_mappings: ids(),
            ..Default::default()
        });
    })?;
    let seen = container.shell("touch /volume/made; stat -c '%u %g' /volume /volume/made /etc/hosts")?;
    ensure!(seen == "0 0\n0 0\n0 0\n", "{seen}");
    let made = fs::metadata(volume.join("made"))?;
    ensure!((made.uid(), made.gid()) == (0, 0), "{} {}", made.uid(), made.gid());
    pod.remove()
}
