//! The process that holds the streams of a container that `machinen boot --detach` has started.
//!
//! ```text
//!   stand-in ──pty or pipes──> keeper ──> BUNDLE/output.log     bounded, in the format of Kubernetes' logs
//!                                  └────> BUNDLE/attach.sock    `machinen attach`: output, input, sizes, exit status
//! ```
//! It ends with the container, and deletes it if that was asked for.

mod log;
mod protocol;
mod server;

use std::{
    fs,
    io::{self, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{fs::PermissionsExt as _, net::UnixListener},
    },
    path::{Path, PathBuf},
    process::ExitCode,
};

use machinen::{error::chain, fs::FileError, process::ProcessError, reexec::EntryPoint, sys};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

pub(crate) use self::{
    log::LogLine,
    protocol::{Frame, FrameKind, read_frame},
};
use super::{BootArgs, BootError};
use crate::oci::{
    OciError,
    console::{Console, set_size},
    create::CreateArgs,
    stand_in::StandInStreams,
};

/// The process that holds the streams of a container.
pub(crate) const ENTRY_POINT: EntryPoint = EntryPoint { name: "container-keeper", main };

/// The files of the keeper in the bundle.
pub(crate) const LOG: &str = "output.log";
pub(crate) const SOCKET: &str = "attach.sock";

const LISTENER_FD: i32 = 3;
const ORDERS_FD: i32 = 4;
const OUT_FD: i32 = 5;
const ERR_FD: i32 = 6;
const IN_FD: i32 = 7;

#[derive(Debug, Serialize, Deserialize)]
struct KeeperParams {
    root: PathBuf,
    id: String,
    bundle: PathBuf,
    /// There is one stream in both directions.
    terminal: bool,
    /// The container has a stdin pipe.
    stdin: bool,
    /// Delete the container when it has ended.
    remove: bool,
}

/// Streams for a stand-in, whose other ends a keeper has.
pub(super) struct Kept {
    pub(super) streams: StandInStreams,
    pub(super) keeper: Keeper,
}

/// A keeper that was started. If this is dropped before [`Keeper::begin`], the keeper ends.
pub(super) struct Keeper {
    orders: io::PipeWriter,
}

impl Keeper {
    /// The container runs.
    ///
    /// # Errors
    /// The keeper has ended.
    pub(super) fn begin(mut self) -> Result<(), OciError> {
        self.orders
            .write_all(b"go\n")
            .map_err(OciError::io("reach the process that keeps the container's streams"))
    }
}

/// Starts the keeper of a container that is to be created.
///
/// # Errors
/// A stream cannot be made, or the process cannot be started.
pub(super) fn start(
    root: &Path,
    create: &CreateArgs,
    bundle: &Path,
    args: &BootArgs,
) -> Result<Kept, BootError> {
    let pipe = || io::pipe().map_err(OciError::io("make a pipe"));
    let root = std::path::absolute(root).map_err(FileError::at("find", root))?;
    let params = KeeperParams {
        root,
        id: create.id.clone(),
        bundle: bundle.to_owned(),
        terminal: args.tty,
        stdin: args.interactive && !args.tty,
        remove: args.rm,
    };
    let (reader, orders) = pipe()?;
    let text = serde_json::to_string(&params).map_err(OciError::Encode)?;
    let spawn = ENTRY_POINT.spawn().args([text]).dir("/");
    let spawn = spawn.fd(listen(bundle)?.into(), LISTENER_FD).fd(reader.into(), ORDERS_FD);
    let (spawn, streams) = if params.terminal {
        let console = Console::open()?;
        if let Some((columns, rows)) = args.terminal_size() {
            set_size(&console, columns.into(), rows.into());
        }
        (spawn.fd(console.master, OUT_FD), StandInStreams::Terminal(console.slave))
    } else {
        let ((out, stdout), (err, stderr)) = (pipe()?, pipe()?);
        let spawn = spawn.fd(out.into(), OUT_FD).fd(err.into(), ERR_FD);
        let (spawn, stdin) = match params.stdin {
            true => {
                let (stdin, input) = pipe()?;
                (spawn.fd(input.into(), IN_FD), Some(OwnedFd::from(stdin)))
            }
            false => (spawn, None),
        };
        (spawn, StandInStreams::Pipes(stdin, stdout.into(), stderr.into()))
    };
    let failed = |source: ProcessError| OciError::Spawn { purpose: "keeps the container's streams", source };
    spawn.detach().map_err(failed)?;
    Ok(Kept { streams, keeper: Keeper { orders } })
}

/// Listens in the bundle, whose path may be longer than a Unix address can be.
fn listen(bundle: &Path) -> Result<UnixListener, BootError> {
    let bind = || -> io::Result<UnixListener> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir: OwnedFd = rustix::fs::open(bundle, flags, Mode::empty())?;
        let path = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    Ok(bind().map_err(FileError::at("listen on", bundle.join(SOCKET)))?)
}

fn main(args: Vec<String>) -> ExitCode {
    let kept = args.first().ok_or_else(|| "no parameters".to_owned()).and_then(|params| {
        let params: KeeperParams = serde_json::from_str(params).map_err(|error| error.to_string())?;
        let take = |fd| sys::inherit::take(fd).map_err(|error| error.to_string());
        let inherited = server::Inherited {
            listener: take(LISTENER_FD)?.into(),
            orders: take(ORDERS_FD)?.into(),
            out: take(OUT_FD)?.into(),
            err: (!params.terminal).then(|| take(ERR_FD)).transpose()?.map(Into::into),
            input: params.stdin.then(|| take(IN_FD)).transpose()?.map(Into::into),
        };
        server::run(params, inherited).map_err(|error| chain(&error))
    });
    match kept {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}
