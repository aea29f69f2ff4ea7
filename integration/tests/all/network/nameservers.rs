//! A nameserver that only the namespace's loopback network has.

use std::{fs, net::UdpSocket, os::fd::AsFd as _, thread, time::Duration};

use anyhow::{Result, ensure};
use machinen_base::netns;
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
};
use serde_json::json;

use super::lab::Lab;
use crate::harness::on_newest_containerd;

on_newest_containerd!(reached_again_after_the_agent_has_lost_its_sockets);

/// Asks until an answer arrives, and then destroys all sockets of UDP at the nameserver's address, as `ss --kill` does
/// (sock_diag(7), SOCK_DESTROY). Twice, and asks once more. All queries come from one
/// socket, which the kernel leads to one port of the agent.
const PROGRAM: &str = r"
import socket, struct

query = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
query.settimeout(1)

def ask():
    while True:
        try:
            query.sendto(b'query', ('127.0.0.11', 53))
            return query.recv(100).decode()
        except OSError:
            pass

def destroy():
    address = socket.inet_aton('127.0.0.11') + bytes(12)
    locals = [line.split()[1] for line in open('/proc/net/udp').read().splitlines()[1:]]
    ports = [int(local.split(':')[1], 16) for local in locals if local.startswith('0B00007F:')]
    diag = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)
    for port in ports:
        any = struct.pack('=III', 0, 0xffffffff, 0xffffffff)
        identity = struct.pack('>HH', port, 0) + address + bytes(16) + any
        request = struct.pack('=BBBBI', 2, 17, 0, 0, 0xffffffff) + identity
        diag.send(struct.pack('=IHHII', 16 + len(request), 21, 5, 1, 0) + request)
        error = struct.unpack('=i', diag.recv(4096)[16:20])[0]
        assert error == 0, error
    return len(ports)

for _ in range(2):
    print(ask())
    print(destroy(), 'destroyed')
print(ask())
";

fn reached_again_after_the_agent_has_lost_its_sockets(containerd: &mut Containerd) -> Result<()> {
    let (lab, bundle) = (Lab::wired()?, Bundle::with_workloads(containerd)?);
    let namespace = netns::open(&lab.path())?;
    let nameserver = netns::inside(namespace.as_fd(), || UdpSocket::bind("127.0.0.11:53"))?;
    let server = nameserver.try_clone()?;
    thread::spawn(move || -> std::io::Result<()> {
        loop {
            let (_, from) = server.recv_from(&mut [0; 100])?;
            server.send_to(b"answer", from)?;
        }
    });
    let file = containerd.root().join("resolv.conf");
    fs::write(&file, "nameserver 127.0.0.11\n")?;
    let config = bundle.config(&["python3.13", "-uc", PROGRAM], |spec| {
        spec["linux"]["namespaces"] = json!([
            { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
            { "type": "network", "path": lab.path() },
        ]);
        let source = file.display().to_string();
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(mount("/etc/resolv.conf", "bind", &source, &["rbind", "ro"]));
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set]
                .as_array_mut()
                .expect("an array")
                .push("CAP_NET_ADMIN".into());
        }
    })?;
    let output = containerd.run_spec(&config).spawn(Duration::from_secs(180))?.wait()?.ok()?.text();
    ensure!(output == "answer\n1 destroyed\nanswer\n1 destroyed\nanswer\n", "{output}");
    lab.nothing_is_left()
}
