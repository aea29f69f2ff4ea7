//! A network for a container: two namespaces that a pair of virtual interfaces connects, one of them for the container.

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use machinen_integration::process::{Invocation, Output, Running};

/// The container's addresses, and those of its neighbour.
pub(super) const OWN: &str = "10.77.0.2";
pub(super) const PEER: &str = "10.77.0.1";
pub(super) const OWN6: &str = "fd77::2";
pub(super) const PEER6: &str = "fd77::1";

/// The namespaces. They are removed with everything in them when this is dropped.
#[derive(Debug)]
pub(super) struct Lab {
    name: String,
}

impl Lab {
    /// Makes both namespaces, which nothing connects yet.
    pub(super) fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let lab = Self { name: format!("machinen-test-{}-{number}", std::process::id()) };
        for namespace in [lab.own(), lab.peer()] {
            ip(&["netns", "add", &namespace])?;
            ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
        }
        Ok(lab)
    }

    /// Connects the namespaces, with interfaces of this MTU and with addresses and routes of both kinds.
    pub(super) fn wire(&self, mtu: u32) -> Result<()> {
        let (own, peer, mtu) = (self.own(), self.peer(), mtu.to_string());
        ip(&[
            "-n", &own, "link", "add", "eth0", "mtu", &mtu, "type", "veth", "peer", "name", "eth0", "mtu",
            &mtu, "netns", &peer,
        ])?;
        for (namespace, address, address6) in [(&own, OWN, OWN6), (&peer, PEER, PEER6)] {
            ip(&["-n", namespace, "address", "add", &format!("{address}/24"), "dev", "eth0"])?;
            ip(&["-n", namespace, "address", "add", &format!("{address6}/64"), "dev", "eth0", "nodad"])?;
            ip(&["-n", namespace, "link", "set", "eth0", "up"])?;
        }
        ip(&["-n", &own, "route", "add", "default", "via", PEER])?;
        ip(&["-n", &own, "route", "add", "default", "via", PEER6])?;
        Ok(())
    }

    /// Two namespaces that are connected already.
    pub(super) fn wired() -> Result<Self> {
        let lab = Self::new()?;
        lab.wire(1500)?;
        Ok(lab)
    }

    pub(super) fn own(&self) -> String {
        format!("{}-own", self.name)
    }

    pub(super) fn peer(&self) -> String {
        format!("{}-peer", self.name)
    }

    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(self.own())
    }

    /// The option of `ctr run`.
    pub(super) fn flag(&self) -> String {
        format!("--with-ns=network:{}", self.path().display())
    }

    /// Changes the container's namespace by ip(8).
    pub(super) fn change(&self, args: &[&str]) -> Result<String> {
        ip(&[&["-n", &self.own()], args].concat())
    }

    /// Runs a program in the neighbour's namespace.
    pub(super) fn in_peer(&self, args: &[&str]) -> Result<Output> {
        self.peer_program(args).run()
    }

    /// Starts a program in the neighbour's namespace.
    pub(super) fn start_in_peer(&self, args: &[&str]) -> Result<Running> {
        self.peer_program(args).spawn()
    }

    fn peer_program(&self, args: &[&str]) -> Invocation {
        let namespace = format!("--net=/run/netns/{}", self.peer());
        Invocation::new("nsenter").arg(namespace).args(args.iter().copied()).deadline(Duration::from_secs(60))
    }

    /// What redirects packets in the container's namespace, and the devices that VMs have there.
    pub(super) fn left(&self) -> Result<String> {
        let links = self.change(&["-o", "link", "show"])?;
        let links: Vec<_> = links.lines().filter(|line| line.contains(": machinen0")).collect();
        let own = self.own();
        let tc = |kind: &str| Invocation::new("tc").args(["-n", &own, kind, "show"]);
        let disciplines = tc("qdisc").run()?.ok()?.text();
        let disciplines: Vec<_> = disciplines.lines().filter(|line| line.contains("clsact")).collect();
        Ok([links, disciplines].concat().join("\n"))
    }

    /// # Errors
    /// Something of a VM is left in the container's namespace.
    pub(super) fn nothing_is_left(&self) -> Result<()> {
        let left = self.left()?;
        ensure!(left.is_empty(), "left in the namespace:\n{left}");
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for namespace in [self.own(), self.peer()] {
            if fs::exists(format!("/run/netns/{namespace}")).unwrap_or(false)
                && let Err(error) = ip(&["netns", "delete", &namespace])
            {
                eprintln!("{error:#}");
            }
        }
    }
}

fn ip(args: &[&str]) -> Result<String> {
    let output =
        Invocation::new("ip").args(args.iter().copied()).run().context("iproute2 is not installed")?;
    Ok(output.ok().with_context(|| format!("ip {}", args.join(" ")))?.text())
}
