//! Networks that CNI plugins make for clients: `ctr run --cni` does so between Create and Start, and nerdctl in a hook.

use std::fs;

use anyhow::{Context, Result, ensure};
use machinen_integration::{bundle::Bundle, containerd::Containerd, paths, process::Invocation};
use serde_json::{Value, json};

use super::lab::Lab;
use crate::harness::{IMAGE, on_every_containerd, on_newest_containerd};

on_every_containerd!(of_ctr);
on_newest_containerd!(of_nerdctl);

/// What a container with the network shows.
const LOOK: &str = "ip -4 -o addr show dev eth0; ip route; ping -c 1 -W 20 10.99.7.1";
const SEEN: [&str; 3] = ["inet 10.99.7.2/24", "default via 10.99.7.1 dev eth0", "1 packets received"];

/// A network of a bridge, whose addresses are written down below `/var/lib/cni`, or in a directory of the test.
fn plugin(data: Option<&str>) -> Value {
    let mut ipam = json!({
        "type": "host-local", "ranges": [[{ "subnet": "10.99.7.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }],
    });
    if let Some(data) = data {
        ipam["dataDir"] = data.into();
    }
    json!({ "cniVersion": "1.0.0", "name": "test", "type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": ipam })
}

/// Gives `ctr` the fixed places of the plugins and their configuration, in a mount namespace of its own. The bridge is made
/// in the network namespace that it runs in.
const PLACES: &str = r#"
set -e
plugins=$1 configuration=$2 scratch=$3; shift 3
mount -t tmpfs none /opt
mkdir /opt/cni
ln -s "$plugins" /opt/cni/bin
mount -t tmpfs none /var/lib
mkdir -p "$scratch/upper" "$scratch/work"
mount -t overlay none -o "lowerdir=/etc,upperdir=$scratch/upper,workdir=$scratch/work" /etc
mkdir -p /etc/cni
mount -t tmpfs none /etc/cni
mkdir /etc/cni/net.d
cp "$configuration" /etc/cni/net.d/10-test.conflist
exec "$@"
"#;

fn of_ctr(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::new()?;
    let scratch = containerd.root().join("cni");
    fs::create_dir(&scratch)?;
    let configuration = scratch.join("test.conflist");
    let list = json!({ "cniVersion": "1.0.0", "name": "test", "plugins": [plugin(None)] });
    fs::write(&configuration, list.to_string())?;
    let wrapper = Invocation::new("nsenter")
        .arg(format!("--net={}", lab.peer_path().display()))
        .args(["unshare", "--mount", "sh", "-c", PLACES, "sh"])
        .arg(paths::cni_plugins()?)
        .arg(&configuration)
        .arg(&scratch);
    let run = containerd.run(IMAGE, &["sh", "-c", LOOK]).flag("--cni");
    let output = run.invocation()?.under(wrapper).run()?.ok()?.text();
    for wanted in SEEN {
        ensure!(output.contains(wanted), "no {wanted:?} in {output}");
    }
    fs::remove_dir_all(&scratch)?;
    Ok(())
}

/// nerdctl names no network namespace, and its hooks call the plugins for the one of the pid in their state.
fn of_nerdctl(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::new()?;
    let bundle = Bundle::busybox(containerd)?;
    let dir = containerd.root().join("nerdctl");
    fs::create_dir(&dir)?;
    for (name, text) in
        [("hosts", "10.99.7.2 box\n"), ("resolv.conf", "nameserver 10.99.7.1\n"), ("hostname", "box\n")]
    {
        fs::write(dir.join(name), text)?;
    }
    let data = dir.join("data").display().to_string();
    fs::write(dir.join("conf"), plugin(Some(&data)).to_string())?;
    let plugins = paths::cni_plugins()?;
    let hook = |command: &str, namespace: &str| {
        let (dir, plugins, peer) = (dir.display(), plugins.display(), lab.peer_path());
        let script = format!(
            "cat > {dir}/{command}.json; pid=$(sed -n 's/.*\"pid\":\\([0-9]*\\).*/\\1/p' {dir}/{command}.json); \
             export CNI_COMMAND={command} CNI_CONTAINERID=test CNI_NETNS={namespace} CNI_IFNAME=eth0 CNI_PATH={plugins}; \
             nsenter --net={} {plugins}/bridge < {dir}/conf > {dir}/{command}.out",
            peer.display()
        );
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin:/usr/sbin:/sbin"] }])
    };
    let look = format!("{LOOK}; cat /etc/hosts /etc/resolv.conf; hostname");
    let config = bundle.config(&["sh", "-c", &look], |spec| {
        spec["hostname"] = "box".into();
        spec["annotations"] = json!({ "nerdctl/networks": "[\"test\"]", "nerdctl/hostname": "box" });
        spec["hooks"] =
            json!({ "createRuntime": hook("ADD", "/proc/$pid/ns/net"), "poststop": hook("DEL", "") });
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        for name in ["hosts", "resolv.conf", "hostname"] {
            mounts.push(json!({
                "destination": format!("/etc/{name}"), "type": "bind", "source": dir.join(name),
                "options": ["bind", "rprivate"],
            }));
        }
        for kind in ["bounding", "effective", "permitted"] {
            let kinds = spec["process"]["capabilities"][kind].as_array_mut().expect("an array");
            kinds.push("CAP_NET_RAW".into());
        }
    })?;
    let output = containerd.run_spec(&config).ok()?;
    for wanted in [&SEEN[..], &["10.99.7.2 box", "nameserver 10.99.7.1"]].concat() {
        ensure!(output.contains(wanted), "no {wanted:?} in {output}");
    }
    ensure!(output.ends_with("box\n"), "{output}");
    let state: Value = serde_json::from_slice(&fs::read(dir.join("ADD.json"))?)?;
    ensure!(state["annotations"]["nerdctl/hostname"] == "box" && state["status"] == "creating", "{state}");
    // The address is free again, so the other hook has run too.
    let leases = fs::read_dir(dir.join("data/test")).context("the plugin has written nothing down")?;
    let left: Vec<_> = leases.flatten().map(|entry| entry.file_name()).collect();
    ensure!(left.iter().all(|name| !name.to_string_lossy().starts_with("10.")), "left: {left:?}");
    fs::remove_dir_all(&dir)?;
    Ok(())
}
