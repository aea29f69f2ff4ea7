//! What a securityContext asks for.

use anyhow::{Result, ensure};
use machinen_integration::cri::{Node, api};

use super::both_runtimes;

both_runtimes! {
    every: [],
    oldest_and_newest: [],
    newest: [users_and_groups, read_only_root, capabilities_and_seccomp, sysctls],
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
