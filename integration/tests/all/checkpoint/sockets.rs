//! After a restore, a UNIX socket can be reached at the current name of its file, whatever name it was bound
//! to.

use anyhow::{Result, ensure};
use machinen_integration::{bundle::Bundle, containerd::Containerd, served::Served};

use super::{moved, python};
use crate::harness::on_newest_containerd;

on_newest_containerd!(sockets_with_other_names);

/// The first answers of the sockets of sockets.py: their labels and addresses.
const BOUND: &str = "linked /tmp/linked.tmp
renamed /renamed.tmp
datagram /tmp/datagram.tmp
packet /tmp/packet.tmp
directory /tmp/old/socket
older /tmp/name
newer /tmp/name
relative relative.tmp
jailed /socket
plain /tmp/link/plain
";
/// Their answers after a restore: each address is the path at which the socket can be reached.
const RESTORED: &str = "linked /tmp/linked
renamed /renamed
datagram /tmp/datagram
packet /tmp/packet
directory /tmp/new/socket
older /tmp/name.1
newer /tmp/name
relative /tmp/relative
jailed /tmp/jail/socket
plain /tmp/link/plain
";

fn sockets_with_other_names(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::with_workloads(containerd)?;
    let capabilities = ["CAP_SYS_CHROOT", "CAP_DAC_OVERRIDE", "CAP_KILL"];
    let config = python(&bundle, "sockets.py", include_str!("sockets.py"), &capabilities)?;
    let mut running = Served::run(containerd, &config)?;
    answers(&running, BOUND)?;
    // The second checkpoint is of the restored container.
    for _ in 0..2 {
        running = moved(containerd, &running, &config)?;
        answers(&running, RESTORED)?;
    }
    running.end()
}

fn answers(served: &Served<'_>, wanted: &str) -> Result<()> {
    let script =
        "until [ -e /dev/shm/ready ]; do usleep 50000; done; exec /usr/bin/python3.13 /sockets.py ask";
    let (status, text) = served.shell(script)?;
    ensure!(status == 0 && text == wanted, "status {status}, wanted\n{wanted}but got\n{text}");
    Ok(())
}
