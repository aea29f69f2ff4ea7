//! Processes that watch files are notified of changes after a restore.

use anyhow::{Result, ensure};
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
    served::Served,
};
use serde_json::json;

use super::moved;
use crate::harness::on_newest_containerd;

on_newest_containerd!(watches_of_files);

/// Watches a file and a directory of the image that were not changed before, a file and a directory that
/// were, and a tmpfs; writes down the paths with a notification.
const WATCHER: &str = r#"
import ctypes, os, struct, time
paths = ["/etc/passwd", "/usr/lib", "/etc/group", "/home", "/dev/shm"]
with open("/etc/group", "a") as f: f.write("x:x:99:\n")
os.chmod("/home", 0o711)
libc = ctypes.CDLL(None)
fd = libc.inotify_init1(os.O_NONBLOCK)
names = {libc.inotify_add_watch(fd, path.encode(), 0x306): path for path in paths}
seen = set()
open("/run/ready", "w").close()
while True:
    try: data = os.read(fd, 4096)
    except BlockingIOError: time.sleep(0.05); continue
    while data:
        wd, _, _, length = struct.unpack_from("iIII", data)
        seen.add(names[wd])
        data = data[16 + length:]
    with open("/run/new", "w") as f: f.write(" ".join(sorted(seen)))
    os.rename("/run/new", "/run/seen")
"#;
const READY: &str = "until [ -e /run/ready ]; do usleep 50000; done";
/// Changes the attributes of the first file, and the content of the others.
const CHANGE: &str = "chmod 600 /etc/passwd; touch /usr/lib/zz /home/zz /dev/shm/zz; echo y:x:98: >> /etc/group; \
                      for n in $(seq 200); do [ \"$(cat /run/seen 2>/dev/null)\" = '/dev/shm /etc/group /etc/passwd /home /usr/lib' ] && exit; \
                      usleep 50000; done; cat /run/seen; exit 1";

fn watches_of_files(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::with_workloads(containerd)?;
    let config = bundle.config(&["python3.13", "-c", WATCHER], |spec| {
        spec["process"]["env"] = json!(["PATH=/usr/bin:/bin", "LC_ALL=C", "PYTHONDONTWRITEBYTECODE=1"]);
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(mount("/run", "tmpfs", "tmpfs", &["mode=755"]));
    })?;
    let mut running = Served::run(containerd, &config)?;
    ensure!(running.exec_to("ready", &["sh", "-c", READY], "")? == 0, "the container does not get ready");
    // The second restore is of a restored container, from another disk than the first.
    for _ in 0..2 {
        running = moved(containerd, &running, &config)?;
    }
    let (status, seen) = running.shell(CHANGE)?;
    ensure!(status == 0, "the watcher was notified only of {seen:?}");
    running.end()
}
