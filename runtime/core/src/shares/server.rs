//! The process that serves a pod's volumes to its guest.
//!
//! fuse-backend-rs parses the requests and carries them out (`PassthroughFs`). It is made for /dev/fuse, but its
//! replies are written with one call each, so that they can go to a socket as well.

use std::{fs::File, io, process::ExitCode, sync::mpsc, thread};

use fuse_backend_rs::passthrough::{Config, PassthroughFs};
use machinen_base::{reexec::EntryPoint, sys};
use machinen_protocol::shares::{FRESH, QUEUES};
use nix::sys::signal::{SigSet, Signal};

use super::{jail::CAPABILITIES, queue::Files, root::VOLUMES};

/// The server of a pod's volumes; it inherits its streams.
pub const ENTRY_POINT: EntryPoint = EntryPoint { name: "share-server", main: |_| main() };

/// The descriptor of the first stream; the others follow.
pub(super) const FIRST_QUEUE: i32 = 3;

/// The descriptor of the socket on which this process asks for connections.
pub(super) const CONTROL: i32 = FIRST_QUEUE + QUEUES as i32;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    // Files are made as the user of the guest that makes them. That user's rights are checked by the guest's kernel,
    // which knows its groups; the server's own rights must suffice then.
    sys::ignore_user_for_capabilities()?;
    sys::keep_only_capabilities(&CAPABILITIES)?;
    // The kernel asks for the end of a lease, which is about to end anyway. All threads inherit this.
    SigSet::from(Signal::SIGIO).thread_block()?;
    let queues: Vec<File> = (FIRST_QUEUE..)
        .take(QUEUES)
        .map(|number| sys::inherit::take(number).map(File::from))
        .collect::<Result<_, _>>()?;
    let control = sys::inherit::take(CONTROL)?;
    let files = files(VOLUMES)?;
    let (ended, first) = mpsc::channel();
    let (connecting, over) = (files.clone(), ended.clone());
    thread::spawn(move || {
        // The end of the control socket is not that of the volumes.
        if let Err(error) = connecting.dial(control) {
            drop(over.send(Err(error)));
        }
    });
    for queue in queues {
        let (files, ended) = (files.clone(), ended.clone());
        // The receiver is gone only when the process is ending.
        thread::spawn(move || drop(ended.send(files.serve(queue))));
    }
    drop(ended);
    // The guest's file system needs all of its streams, so the first end ends them all.
    first.recv().map_err(io::Error::other)?
}

/// The files below the directory `root`, which is opened when the guest's kernel sends its first request.
fn files(root: &'static str) -> io::Result<Files> {
    let config = Config {
        root_dir: root.to_owned(),
        attr_timeout: FRESH,
        entry_timeout: FRESH,
        xattr: true,
        killpriv_v2: true,
        // A request's data is at no address that O_DIRECT allows; the guest's own cache is passed by all the same.
        allow_direct_io: false,
        ..Config::default()
    };
    Ok(Files::new(PassthroughFs::new(config)?, root))
}

/// What a share server does with a stream; for fuzzing.
#[cfg(fuzzing)]
#[expect(missing_debug_implementations, reason = "the library's types have none")]
pub struct ServedFiles(Files);

#[cfg(fuzzing)]
impl ServedFiles {
    /// The files below the root directory that the serving thread has when the first request arrives.
    ///
    /// # Errors
    /// proc(5) is not mounted.
    pub fn new() -> io::Result<Self> {
        files("/").map(Self)
    }

    /// Serves until the stream ends.
    ///
    /// # Errors
    /// The stream has failed, or what arrives is not FUSE.
    pub fn serve(&self, stream: File) -> io::Result<()> {
        self.0.serve(stream)
    }
}
