//! What is refused, and what the user reads then.

use std::fs;

use anyhow::Result;
use machinen_integration::{bundle::Bundle, containerd::Containerd};
use nix::{sys::stat::Mode, unistd::mkfifo};

use super::{bind, source};
use crate::harness::{fails_saying, on_newest_containerd};

on_newest_containerd!(mounts_that_cannot_be);

fn mounts_that_cannot_be(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let fifo = data.join("fifo");
    mkfifo(&fifo, Mode::S_IRWXU)?;
    fs::write(data.join("file"), "")?;
    let bundle = Bundle::busybox(containerd)?;
    let missing = data.join("missing");
    let text = |path: &std::path::Path| path.display().to_string();
    for (source, options, words) in [
        (&missing, &[][..], &["cannot open", &text(&missing), "the mount /data", "No such file"][..]),
        (&fifo, &[], &[&text(&fifo), "is a FIFO", "only directories, regular files and sockets"]),
        (&"/dev/null".into(), &[], &["/dev/null", "is a character device"]),
        (&data, &["rshared"], &["/data", &text(&data), "rshared", "use rslave or rprivate"]),
    ] {
        let config = bundle.config(&["true"], |spec| bind(spec, source, "/data", options))?;
        fails_saying(containerd, &containerd.run_spec(&config), words)?;
    }
    Ok(())
}
