//! pasta(1) connects the network namespace of a container with the outside: the network of a container whose
//! configuration names none.
//!
//! ```text
//!   host's network ── sockets ── pasta ── eth0 of the container's namespace ──(tc)── tap ── QEMU
//! ```
//! pasta makes a tap device in the namespace and speaks for everything behind it. It is a child of the process that owns
//! the VM, and ends with the VM. What it parses comes from the guest, so it runs in a jail that shows it no files, as a user
//! of its own where that may open /dev/net/tun, and it restricts its own system calls before the first packet.

use std::{
    ffi::OsString,
    fs, io,
    net::{SocketAddr, TcpListener, UdpSocket},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::PermissionsExt as _,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use machinen_base::{
    error::chain,
    process::{
        Child, Jail, JailFiles, Namespaces, ReservedUser, ResourceLimits, RunAs, Spawn, Stdio, find_program,
    },
    text::printable,
};
use rustix::{
    fs::{Gid, Uid, fchown},
    process::{Resource, getrlimit},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    net::unix::pipe,
    task::JoinHandle,
    time::timeout,
};

use super::NetworkError;
use crate::config::ports::{Protocol, PublishedPort};

/// The nameserver that the container asks; pasta sends the queries to the host's.
pub const NAMESERVER: &str = "10.0.2.3";
/// The container's address and its gateway, which only this container sees.
const ADDRESS: &str = "10.0.2.100";
const PREFIX: &str = "24";
const GATEWAY: &str = "10.0.2.2";
/// The name of the container's interface.
const INTERFACE: &str = "eth0";

/// How long pasta may take to set the namespace up.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// What is kept of pasta's messages, bytes.
const MAX_PRINTED: u64 = 4096;
/// pasta has some descriptors for each connection.
const OPEN_FILES: u64 = 32 << 10;

/// Where the jail shows the namespace.
const NAMESPACE: &str = "/netns";
const TUN: &str = "/dev/net/tun";
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Where pasta mounts its own root.
const TMP: &str = "/tmp";
/// Where pasta writes its pid when it is ready.
const READY: &str = "/proc/self/fd/1";

/// See capabilities(7) and linux/capability.h: to listen on low ports, and to make a device in the namespace, which is
/// entered with the last one. That one also lets pasta leave its root.
const CAPABILITIES: [u8; 3] = [10, 12, 21];

/// The network of a container that has asked for one without a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OutsideNetwork {
    /// pasta, a path or a name that is looked up in PATH.
    pub(crate) pasta: PathBuf,
    /// The ports of the host that lead to the container.
    pub(crate) ports: Vec<PublishedPort>,
}

/// A pasta that connects a namespace.
#[derive(Debug)]
pub(super) struct RunningPasta {
    child: Child,
    /// None when it was asked for.
    printed: Option<JoinHandle<String>>,
    _user: ReservedUser,
}

impl OutsideNetwork {
    /// Connects the namespace with the outside. The namespace has the interface when this returns.
    ///
    /// # Errors
    /// A published port is in use, or pasta does not start.
    pub(super) async fn connect(&self, namespace: &OwnedFd) -> Result<RunningPasta, NetworkError> {
        check_ports(&self.ports)?;
        let user = ReservedUser::reserve().map_err(NetworkError::User)?;
        let run_as = if is_open_to_all(TUN) { user.run_as(Vec::new()) } else { RunAs::default() };
        let (reader, writer) = ready_pipe(&run_as).map_err(NetworkError::PastaStreams)?;
        let spawn = Spawn::new(&self.pasta)
            .args(self.arguments(&run_as))
            .jail(jail(&self.pasta, namespace, run_as))
            .stdout(Stdio::Fd(writer))
            .stderr(Stdio::Pipe);
        let mut child = spawn.start().map_err(NetworkError::Pasta)?;
        let stderr = OwnedFd::from(child.stderr.take().expect("it was asked for"));
        let stderr = pipe::Receiver::from_owned_fd(stderr).map_err(NetworkError::PastaStreams)?;
        let pasta = RunningPasta { child, printed: Some(tokio::spawn(collect(stderr))), _user: user };
        match timeout(READY_WITHIN, is_ready(reader)).await {
            Ok(true) => Ok(pasta),
            Ok(false) => Err(NetworkError::PastaEnded { printed: pasta.end().await }),
            Err(_) => {
                pasta.end().await;
                Err(NetworkError::PastaHangs { seconds: READY_WITHIN.as_secs() })
            }
        }
    }

