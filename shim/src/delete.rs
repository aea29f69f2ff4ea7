//! `delete`: the action that containerd runs when a server has ended or never started.
//!
//! It works in any partial state: it ends the server and removes what the server's pod has left.

use std::{
    env, fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use containerd_shim_protos::api::DeleteResponse;
use machinen::{
    fs::{FileError, remove_if_exists},
    pod::{leftovers, state::KILLED},
    process::kill_foreign,
};
use machinen_task::events::timestamp;
use protobuf::{Message, MessageField};

use crate::{
    args::ShimArgs,
    error::ShimError,
    group,
    server::event_loop,
    start::{ADDRESS_FILE, PID_FILE, POD_FILE},
};

/// containerd gives `delete` five seconds in total.
const KILL_DEADLINE: Duration = Duration::from_secs(2);

/// How long after the begin of `delete` the poststop hooks are killed. containerd would kill them with this process.
const HOOKS_DEADLINE: Duration = Duration::from_secs(4);

/// # Errors
/// The server cannot be ended, or files cannot be removed.
pub(crate) fn run(args: &ShimArgs) -> Result<(), ShimError> {
    let until = Instant::now() + HOOKS_DEADLINE;
    let bundle = match args.bundle.as_os_str().is_empty() {
        true => env::current_dir().map_err(FileError::at("find the bundle, the directory", "."))?,
        false => args.bundle.clone(),
    };
    if group::sandbox_of(&args.id, &bundle).is_some() || bundle.join(POD_FILE).exists() {
        // The container's files are those of another one, whose server may still run.
        return answer(0);
    }
    if group::serves_others(&args.id, &bundle) && is_served(&bundle) {
        // containerd also calls this when it has closed its connection, after it has deleted the container.
        return answer(0);
    }
    let pid = end_server(&present(&args.id, &bundle))?;
    if let Some(socket) = socket(&bundle) {
        remove_if_exists(&socket).map_err(FileError::at("remove", socket))?;
    }
    let event_loop = event_loop(&bundle)?;
    let remove = |bundle: &Path| event_loop.block_on(leftovers::remove(bundle, bundle, until));
    // containerd logs these as warnings.
    remove(&bundle)?.iter().for_each(|problem| eprintln!("{problem}"));
    let renamed = present(&args.id, &bundle);
    if renamed != bundle {
        remove(&renamed)?.iter().for_each(|problem| eprintln!("{problem}"));
    }
    for file in [ADDRESS_FILE, PID_FILE] {
        let path = bundle.join(file);
        remove_if_exists(&path).map_err(FileError::at("remove", path))?;
    }
    answer(pid)
}

/// The bundle as it is called now: a containerd that cleans up twice may rename it meanwhile (`.ID`), to remove it. It is the
/// directory that containerd runs this program in.
pub(crate) fn present(id: &str, bundle: &Path) -> PathBuf {
    let here = env::current_dir().ok().filter(|_| !bundle.exists());
    let renamed = here.filter(|here| here.file_name() == Some(format!(".{id}").as_ref()));
    renamed.unwrap_or_else(|| bundle.to_owned())
}

fn socket(bundle: &Path) -> Option<PathBuf> {
    read(bundle, ADDRESS_FILE).and_then(|text| Some(PathBuf::from(text.strip_prefix("unix://")?)))
}

fn is_served(bundle: &Path) -> bool {
    socket(bundle).is_some_and(|socket| UnixStream::connect(socket).is_ok())
}

fn answer(pid: u32) -> Result<(), ShimError> {
    let response = DeleteResponse {
        pid,
        // The status that containerd's own runtimes answer.
        exit_status: KILLED,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..Default::default()
    };
    response.write_to_writer(&mut io::stdout().lock()).map_err(ShimError::Encode)
}

/// Kills the server if it still runs. The recorded pid is used only if that process works in this bundle.
fn end_server(bundle: &Path) -> Result<u32, ShimError> {
    let Some(pid) = read(bundle, PID_FILE).and_then(|text| text.trim().parse::<u32>().ok()) else {
        return Ok(0);
    };
    let ours = || {
        let cwd = fs::read_link(format!("/proc/{pid}/cwd"));
        let exe = fs::read_link(format!("/proc/{pid}/exe"));
        cwd.is_ok_and(|cwd| Some(cwd) == fs::canonicalize(bundle).ok()) && exe.is_ok()
    };
    kill_foreign(pid, ours, KILL_DEADLINE).map_err(FileError::at("end the server of the bundle", bundle))?;
    Ok(pid)
}

fn read(bundle: &Path, name: &str) -> Option<String> {
    fs::read_to_string(bundle.join(name)).ok()
}
