//! `start`: starts a server in the background and reports its address to containerd.
//!
//! containerd reads stdout and stderr together, so only the answer is printed.

use std::{
    env, fs,
    os::{
        fd::OwnedFd,
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use machinen::{
    config::{self, Config},
    fs::{FileError, hex, remove_if_exists},
    pool::Pool,
    process::Spawn,
};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{
    args::ShimArgs,
    error::ShimError,
    group::{self, ServedContainer},
    options,
    server::ServerParams,
};

/// The descriptor on which the server inherits its listener.
pub(crate) const LISTENER_FD: i32 = 3;

/// File in the bundle with the server's address, for `delete`.
pub(crate) const ADDRESS_FILE: &str = "address";
/// File in the bundle with the server's pid, for `delete`.
pub(crate) const PID_FILE: &str = "shim.pid";

/// File in the bundle of a container that another container's server serves, with the id of that container.
pub(crate) const POD_FILE: &str = "pod";

/// The directory of the sockets of containerd's shims.
const SOCKET_DIR: &str = "/run/containerd/s";

/// The newest version of the shim protocol that this binary implements.
const VERSION: u32 = 3;

/// The answer to `start` since containerd 1.7 (containerd, `BootstrapParams`).
#[derive(Debug, Serialize)]
struct Bootstrap<'a> {
    version: u32,
    address: &'a str,
    protocol: &'static str,
}

/// # Errors
/// The socket cannot be created or the server cannot be started. Nothing is left then.
pub(crate) fn run(args: &ShimArgs) -> Result<(), ShimError> {
    let bundle = env::current_dir().map_err(FileError::at("find the bundle, the directory", "."))?;
    let sandbox = group::sandbox_of(&args.id, &bundle);
    let pod = match &sandbox {
        Some(id) => Some(ServedContainer { socket: socket_path(args, id), id: id.clone() }),
        None => group::owner_of_namespaces(&bundle),
    };
    if let Some(ServedContainer { id, .. }) = pod.as_ref().filter(|_| sandbox.is_none()) {
        let path = bundle.join(POD_FILE);
        fs::write(&path, id).map_err(FileError::at("write", path))?;
    }
    let socket = pod.as_ref().map_or_else(|| socket_path(args, &args.id), |pod| pod.socket.clone());
    let address = format!("unix://{}", socket.display());
    let served = UnixStream::connect(&socket);
    if let Some(ServedContainer { id, .. }) = pod {
        served.map_err(|source| ShimError::NoSandbox { sandbox: id, source })?;
        // A containerd that was restarted reads it (containerd 1.6).
        write_address(&bundle, &address)?;
    } else if served.is_err() {
        spawn_server(args, &bundle, &socket, &address).inspect_err(|_| {
            // The first failure is the one to report; the next attempt replaces a stale socket.
            let _ = fs::remove_file(&socket);
        })?;
    }
    println!("{}", answer(&address, env::var("MAX_SHIM_VERSION").ok().as_deref())?);
    Ok(())
}

/// containerd 1.6 expects the bare address; newer versions pass the newest protocol version that they
/// support.
fn answer(address: &str, max_version: Option<&str>) -> Result<String, ShimError> {
    match max_version.and_then(|version| version.parse::<u32>().ok()) {
        Some(max) if max > 2 => {
            let bootstrap = Bootstrap { version: VERSION.min(max), address, protocol: "ttrpc" };
            serde_json::to_string(&bootstrap).map_err(ShimError::Json)
        }
        _ => Ok(address.to_owned()),
    }
}

/// One socket per containerd, namespace and pod, which the id of its first container names, short enough for a Unix address.
fn socket_path(args: &ShimArgs, id: &str) -> PathBuf {
    let name = format!("{}/{}/{id}", args.address, args.namespace);
    let hash = Sha256::digest(name);
    Path::new(SOCKET_DIR).join(hex(&hash[..16]))
}

fn spawn_server(args: &ShimArgs, bundle: &Path, socket: &Path, address: &str) -> Result<(), ShimError> {
    // Here it is decided which configuration the pod has: the server, the members of the warm pool that it makes, and
    // their helpers inherit it. An error of the server reaches containerd's log only, and one of this program its
    // client.
    let named = options::of_start(args)?.config;
    let config = Config::load_named(named.as_deref())?;
    fs::create_dir_all(SOCKET_DIR).map_err(FileError::at("create the directory", SOCKET_DIR))?;
    remove_if_exists(socket).map_err(FileError::at("remove the stale socket", socket))?;
    let listener = UnixListener::bind(socket).map_err(FileError::at("listen on", socket))?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))
        .map_err(FileError::at("set the mode of", socket))?;
    write_address(bundle, address)?;
    let listener = OwnedFd::from(listener);
    if handed_to_pool(args, &config, bundle, &listener)? {
        return Ok(());
    }

    let binary = env::current_exe().map_err(FileError::at("find the binary", "/proc/self/exe"))?;
    let mut server =
        Spawn::new(binary).args(["-namespace", &args.namespace, "-id", &args.id, "-address", &args.address]);
    if args.debug {
        server = server.args(["-debug"]);
    }
    if let Some(file) = named {
        server = server.env(config::PATH_VARIABLE, file);
    }
    let pid = server.fd(listener, LISTENER_FD).detach().map_err(ShimError::Server)?;
    let path = bundle.join(PID_FILE);
    Ok(fs::write(&path, pid.to_string()).map_err(FileError::at("write", path))?)
}

fn write_address(bundle: &Path, address: &str) -> Result<(), FileError> {
    let path = bundle.join(ADDRESS_FILE);
    fs::write(&path, address).map_err(FileError::at("write", path))
}

/// Whether a member of the warm pool has accepted the work.
fn handed_to_pool(
    args: &ShimArgs,
    config: &Config,
    bundle: &Path,
    listener: &OwnedFd,
) -> Result<bool, ShimError> {
    let Ok(Some(pool)) = Pool::of(config) else { return Ok(false) };
    let work = ServerParams {
        namespace: args.namespace.clone(),
        id: args.id.clone(),
        debug: args.debug,
        bundle: bundle.to_owned(),
        events: env::var("TTRPC_ADDRESS").ok(),
    };
    let message = serde_json::to_vec(&work).map_err(ShimError::Json)?;
    Ok(pool.hand_over(&message, listener).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_fits_the_version_of_containerd() {
        let bare = "unix:///run/s";
        assert_eq!(answer(bare, None).unwrap(), bare);
        assert_eq!(answer(bare, Some("2")).unwrap(), bare);
        let json = r#"{"version":3,"address":"unix:///run/s","protocol":"ttrpc"}"#;
        assert_eq!(answer(bare, Some("3")).unwrap(), json);
        assert_eq!(answer(bare, Some("9")).unwrap(), json);
    }

    #[test]
    fn sockets_differ_and_are_short() {
        let args = ShimArgs::default();
        let (one, two) = (socket_path(&args, &"one".repeat(20)), socket_path(&args, &"two".repeat(20)));
        assert_ne!(one, two);
        assert!(one.as_os_str().len() < 100);
    }
}