    fn arguments(&self, run_as: &RunAs) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = [
            "--foreground",
            "--quiet",
            "--netns",
            NAMESPACE,
            "--config-net",
            "--pid",
            READY,
            "--ns-ifname",
            INTERFACE,
            "--address",
            ADDRESS,
            "--netmask",
            PREFIX,
            "--gateway",
            GATEWAY,
            "--dns-forward",
            NAMESERVER,
            // The gateway does not lead to the host's localhost, and neither does the namespace's.
            "--no-map-gw",
            "--tcp-ns",
            "none",
            "--udp-ns",
            "none",
            "--no-dhcp",
            "--no-dhcpv6",
            "--no-ra",
        ]
        .map(OsString::from)
        .into();
        if run_as.uid == 0 {
            // Without the option pasta takes the user `nobody`, who may not enter the namespace.
            arguments.extend(["--runas".into(), "0:0".into()]);
        }
        for (protocol, option) in [(Protocol::Tcp, "--tcp-ports"), (Protocol::Udp, "--udp-ports")] {
            let mut ports = self.ports.iter().filter(|port| port.protocol == protocol).peekable();
            if ports.peek().is_none() {
                arguments.extend([option.into(), "none".into()]);
            }
            for PublishedPort { address, host, container, .. } in ports {
                arguments.extend([option.into(), format!("{address}/{host}:{container}").into()]);
            }
        }
        arguments
    }
}

impl RunningPasta {
    /// Returns what pasta has printed when it has ended by itself.
    pub(super) async fn ended(&mut self) -> String {
        self.child.exited().await;
        match self.printed.take() {
            Some(printed) => printed.await.unwrap_or_default(),
            None => String::new(),
        }
    }

    /// Ends pasta, and with it the interface. Returns what it has printed.
    pub(super) async fn end(mut self) -> String {
        match self.child.kill().await {
            Ok(_) => self.ended().await,
            Err(error) => {
                tracing::warn!("cannot end pasta: {}", chain(&error));
                String::new()
            }
        }
    }
}

/// Reports the first port that is in use. pasta binds the ports itself, and its message would not name them.
fn check_ports(ports: &[PublishedPort]) -> Result<(), NetworkError> {
    for port in ports {
        let address = SocketAddr::new(port.address, port.host);
        let bound = match port.protocol {
            Protocol::Tcp => TcpListener::bind(address).map(drop),
            Protocol::Udp => UdpSocket::bind(address).map(drop),
        };
        bound.map_err(|source| NetworkError::Publish { port: *port, source })?;
    }
    Ok(())
}

/// Whether any user can open the device, as udev(7) sets it.
fn is_open_to_all(device: &str) -> bool {
    fs::metadata(device).is_ok_and(|device| device.permissions().mode() & 0o6 == 0o6)
}

/// A pipe whose end for writing the user can open by its path.
fn ready_pipe(user: &RunAs) -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (reader, writer) = io::pipe()?;
    let writer = OwnedFd::from(writer);
    fchown(&writer, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))?;
    Ok((pipe::Receiver::from_owned_fd(reader.into())?, writer))
}

/// Whether pasta is ready, or has ended before.
async fn is_ready(mut reader: pipe::Receiver) -> bool {
    reader.read_u8().await.is_ok()
}

/// Reads pasta's messages until it has ended, and returns the first ones.
async fn collect(mut stderr: impl AsyncRead + Unpin) -> String {
    let mut printed = Vec::new();
    // What cannot be read is not needed.
    drop((&mut stderr).take(MAX_PRINTED).read_to_end(&mut printed).await);
    drop(tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await);
    let printed = String::from_utf8_lossy(&printed);
    // pasta also reports that its jail has no system log.
    let lines = printed.lines().filter(|line| !line.is_empty() && !line.ends_with("to syslog"));
    printable(&lines.collect::<Vec<_>>().join("; "))
}

