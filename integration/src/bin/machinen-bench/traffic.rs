//! Traffic between a container and a server on the same host, against the same from a container of runc and from a bare
//! VM whose tap device is a port of the same bridge.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    lab::{Lab, PEER},
    process::Running,
    samples::Samples,
};

use crate::{Kind, bare_vm::BareVm, report::Report};

/// One end of a kind of traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Container,
    BareVm,
    Runc,
}

impl End {
    /// How much is sent and received at once, MiB, and how often the other work is done: about a second's worth.
    fn amounts(self) -> (u64, u32) {
        match self {
            Self::Container | Self::BareVm => (64, 200),
            Self::Runc => (1024, 2000),
        }
    }
}

/// The script's name for each kind of traffic, its row in the table, and whether it counts bytes.
const KINDS: [(&str, &str, bool); 5] = [
    ("send", "TCP from a container to its neighbour", true),
    ("receive", "TCP from the neighbour to a container", true),
    ("round_trips", "one byte there and back by TCP", false),
    ("connections", "TCP connections, one after the other", false),
    ("datagrams", "60,000 bytes there and back by UDP", false),
];

/// Measures all kinds of traffic. `qemu` has the arguments of the QEMU of a container whose VM boots.
pub(crate) fn measure(
    containerd: &Containerd,
    qemu: &[String],
    rounds: usize,
    report: &mut Report,
) -> Result<()> {
    let lab = Lab::bridged()?;
    let bundle = Bundle::with_workloads(containerd)?;
    fs::write(bundle.rootfs().join("traffic.py"), include_str!("traffic.py"))?;
    let _server = serve(&lab, &bundle.rootfs())?;
    let (mut ours, mut bare, mut runcs) = (String::new(), String::new(), String::new());
    let vm = BareVm::new(&bundle, qemu)?;
    // The first two are compared, and so take turns.
    for round in 0..rounds {
        eprintln!("traffic: round {} of {rounds}", round + 1);
        ours += &in_container(containerd, &lab, &bundle, End::Container)?;
        bare += &vm.run(&lab, &client(End::BareVm).join(" "))?;
    }
    runcs += &in_container(containerd, &lab, &bundle, End::Runc)?;
    for (name, title, bytes) in KINDS {
        let rate = |end: End, printed: &str| {
            let median = samples(name, printed)?.median() / 1e3;
            let (mib, times) = end.amounts();
            Ok::<_, anyhow::Error>(if bytes { (mib << 20) as f64 / 1e6 } else { f64::from(times) } / median)
        };
        let (ours, bare) = (rate(End::Container, &ours)?, rate(End::BareVm, &bare)?);
        let runc = rate(End::Runc, &runcs)?;
        let row = if bytes { Report::rate } else { Report::frequency };
        row(report, title, &format!("network_{name}"), ours);
        row(report, "  the same from a bare VM with a tap device", &format!("network_{name}_bare"), bare);
        row(report, "  the same with runc", &format!("network_{name}_runc"), runc);
        report.target_at_least(title, ours / bare, 0.9, "x bare VM");
    }
    Ok(())
}

/// The neighbour, which runs the same script. It ends with what is returned.
fn serve(lab: &Lab, rootfs: &Path) -> Result<Running> {
    let rootfs = rootfs.display().to_string();
    let server =
        lab.start_in_peer(&["chroot", &rootfs, "/usr/bin/python3.13", "/traffic.py", "serve", PEER])?;
    server.wait_for_stdout("serving")?;
    Ok(server)
}

fn client(end: End) -> Vec<String> {
    let (mib, times) = end.amounts();
    let amounts = [mib.to_string(), times.to_string(), "1".to_owned()];
    ["/usr/bin/python3.13", "/traffic.py", "ask", PEER]
        .map(str::to_owned)
        .into_iter()
        .chain(amounts)
        .collect()
}

fn in_container(containerd: &Containerd, lab: &Lab, bundle: &Bundle, end: End) -> Result<String> {
    let command = client(end);
    let command: Vec<_> = command.iter().map(String::as_str).collect();
    let config = bundle.config(&command, |spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("an array");
        for namespace in namespaces.iter_mut().filter(|namespace| namespace["type"] == "network") {
            namespace["path"] = lab.path().display().to_string().into();
        }
    })?;
    let kind = if end == End::Runc { Kind::Runc } else { Kind::Clone };
    let before = containerd.inventory()?;
    let printed = containerd.run_spec(&config).runtime(&kind.runtime()).ok()?;
    containerd.settle(&before).context("after traffic")?;
    Ok(printed)
}

fn samples(name: &str, printed: &str) -> Result<Samples> {
    let mut samples = Samples::default();
    let mut counted = 0;
    for line in printed.lines() {
        if let Some(seconds) = line.trim().strip_prefix(name).and_then(|rest| rest.strip_prefix(' ')) {
            let seconds = seconds.parse().with_context(|| format!("odd line {line:?}"))?;
            samples.push(Duration::from_secs_f64(seconds));
            counted += 1;
        }
    }
    ensure!(counted > 0, "no {name} in {printed}");
    Ok(samples)
}
