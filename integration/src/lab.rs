//! A network for a container: two namespaces that a pair of virtual interfaces connects, one of them for the container.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::process::{Invocation, Output, Running};

/// The container's addresses, and those of its neighbour.
pub const OWN: &str = "10.77.0.2";
pub const PEER: &str = "10.77.0.1";
pub const OWN6: &str = "fd77::2";
pub const PEER6: &str = "fd77::1";
/// Addresses of the same networks that nothing has.
pub const OTHER: &str = "10.77.0.3";
pub const OTHER6: &str = "fd77::3";

/// How long a program of the neighbour may take.
const PATIENCE: Duration = Duration::from_secs(240);

/// The namespaces. They are removed with everything in them when this is dropped.
#[derive(Debug)]
pub struct Lab {
    name: String,
}

impl Lab {
    /// Makes both namespaces, which nothing connects yet.
    ///
    /// # Errors
    /// ip(8) fails.
    pub fn new() -> Result<Self> {
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
    ///
    /// # Errors
    /// ip(8) fails.
    pub fn wire(&self, mtu: u32) -> Result<()> {
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
    ///
    /// # Errors
    /// ip(8) fails.
    pub fn wired() -> Result<Self> {
        let lab = Self::new()?;
        lab.wire(1500)?;
        Ok(lab)
    }

    /// Connects the container's namespace with a bridge of the neighbour.
    ///
    /// # Errors
    /// ip(8) fails.
    pub fn bridged() -> Result<Self> {
        let lab = Self::new()?;
        let peer = lab.peer();
        ip(&["-n", &peer, "link", "add", "eth0", "type", "bridge"])?;
        for address in [format!("{PEER}/24"), format!("{PEER6}/64")] {
            // Only IPv6 finds out whether another host has the address.
            let nodad = if address.contains(':') { &["nodad"][..] } else { &[] };
            ip(&[&["-n", &peer, "address", "add", &address, "dev", "eth0"], nodad].concat())?;
        }
        ip(&["-n", &peer, "link", "set", "eth0", "up"])?;
        lab.join_bridge(&lab.own(), "port0", [OWN, OWN6])?;
        Ok(lab)
    }

    /// Makes a second namespace for a container, and connects it with the same bridge. Returns its path.
    ///
    /// # Errors
    /// ip(8) fails.
    pub fn second(&self, addresses: [&str; 2]) -> Result<PathBuf> {
        let second = self.second_name();
        ip(&["netns", "add", &second])?;
        ip(&["-n", &second, "link", "set", "lo", "up"])?;
        self.join_bridge(&second, "port1", addresses)?;
        Ok(PathBuf::from("/run/netns").join(second))
    }

    fn join_bridge(&self, namespace: &str, port: &str, [address, address6]: [&str; 2]) -> Result<()> {
        let peer = self.peer();
        ip(&["-n", namespace, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", &peer])?;
        ip(&["-n", &peer, "link", "set", port, "master", "eth0", "up"])?;
        ip(&["-n", namespace, "address", "add", &format!("{address}/24"), "dev", "eth0"])?;
        ip(&["-n", namespace, "address", "add", &format!("{address6}/64"), "dev", "eth0", "nodad"])?;
        ip(&["-n", namespace, "link", "set", "eth0", "up"])?;
        ip(&["-n", namespace, "route", "add", "default", "via", PEER])?;
        Ok(())
    }

    fn second_name(&self) -> String {
        format!("{}-second", self.name)
    }

    /// The hardware address of the interface in a container's namespace.
    ///
    /// # Errors
    /// ip(8) fails, or the namespace has no such interface.
    pub fn mac_in(path: &Path) -> Result<[u8; 6]> {
        let namespace = path.file_name().and_then(OsStr::to_str).context("no name")?;
        let shown = ip(&["-n", namespace, "-o", "link", "show", "dev", "eth0"])?;
        let mac = shown.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
        let octets = mac.context("no address")?.split(':').map(|octet| u8::from_str_radix(octet, 16));
        let octets: Vec<_> = octets.collect::<Result<_, _>>()?;
        octets.try_into().map_err(|octets| anyhow::anyhow!("odd hardware address {octets:?}"))
    }

    pub fn own(&self) -> String {
        format!("{}-own", self.name)
    }

    /// The name of the neighbour's namespace.
    pub fn peer(&self) -> String {
        format!("{}-peer", self.name)
    }

    pub fn peer_path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(self.peer())
    }

    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(self.own())
    }

    /// The option of `ctr run`.
    pub fn flag(&self) -> String {
        format!("--with-ns=network:{}", self.path().display())
    }

    /// Changes the container's namespace by ip(8).
    ///
    /// # Errors
    /// ip(8) fails.
    pub fn change(&self, args: &[&str]) -> Result<String> {
        ip(&[&["-n", &self.own()], args].concat())
    }

    /// Runs a program in the neighbour's namespace.
    ///
    /// # Errors
    /// The program cannot be run.
    pub fn in_peer(&self, args: &[&str]) -> Result<Output> {
        self.peer_program(args).run()
    }

    /// Starts a program in the neighbour's namespace.
    ///
    /// # Errors
    /// The program cannot be run.
    pub fn start_in_peer(&self, args: &[&str]) -> Result<Running> {
        self.peer_program(args).spawn()
    }

    /// The same with a stdin to write to.
    ///
    /// # Errors
    /// The program cannot be run.
    pub fn talk_in_peer(&self, args: &[&str]) -> Result<Running> {
        self.peer_program(args).with_stdin().spawn()
    }

    fn peer_program(&self, args: &[&str]) -> Invocation {
        let namespace = format!("--net=/run/netns/{}", self.peer());
        Invocation::new("nsenter").arg(namespace).args(args.iter().copied()).deadline(PATIENCE)
    }

    /// What redirects packets in the container's namespace, and the devices that VMs have there.
    ///
    /// # Errors
    /// ip(8) or tc(8) fails.
    pub fn left(&self) -> Result<String> {
        let links = self.change(&["-o", "link", "show"])?;
        let links: Vec<_> = links.lines().filter(|line| line.contains(": machinen0")).collect();
        let own = self.own();
        let tc = |kind: &str| Invocation::new("tc").args(["-n", &own, kind, "show"]);
        let disciplines = tc("qdisc").run()?.ok()?.text();
        let disciplines: Vec<_> = disciplines.lines().filter(|line| line.contains("clsact")).collect();
        Ok([links, disciplines].concat().join("\n"))
    }

    /// Nothing of a VM is in the container's namespace.
    ///
    /// # Errors
    /// Something of a VM is left, or ip(8) or tc(8) fails.
    pub fn nothing_is_left(&self) -> Result<()> {
        let left = self.left()?;
        ensure!(left.is_empty(), "left in the namespace:\n{left}");
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for namespace in [self.own(), self.peer(), self.second_name()] {
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