fn jail(program: &Path, namespace: &OwnedFd, identity: RunAs) -> Jail {
    let strict = Jail::strict(identity);
    // Without the capability to raise limits, a process cannot exceed what it inherits.
    let open_files = getrlimit(Resource::Nofile).maximum.unwrap_or(OPEN_FILES).min(OPEN_FILES);
    let namespace = format!("/proc/self/fd/{}", namespace.as_fd().as_raw_fd());
    let real = find_program(program);
    let real = real.canonicalize().unwrap_or(real);
    // pasta executes the one of its two programs that fits the processor.
    let mut avx2 = real.into_os_string();
    avx2.push(".avx2");
    Jail {
        namespaces: Namespaces { net: false, ..strict.namespaces },
        files: Some(JailFiles {
            readable: vec![avx2.into()],
            devices: vec![TUN.into(), "/dev/null".into()],
            mount_points: vec![TMP.into()],
            placed: vec![(namespace.into(), NAMESPACE.into()), (RESOLV_CONF.into(), RESOLV_CONF.into())],
            ..JailFiles::default()
        }),
        capabilities: Some(CAPABILITIES.to_vec()),
        limits: ResourceLimits { open_files: Some(open_files), file_size: Some(0), ..strict.limits },
        ..strict
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{IpAddr, Ipv4Addr, TcpStream},
    };

    use machinen_base::{error::HasKind as _, netns, process::probe};
    use machinen_netlink::{Interface, NetlinkSocket, interfaces};

    use super::*;

    fn network(ports: &str) -> OutsideNetwork {
        OutsideNetwork { pasta: "pasta".into(), ports: crate::config::ports::parse_ports(ports).unwrap() }
    }

    fn namespace() -> (OwnedFd, NetlinkSocket) {
        let switch_on = || {
            let mut socket = NetlinkSocket::new()?;
            socket.set_link(1, "lo", true, Vec::new()).map_err(io::Error::other).map(|()| socket)
        };
        netns::inside_new(switch_on).unwrap()
    }

    fn found(socket: &mut NetlinkSocket) -> Option<Interface> {
        interfaces(socket).unwrap().into_iter().find(|interface| interface.name == INTERFACE)
    }

    /// A port of the host on which nothing listens.
    fn free() -> u16 {
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
    }

    #[tokio::test]
    async fn the_namespace_is_connected_until_the_end() {
        let (namespace, mut socket) = namespace();
        let port = free();
        let pasta = network(&format!("{port}:80")).connect(&namespace).await.unwrap();
        let interface = found(&mut socket).unwrap();
        assert!(interface.up && interface.mac.len() == 6, "{interface:?}");
        let addresses: Vec<_> = interface.addresses.iter().map(|address| address.address).collect();
        assert!(addresses.contains(&ADDRESS.parse::<IpAddr>().unwrap()), "{addresses:?}");
        let server =
            netns::inside(namespace.as_fd(), || TcpListener::bind((Ipv4Addr::LOCALHOST, 80))).unwrap();
        let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        client.write_all(b"hello").unwrap();
        let mut got = [0; 5];
        server.accept().unwrap().0.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
        let status = fs::read_to_string(format!("/proc/{}/status", pasta.child.pid())).unwrap();
        let uid = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap();
        assert_eq!(uid.contains("\t0"), !is_open_to_all(TUN));
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        pasta.end().await;
        assert!(found(&mut socket).is_none());
    }

    /// It sees the devices and the directories that it needs, in a root of its own.
    #[test]
    fn a_taken_over_pasta_reaches_nothing_else() {
        let (namespace, _socket) = namespace();
        let user = ReservedUser::reserve().unwrap();
        let jail = jail(Path::new("/bin/sh"), &namespace, user.run_as(Vec::new()));
        let kept = CAPABILITIES.iter().fold(0, |mask, bit| mask | 1 << bit);
        assert_eq!(probe(&jail, kept).unwrap(), ["sees /tmp", "sees /dev"]);
    }

    #[tokio::test]
    async fn a_port_in_use_and_a_missing_program_are_named() {
        let (namespace, mut socket) = namespace();
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = network(&format!("{port}:80")).connect(&namespace).await.unwrap_err();
        assert_eq!(error.kind(), machinen_base::error::ErrorKind::FailedPrecondition);
        let text = chain(&error);
        assert!(text.contains(&format!("127.0.0.1:{port}:80")) && text.contains("in use"), "{text}");
        let missing = OutsideNetwork { pasta: "/nowhere/pasta".into(), ports: Vec::new() };
        let text = chain(&missing.connect(&namespace).await.unwrap_err());
        assert!(text.contains("install the Debian package passt"), "{text}");
        let failing = OutsideNetwork { pasta: "/bin/false".into(), ports: Vec::new() };
        let text = chain(&failing.connect(&namespace).await.unwrap_err());
        assert!(text.contains("pasta, which connects the container with the outside, has failed"), "{text}");
        assert!(found(&mut socket).is_none());
    }
}
