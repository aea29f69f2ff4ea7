//! `delete`: the action that containerd runs when a server has ended or never started.
//!
//! It works in any partial state, and a part that is already gone is not an error. QEMU, its helpers and the
//! anchor die with their server, so it is enough to end the server and remove its files.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use containerd_shim_protos::api::DeleteResponse;
use machinen::{
    error::chain,
    fs::{FileError, remove_dir_if_exists, remove_if_exists},
    hooks::{PoststopRecord, recorded},
    host_cgroup, network,
    pod::state::KILLED,
    process::{ReservedUser, kill_foreign},
};
use machinen_task::events::timestamp;
use protobuf::{Message, MessageField};

use crate::{
    args::ShimArgs,
    error::ShimError,
    server::{POD_DIR, POSTSTOP_DIR, event_loop},
    start::{ADDRESS_FILE, PID_FILE},
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
    let pid = end_server(&bundle)?;
    if let Some(socket) =
        read(&bundle, ADDRESS_FILE).and_then(|text| Some(PathBuf::from(text.strip_prefix("unix://")?)))
    {
        remove_if_exists(&socket).map_err(FileError::at("remove", socket))?;
    }
    run_poststop_hooks(&bundle, until)?;
    if let Err(error) = host_cgroup::remove_abandoned(&bundle) {
        // containerd logs this as a warning; a group that stays must not keep the rest.
        eprintln!("{}", chain(&error));
    }
    if let Err(error) = network::disconnect_abandoned(&bundle) {
        eprintln!("{}", chain(&error));
    }
    // A killed server has not released the users of its children.
    if let Err(error) = ReservedUser::sweep() {
        eprintln!("{}", chain(&error));
    }
    for dir in [POD_DIR, POSTSTOP_DIR] {
        let path = bundle.join(dir);
        remove_dir_if_exists(&path).map_err(FileError::at("remove", path))?;
    }
    for file in [ADDRESS_FILE, PID_FILE] {
        let path = bundle.join(file);
        remove_if_exists(&path).map_err(FileError::at("remove", path))?;
    }
    let response = DeleteResponse {
        pid,
        // The status that containerd's own runtimes answer.
        exit_status: KILLED,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..Default::default()
    };
    response.write_to_writer(&mut io::stdout().lock()).map_err(ShimError::Encode)
}

/// Runs the poststop hooks of all containers that the server had. A failure is logged by containerd, and must not keep
/// the rest.
fn run_poststop_hooks(bundle: &Path, until: Instant) -> Result<(), ShimError> {
    let dir = bundle.join(POSTSTOP_DIR);
    let ids = recorded(&dir).unwrap_or_else(|error| {
        eprintln!("{}", chain(&error));
        Vec::new()
    });
    if ids.is_empty() {
        return Ok(());
    }
    event_loop(bundle)?.block_on(async {
        for id in ids {
            let failures = match PoststopRecord::open(&dir, &id) {
                Ok(Some(record)) => record.run(&[], Some(until)).await,
                Ok(None) => Ok(Vec::new()),
                Err(error) => Err(error),
            };
            failures
                .unwrap_or_else(|error| vec![error])
                .iter()
                .for_each(|error| eprintln!("{}", chain(error)));
        }
    });
    Ok(())
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
